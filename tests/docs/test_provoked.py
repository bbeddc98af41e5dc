"""Provoke messages of docs/troubleshooting.md: the page quotes exactly what is printed."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from runkey.cli import app
from runkey.errors import RunkeyError
from runkey.evaluation.detections import DetectionArrays
from runkey.params import EarlyStopping, load_params
from runkey.params.render import render_preset
from runkey.training.device import choose_device
from runkey.training.schedule import check_watched, decide_stop
from runkey.training.step import Split
from tests.support.messages import flat

ROOT = Path(__file__).parents[2]
PAGE = flat((ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"))
SAMPLE = render_preset("sample")
Change = Callable[[Path], None]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that runkey takes for a checkout, the current one."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "params.yaml").write_text(SAMPLE, encoding="utf-8")
    for name in [name for name in os.environ if name.startswith(("DVC_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edited(*pairs: tuple[str, str]) -> Change:
    """Change lines of params.yaml."""

    def change(folder: Path) -> None:
        text = SAMPLE
        for old, new in pairs:
            assert text.count(f"\n{old}") == 1, old
            text = text.replace(f"\n{old}", f"\n{new}")
        (folder / "params.yaml").write_text(text, encoding="utf-8")

    return change


def typed(*words: str) -> Change:
    """Type a command of runkey's."""

    def run(_: Path) -> None:
        done = CliRunner().invoke(app, list(words))
        if done.exception is not None:
            raise done.exception

    return run


def both(*steps: Change) -> Change:
    return lambda folder: [step(folder) for step in steps] and None


def parameters(*pairs: tuple[str, str]) -> Change:
    return both(edited(*pairs), lambda folder: load_params(folder / "params.yaml") and None)


def without_params(folder: Path) -> None:
    (folder / "params.yaml").unlink()
    load_params(folder / "params.yaml")


def elsewhere(_: Path) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:1"
    try:
        typed("list")(Path())
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]


def no_number(_: Path) -> None:
    found = SimpleNamespace(scores=[math.nan], labels=[0], boxes_xyxy=[[0, 0, 1, 1]])
    DetectionArrays.from_images({17: found})


PROVOKED = {
    "unknown key": parameters(("  epochs: 26", "  epoch: 26")),
    "no number": parameters(("lr: 0.001", "lr: fast")),
    "three at once": parameters(
        ("  hidden_dim: 96", "  hidden_dim: 15"),
        ("  num_heads: 6", "  num_heads: 2"),
        ("  batch_size: 8", "  batch_size: 0"),
        ("  device: auto", "  device: gpu"),
    ),
    "no parameters": without_params,
    "no such preset": typed("preset", "balls"),
    "changed parameters": both(edited(("lr: 0.001", "lr: 0.002")), typed("preset", "sample")),
    "no such run": typed("show", "rk2-0000"),
    "no key": typed("show", "nothing"),
    "nothing trained": typed("watch"),
    "server away": elsewhere,
    "another metric": lambda _: (
        check_watched({"val/AP": 0.5, "val/AP50": 0.6, "val/AP75": 0.4, "val/loss": 1.0}, "val/mAP")
        and None
    ),
    "NaN predicted": no_number,
}


@pytest.mark.parametrize("change", PROVOKED.values(), ids=PROVOKED)
def test_it_is_said(change: Change, checkout: Path) -> None:
    with pytest.raises(RunkeyError) as caught:
        change(checkout)
    said = flat(f"error: {caught.value}".replace(f"{checkout}/", ""))
    assert said in PAGE


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, reason = choose_device("auto")
    assert f"device {device} ({reason})" in PAGE
    with pytest.raises(RunkeyError) as caught:
        choose_device("cuda")
    assert f"error: {caught.value}" in PAGE


def test_a_port_that_is_taken(checkout: Path) -> None:
    (checkout / "mlflow.db").touch()
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        with pytest.raises(RunkeyError) as caught:
            typed("ui", "--port", str(port))(checkout)
    assert f"error: {caught.value}".replace(f"port {port}", "port 5000") in PAGE


def test_what_a_step_and_a_training_say() -> None:
    split = Split(images=8, height=800, width=1333, limit=4 * 800 * 1333)
    assert f"step 3: {split.text}" in PAGE
    values = [*(0.1,) * 7, 0.4706, 0.47, 0.469, 0.468, 0.468, 0.467]
    reason = decide_stop(values, EarlyStopping())
    assert reason in PAGE


@pytest.fixture
def repository(tmp_path: Path) -> Callable[..., str]:
    """A git repository with DVC's folder and tracked data; runs commands there."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "GIT_"))}
    who = {
        f"GIT_{r}_{w}": "t@example.org" for r in ("AUTHOR", "COMMITTER") for w in ("NAME", "EMAIL")
    }
    environment |= who | {"DVC_NO_ANALYTICS": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        return done.stdout + done.stderr

    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_text("a")
    (tmp_path / "params.yaml").write_text("lr: 0.1\n")
    (tmp_path / "dvc.yaml").write_text("stages: {s: {cmd: 'true', params: [lr], deps: [data]}}\n")
    dvc = str(Path(sys.executable).with_name("dvc"))
    for command in (("git", "init", "-q"), (dvc, "init", "-q"), (dvc, "add", "-q", "data")):
        run(*command)
    run("git", "add", "-A")
    run("git", "commit", "-q", "-m", "start")
    return lambda *words: run(dvc, *words)


@pytest.mark.slow
def test_what_dvc_says(repository: Callable[..., str], tmp_path: Path) -> None:
    said = repository("exp", "run", "-S", "lrr=0.1")
    assert flat(said).split(" full_key")[0] in PAGE
    (tmp_path / "data/a.txt").unlink()
    (tmp_path / "data/a.txt").write_text("b")
    said = repository("checkout", "data.dvc")
    assert flat(said.splitlines()[0]) in PAGE
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(tmp_path / ".dvc/cache")
    assert flat(repository("repro").splitlines()[-1]) in PAGE
    said = flat(repository("pull", "data.dvc"))
    start = said.index("ERROR: failed to pull")
    assert said[start:].split(" <")[0] in PAGE
