"""The script of a Slurm task: exit codes, and what it does with the signals that Slurm sends.

A real Slurm runs it in tests/e2e/test_engines.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.sweep.executor import Trial
from runkey.sweep.slurm import write_batch
from tests.support.project import wait_for

TRIALS = [
    Trial("rk2-1", "0123abc", ("lr=0.1",)),
    Trial("rk2-2", "0123abc", ("model.backbone=timm:a b's",)),
    Trial("rk2-3", "0123abc", (), wait=False),
]
# Stands in for `python -m runkey`: says what it was asked, then waits or ends as the test wants.
RUNKEY = """\
import os, signal, sys, time
def stop(*_):
    print("stopped", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print(sys.argv[1:], flush=True)
if os.environ["CODE"] == "wait":
    time.sleep(60)
sys.exit(int(os.environ["CODE"]))
"""


class Task:
    """A task of an array, started without Slurm."""

    def __init__(self, folder: Path, code: str, *, index: int = 1, restarts: str = "") -> None:
        self.batch, self.index = folder / "batch", index
        self.batch.mkdir(exist_ok=True)
        (folder / "runkey").mkdir(exist_ok=True)
        (folder / "runkey/__init__.py").touch()
        (folder / "runkey/__main__.py").write_text(RUNKEY)
        scontrol = folder / "scontrol"
        scontrol.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\n')
        scontrol.chmod(0o755)
        self.asked = folder / "asked"
        write_batch(self.batch, TRIALS, ["--job-name=x"])
        environment = {
            "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_ARRAY_TASK_ID": str(index),
            "SLURM_ARRAY_JOB_ID": "17",
            "SLURM_RESTART_COUNT": restarts,
            "CODE": code,
        }
        self.out = folder / "out"
        with self.out.open("w") as out:
            command = ["sh", str(self.batch / "script")]
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out)

    def send(self, number: int) -> None:
        wait_for(lambda: "trial" in self.out.read_text(), "the trial", 60)
        self.process.send_signal(number)

    @property
    def code(self) -> str:
        """What the file says that the executor reads; "" if there is none."""
        self.process.wait(60)
        file = self.batch / f"{self.index}.code"
        return file.read_text().strip() if file.is_file() else ""


@pytest.mark.parametrize("code", ["0", "1", "143"])
def test_an_exit_code_is_kept_for_the_executor(tmp_path: Path, code: str) -> None:
    task = Task(tmp_path, code)
    assert task.code == code
    assert task.process.returncode == int(code)
    assert not task.asked.exists()
    arguments = ["trial", "0123abc", "-S", "model.backbone=timm:a b's", "--wait"]
    assert task.out.read_text() == f"{arguments}\n"


def test_code_75_asks_for_another_start_up_to_five_times(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    task = Task(tmp_path / "first", "75")
    assert task.code == ""
    assert task.asked.read_text() == "requeue 17_1\n"
    (tmp_path / "last").mkdir()
    last = Task(tmp_path / "last", "75", index=0, restarts="5")
    assert last.code == "75"
    assert not last.asked.exists()


def test_after_the_loss_of_its_node_it_waits_for_the_claim_of_the_dead(tmp_path: Path) -> None:
    asked = ["trial", "0123abc", "--no-wait"]
    lost = Task(tmp_path, "0", index=2, restarts="1")
    assert lost.code == "0"
    assert lost.out.read_text() == f"{[*asked, '--wait']}\n"
    # But not where it asked for another start itself.
    assert Task(tmp_path, "75", index=2).code == ""
    again = Task(tmp_path, "0", index=2, restarts="1")
    assert again.code == "0"
    assert again.out.read_text() == f"{asked}\n"


def test_before_its_time_is_over_it_stops_the_trial_and_asks_for_more(tmp_path: Path) -> None:
    task = Task(tmp_path, "wait")
    task.send(signal.SIGUSR1)
    assert task.code == ""
    assert task.asked.read_text() == "requeue 17_1\n"
    assert "stopped" in task.out.read_text()


def test_a_cancelled_task_stops_the_trial_and_is_not_started_again(tmp_path: Path) -> None:
    task = Task(tmp_path, "wait")
    task.send(signal.SIGTERM)
    assert task.code == "143"
    assert not task.asked.exists()
    assert "stopped" in task.out.read_text()
