"""`runkey watch`: beside real processes that write a log, on a terminal and without one."""

from __future__ import annotations

import math
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from runkey.cli import app
from runkey.errors import RunkeyError
from runkey.plots.hints import all_hints
from runkey.plots.log import TrainingLog, read_log
from runkey.plots.watch import News, screen, seconds_left, total_steps
from tests.support.logs import LOGS
from tests.support.records import key_of, make_run

ROOT = Path(__file__).parents[2]
KEY = key_of("watched")
TRAINER = Path(__file__).with_name("watched_trainer.py")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with an empty store."""
    root = tmp_path / "checkout"
    (root / "stages").mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", root)
    return root


@pytest.fixture
def train(checkout: Path, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a process that writes a log of 12 epochs; returns when half of it is there."""
    started: list[subprocess.Popen[str]] = []

    def start(mode: str) -> subprocess.Popen[str]:
        log = LOGS["stopped early"](tmp_path / "source.jsonl")
        process = subprocess.Popen(
            [sys.executable, str(TRAINER), str(checkout / ".runkey" / KEY), str(log), mode],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "half\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "runkey", "watch", *arguments]


def environment(**more: str) -> dict[str, str]:
    kept = {n: v for n, v in os.environ.items() if n not in ("MLFLOW_TRACKING_URI", "DVC_ROOT")}
    return kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "LINES": "40"} | more


def watch(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=checkout,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_lines_until_it_ends(checkout, train):
    train("ends")
    done = watch(checkout, KEY[4:12])
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == KEY[:16]
    assert lines[1] == "training on cpu, 240 steps"
    epochs = [line.split()[1:3] for line in lines if line.startswith("epoch")]
    assert [" ".join(words) for words in epochs] == [
        *(f"{epoch}/12 loss" for epoch in range(1, 13)),
    ]
    assert lines[-1] == "early stop: best val/AP 0.64; saved the weights of epoch 8"
    assert max(map(len, lines)) <= 100
    assert len(lines) == len(set(lines))


def test_it_waits_for_a_pipeline_that_has_not_begun_to_train(checkout, tmp_path):
    """Not for what runs elsewhere, nor after the training."""
    (checkout / "stages/__init__.py").touch()
    late = "import runpy, sys, time\ntime.sleep(float(sys.argv.pop()))\n"
    late += f"runpy.run_path({str(TRAINER)!r}, None, '__main__')\n"
    for name in ("prepare", "train", "evaluate"):
        (checkout / f"stages/{name}.py").write_text(late)
    log = LOGS["stopped early"](tmp_path / "source.jsonl")
    shutil.copytree(checkout, tmp_path / "elsewhere")

    def start(folder: Path, stage: str, seconds: float) -> subprocess.Popen[bytes]:
        home = [str(folder / ".runkey" / KEY), str(log), "ends", str(seconds)]
        command = [sys.executable, "-m", f"stages.{stage}", *home]
        return subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL)

    with start(tmp_path / "elsewhere", "train", 60) as elsewhere, start(checkout, "train", 60) as a:
        with start(checkout, "evaluate", 60) as behind:
            done = watch(checkout)
            assert done.stderr.startswith(f"error: {checkout / '.runkey'}: nothing is trained here")
            assert (done.returncode, done.stdout) == (1, "")
            behind.kill()
        a.kill()
        with start(checkout, "train", 3.0):
            done = watch(checkout)
        elsewhere.kill()
    assert done.returncode == 0
    first, *others = done.stdout.splitlines()
    assert first == "the pipeline here has not begun to train; waiting for it (Ctrl-C leaves)"
    assert others[-1].startswith("early stopping") or "saved the weights" in others[-1]


def test_a_killed_training_ends_it_too(checkout, train):
    process = train("hangs")
    watching = subprocess.Popen(
        command(), cwd=checkout, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert watching.stdout
    assert watching.stdout.readline() == f"{KEY[:16]}\n"
    process.send_signal(signal.SIGKILL)
    said, _ = watching.communicate(timeout=60)
    assert watching.returncode == 3
    assert said.splitlines()[-1] == "interrupted; `dvc repro` goes on from its last checkpoint"


@pytest.mark.parametrize(
    ("more", "shown"),
    [({}, ("⣀", "\x1b[34m")), ({"NO_COLOR": "1"}, ("* train, each step", "+ validation"))],
    ids=["in colours", "without"],
)
def test_on_a_terminal_it_draws(checkout, train, more, shown):
    """Without colours each curve has a mark of its own, which its name shows."""
    train("ends")
    ours, theirs = pty.openpty()
    environ = environment(TERM="xterm-256color", **more)
    watching = subprocess.Popen(command(), cwd=checkout, env=environ, stdout=theirs)
    os.close(theirs)
    seen = b""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([ours], [], [], 1)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    assert watching.wait(10) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    for wanted in ("validation AP", "learning rate", "gradient norm", "step 240/240"):
        assert wanted in text
    for wanted in shown:
        assert wanted in seen.decode() or wanted in text
    assert "\x1b[" in seen.decode()  # drawn over
    assert ("\x1b[34m" in seen.decode()) == (not more)


def test_a_run_that_has_ended_is_shown_from_the_store(checkout, tmp_path):
    log = LOGS["complete"](tmp_path / "log.jsonl").read_bytes()
    params = {"key": KEY, "optimizer.clip.mode": "norm"}
    files = {"logs/train.jsonl": log}
    record = make_run(checkout, KEY, files=files, name="lr=5e-05", params=params)
    done = watch(checkout, KEY[:12])
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == f"{KEY[:16]}  lr=5e-05"
    assert done.stdout.splitlines()[-1] == "all 12 epochs done; saved the weights of epoch 8"
    assert watch(checkout, f"{KEY[:12]}:{record.run.run_id[:6]}").stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "nothing is trained here; `dvc repro` begins a training"),
        (("best",), "best: not a key"),
        (("abcd",), "abcd: no run of that key"),
        ((KEY,), f"{KEY[:16]}: RUNNING, and its log is not here but on elsewhere;"),
    ],
)
def test_nothing_to_watch(checkout, monkeypatch, arguments, says):
    make_run(
        checkout, KEY, with_details=False, status="RUNNING", tags={"key": KEY, "host": "elsewhere"}
    )
    monkeypatch.chdir(checkout)
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RunkeyError) as error:
        app(["watch", *arguments], standalone_mode=False)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", LOGS)
def test_every_log_can_be_watched(tmp_path, kind):
    log = read_log(LOGS[kind](tmp_path / "train.jsonl"))
    lines = News({}).lines(log)
    assert max(map(len, lines), default=0) <= 100
    left = seconds_left(log, time.time())
    assert math.isnan(left) == (len(log.steps) < 2 or not total_steps(log))
    for width, height, dots in ((100, 40, True), (120, 24, True), (60, 12, False)):
        colours = "standard" if dots else None
        console = Console(
            width=width, height=height, color_system=colours, record=True, file=_Nowhere()
        )
        hints = all_hints(log, {})
        console.print(screen("title", log, hints, 0.0, console))
        drawn = console.export_text().splitlines()
        assert max(len(line.rstrip()) for line in drawn) <= min(width, 100)
        heads = 3 + sum(len(hint.lines(width)) for hint in hints)
        assert len(drawn) <= height + 2 * heads


def test_an_epoch_tells_the_time_that_was_left():
    log = TrainingLog()
    log.add({"time": 0, "event": "training_start", "fields": {"device": "cpu", "total_steps": 40}})
    for step in range(1, 21):
        log.add({"step": step, "time": 2 * step, "values": {"train/epoch": step / 10}})
        if step % 10 == 0:
            values = {"train/epoch_loss": 5.0, "train/epoch": step / 10}
            log.add({"step": step, "time": 2 * step, "values": values})
    assert News({}).lines(log)[1:] == [
        "epoch 1/4  loss 5  left 1m00s",
        "epoch 2/4  loss 5  left 40s",
    ]


class _Nowhere:
    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass
