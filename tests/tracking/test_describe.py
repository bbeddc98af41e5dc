"""Run names and data sets."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from runkey.params import Params, as_text, parse_params
from runkey.tracking.describe import (
    DIFFERS,
    committed_params,
    copied_name,
    describe_in_words,
    describe_run,
    is_edited,
    note_tags,
    read_dataset,
    run_name,
)
from runkey.tracking.store import NOTE

BASE = {"lr": 1e-3, "seed": 0}


def params(**changes: object) -> Params:
    return parse_params(BASE | changes)


def texts(values: Params) -> dict[str, str]:
    return {name: as_text(value) for name, value in values.flat().items()}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "baseline"),
        ({"lr": 5e-5}, "lr=5e-05"),
        ({"seed": 3, "training": {"epochs": 12}}, "seed=3 epochs=12"),
        ({"model": {"denoising": {"groups": 2}}}, "groups=2"),
        ({"evaluate": {"batch_size": 4}}, "evaluate.batch_size=4"),  # training has one, too
        ({"data": {"group_by_aspect": False}}, "group_by_aspect=false"),
        ({"runtime": {"workers": 3}}, "baseline"),
        (
            {
                "lr": 0.1,
                "seed": 1,
                "model": {"dropout": 0.1, "num_heads": 4, "num_queries": 9},
                "training": {"epochs": 1},
            },
            "lr=0.1 seed=1 num_heads=4 num_queries=9 +2",
        ),
    ],
)
def test_the_name_says_what_differs(changes: dict[str, object], name: str) -> None:
    assert run_name(texts(params(**changes)), texts(params())) == name


def test_the_name_has_a_bounded_length() -> None:
    name = run_name(texts(params(data={"path": "x" * 300})), texts(params()))
    assert len(name) == 80
    assert name.endswith("…")


def test_without_a_commit_the_defaults_are_the_baseline(tmp_path: Path) -> None:
    assert committed_params(tmp_path) is None
    changed = params(training={"epochs": 7})
    run = describe_run(changed, tmp_path, key="rk2-7", parts={}, tags={}, counts={})
    assert run.name == "epochs=7"


def commit(folder: Path, params: str) -> None:
    (folder / "params.yaml").write_text(params)
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)


@pytest.mark.parametrize("text", ["lr: [", "lr: 1\nrate: 2\n", "a"])
def test_committed_params_that_cannot_be_read_are_no_baseline(tmp_path: Path, text: str) -> None:
    commit(tmp_path, text)
    assert committed_params(tmp_path) is None


def test_the_baseline_is_what_git_has(tmp_path: Path) -> None:
    commit(tmp_path, "lr: 5e-5\nseed: 4\n")
    (tmp_path / "params.yaml").write_text("lr: 1\nseed: 4\n")
    committed = committed_params(tmp_path)
    assert committed is not None
    assert (committed.lr, committed.seed) == (5e-5, 4)


def test_the_data_set_has_dvcs_digest(tmp_path: Path) -> None:
    (tmp_path / "data.dvc").write_text("outs:\n- md5: abc.dir\n  path: data\n")
    dataset = read_dataset(tmp_path, "data/", {"train_images": 3})
    assert dataset is not None
    assert (dataset["name"], dataset["digest"]) == ("data", "abc.dir")
    assert json.loads(dataset["profile"]) == {"train_images": 3}
    assert read_dataset(tmp_path, "untracked", {}) is None


def test_the_key_and_its_parts_are_params(tmp_path: Path) -> None:
    parts = {"code": "c", "params": "p", "data": "d", "environment": "e"}
    run = describe_run(
        params(), tmp_path, key="rk2-7", parts=parts, tags={"device": "cpu"}, counts={}
    )
    assert run.params["key"] == "rk2-7"
    assert {run.params[f"key.{part}"] for part in parts} == {"c", "p", "d", "e"}
    assert run.params["lr"] == "0.001"
    assert run.params["data.short_sides"] == "[120]"
    assert not [name for name in run.params if name.startswith("runtime.")]
    assert run.tags["device"] == "cpu"


def test_the_description_says_what_differs_the_result_and_hints(tmp_path: Path) -> None:
    commit(tmp_path, "lr: 0.001\nseed: 4\n")
    changed = params(lr=0.002, seed=4, training={"epochs": 7})
    epochs = params().training.epochs
    run = describe_run(changed, tmp_path, key="rk2-7", parts={}, tags={}, counts={})
    differs = f"lr 0.001 -> 0.002, training.epochs {epochs} -> 7"
    assert run.tags[DIFFERS] == differs
    assert run.tags[NOTE] == f"Parameters that differ from the committed ones: {differs}."
    assert describe_in_words("none", "**AP 0.5**", ["it waits; raise workers"]) == (
        "**AP 0.5**\n\nParameters that differ from the committed ones: none.\n\n"
        "Hints:\n\n- it waits; raise workers"
    )


def test_a_description_that_a_user_changed_is_known() -> None:
    ours = note_tags("AP 0.5")
    assert not is_edited({})
    assert not is_edited(ours)
    assert is_edited(ours | {NOTE: "AP 0.5, the one for the paper"})
    assert is_edited({NOTE: "mine"})


@pytest.mark.parametrize(
    ("name", "changes", "copied"),
    [
        ("baseline", {"lr": 5e-5, "training": {"epochs": 12}}, "lr=5e-05 epochs=12"),
        ("baseline", {"lr": 0.001}, "rk2-7777777777"),  # other code or data
        ("lr=3", {"lr": 0.9}, "lr=3"),
    ],
)
def test_a_copy_is_no_baseline_here(name: str, changes: dict[str, object], copied: str) -> None:
    theirs = texts(params(**changes)) | {"key": "rk2-7", "key.code": "c", "gone.param": "1"}
    assert copied_name(name, "rk2-7777777777", theirs, params()) == copied
    assert copied_name(name, "rk2-7777777777", theirs, None) == name
