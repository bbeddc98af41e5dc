"""What another machine sent as a checkpoint: taken if it fits this training, else refused."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runkey.files import FormatError, parse_json
from runkey.hashing import sha256_bytes
from runkey.pipeline.share import _check_checkpoint
from runkey.registry.checkpoints import Manifest, SharedFile
from runkey.tracking.log import JsonlLog, check_log
from runkey.training.build import TrainContext, build_training
from runkey.training.checkpoint import newest_files, read_file, write_file
from tests.support.records import key_of
from tests.support.squares import CLASSES, CPU, detector_params, train_detector

KEY = "rk2-test"
PARAMETERS = detector_params(training={"epochs": 2, "evaluate_every": 1, "batch_size": 8})


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training, as it was sent."""
    folder = tmp_path_factory.mktemp("sent")
    log = JsonlLog(folder / "train.jsonl")
    train_detector(PARAMETERS, folder=folder, tracker=log)
    log.close()
    return folder


@pytest.fixture
def received(sent: Path, tmp_path: Path) -> Path:
    shutil.copytree(sent, tmp_path / "received")
    return tmp_path / "received"


@pytest.fixture(scope="module")
def trial() -> TrainContext:
    """A training to try them on; those that are refused do not change it."""
    return build_training(PARAMETERS, CLASSES, CPU)


def newest(folder: Path) -> Path:
    found = newest_files(folder)
    assert found
    return folder / found.names[-1]


def test_the_files_that_a_training_needs_are_taken(received: Path, trial: TrainContext) -> None:
    found = newest_files(received)
    assert found
    assert found.step == 6
    best, anchor, step = found.names
    assert best.startswith("best-")
    assert (anchor, step) == ("anchor-00000000.ckpt", "step-00000006.ckpt")
    for name in (anchor, step):
        _check_checkpoint(received / name, KEY, trial)
    check_log(received / "train.jsonl")


def nested(tensors: dict[str, Any], *names: str | int, value: Any) -> None:
    for name in names[:-1]:
        tensors = tensors[name]  # type: ignore[index]
    tensors[names[-1]] = value  # type: ignore[index]


ATTACKS: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "another key": lambda f, t: nested(f, "fingerprint", "key", value=key_of("other")),
    "key that is a list": lambda f, t: nested(f, "fingerprint", "key", value=[]),
    "no fingerprint": lambda f, t: f.pop("fingerprint"),
    "micro-batch of millions": lambda f, t: nested(f, "fingerprint", "micro_batch", value=10**9),
    "micro-batch in words": lambda f, t: nested(f, "fingerprint", "micro_batch", value="four"),
    "best weights elsewhere": lambda f, t: nested(f, "best", value="../best.pt"),
    "best weights that are not there": lambda f, t: nested(f, "best", value="best-1-0.pt"),
    "another step": lambda f, t: nested(f, "step", value=5),
    "another step in the state": lambda f, t: nested(t, "state", "step", value=5),
    "weights of another shape": lambda f, t: nested(
        t, "parts", "model", "class_embed.weight", value=torch.zeros(3)
    ),
    "weights without an end": lambda f, t: nested(
        t, "parts", "model", "class_embed.weight", value=torch.zeros(1).expand(3, 32)
    ),
    "weights that are text": lambda f, t: nested(
        t, "parts", "model", "class_embed.weight", value="zeros"
    ),
    "weights missing": lambda f, t: t["parts"]["model"].pop("class_embed.weight"),
    "weights too many": lambda f, t: nested(t, "parts", "model", "more", value=torch.zeros(3)),
    "weights that are not finite": lambda f, t: t["parts"]["model"]["class_embed.weight"].fill_(
        math.nan
    ),
    "another part": lambda f, t: nested(t, "parts", "hook", value={}),
    "no optimizer": lambda f, t: t["parts"].pop("optimizer"),
    "moments of another shape": lambda f, t: nested(
        t, "parts", "optimizer", "state", 0, "exp_avg", value=torch.zeros(2)
    ),
    "moments of no parameter": lambda f, t: nested(
        t, "parts", "optimizer", "state", 10**6, value={"exp_avg": torch.zeros(1)}
    ),
    "another optimizer": lambda f, t: nested(
        t, "parts", "optimizer", "param_groups", 0, "weight_decay", value=9.0
    ),
    "a rate in words": lambda f, t: nested(
        t, "parts", "optimizer", "param_groups", 0, "lr", value="high"
    ),
    "an average of text": lambda f, t: nested(t, "parts", "ema", "updates", value="many"),
    "a scaler without an end": lambda f, t: nested(
        t, "parts", "scaler", value={str(n): 1.0 for n in range(99)}
    ),
    "state of another type": lambda f, t: nested(t, "state", "epoch", value="one"),
    "state without a field": lambda f, t: t["state"].pop("guard"),
    "state with a field more": lambda f, t: nested(t, "state", "more", value=1),
    "a step below zero": lambda f, t: nested(t, "state", "epoch", value=-1),
    "evaluations without the metric": lambda f, t: nested(t, "state", "evaluations", value=[{}]),
    "a position below zero": lambda f, t: nested(t, "position", "log_bytes", value=-5),
    "a position in words": lambda f, t: nested(t, "position", "log_bytes", value="end"),
    "no best": lambda f, t: nested(t, "state", "best", value=None),
    "no state": lambda f, t: t.pop("state"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_one_that_does_not_fit_is_refused(received: Path, trial: TrainContext, name: str) -> None:
    path = newest(received)
    facts, tensors, _ = read_file(path)
    tensors = copy.deepcopy(tensors)
    ATTACKS[name](facts, tensors)
    write_file(path, facts, tensors)
    with pytest.raises(Exception) as refusal:  # noqa: PT011  any, which becomes one line
        _check_checkpoint(path, KEY, trial)
    assert not isinstance(refusal.value, MemoryError | RecursionError)


class Opens:
    """What a pickle could do that is read without care."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('ran')",)


def test_no_code_is_run(received: Path, trial: TrainContext) -> None:
    path = newest(received)
    facts, tensors, _ = read_file(path)
    assert b"SystemExit" in pickle.dumps(Opens())
    write_file(path, facts, tensors | {"state": Opens()})
    with pytest.raises(Exception, match="something else than tensors"):
        _check_checkpoint(path, KEY, trial)


def test_a_packed_file_is_not_unpacked(received: Path, trial: TrainContext, tmp_path: Path) -> None:
    path = newest(received)
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 1_000_000)
    line = path.read_bytes().split(b"\n")[1] + b"\n"
    content = line + (tmp_path / "bomb").read_bytes()
    path.write_bytes(b"RUNKEY CHECKPOINT 1 " + sha256_bytes(content).encode() + b"\n" + content)
    with pytest.raises(Exception, match="it is packed"):
        _check_checkpoint(path, KEY, trial)


@pytest.mark.parametrize(
    "line",
    [
        "text",
        "[]",
        '{"step": "one", "time": 1, "values": {}}',
        '{"step": -1, "time": 1, "values": {}}',
        '{"step": 1, "time": "now", "values": {}}',
        '{"step": 1, "time": 1, "values": []}',
        '{"step": 1, "time": 1, "values": {"loss": "low"}}',
        '{"step": 1, "time": 1, "values": {"loss": [1]}}',
        '{"time": 1, "event": ["x"], "fields": {}}',
        '{"time": 1, "event": "x", "fields": []}',
        '{"time": 1, "event": "x", "fields": {"step": "one"}}',
    ],
)
def test_a_log_that_is_none_is_refused(received: Path, line: str) -> None:
    with (received / "train.jsonl").open("a") as file:
        file.write(f'{{"step": 1, "time": 1.5, "values": {{"loss": "nan"}}}}\n{line}\n')
    with pytest.raises(FormatError, match=r"train.jsonl, line \d+: no entry of a training log"):
        check_log(received / "train.jsonl")


GOOD = {"path": "g1/000001-step-00000006.ckpt", "size": 5, "sha256": "0" * 64}
FILE = "step-00000006.ckpt"


def listed(**changes: Any) -> str:
    content = {"key": key_of("x"), "generation": 1, "number": 1, "step": 6, "files": {FILE: GOOD}}
    return json.dumps(content | changes)


def test_a_list_is_read_as_it_was_sent() -> None:
    found = parse_json(listed(), Manifest)
    assert found.files == {FILE: SharedFile(**GOOD)}
    assert (found.path, found.size) == ("g1/000001.json", 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"files": {"lock": GOOD | {"path": "g1/000001-lock"}}},
        {"files": {FILE: GOOD, "../x": GOOD}},
        {"files": {FILE: GOOD | {"path": f"g1/../../{FILE}"}}},
        {"files": {FILE: GOOD | {"path": f"g2/000001-{FILE}"}}},
        {"files": {FILE: GOOD | {"path": f"/etc/000001-{FILE}"}}},
        {"files": {FILE: GOOD | {"size": -1}}},
        {"files": {FILE: GOOD | {"size": "5"}}},
        {"files": {FILE: GOOD | {"sha256": "x"}}},
        {"step": 7},
        {"step": -1},
        {"key": "rk2-"},
        {"generation": 0},
        {"number": 0},
        {"number": None},
    ],
)
def test_a_list_that_leads_elsewhere_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        parse_json(listed(**changes), Manifest)
