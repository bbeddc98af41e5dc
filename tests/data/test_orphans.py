"""Loader processes end with the training, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAINER = """
import multiprocessing
import sys

from runkey.data.loader import BatchStream


class Maker:
    def __getitem__(self, request):
        return request


if __name__ == "__main__":
    stream = BatchStream(Maker(), workers=2, prefetch=2, pin_memory=False)
    answers = stream.batches(range(100))
    next(answers)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    sys.stdin.read()
"""


def stat(pid: int) -> list[str]:
    """State and parent of a process; empty if it is gone, or only waits to be asked for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return []
    return [] if fields[0] == "Z" else fields[:2]


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_none_outlives_a_training_that_is_killed(tmp_path: Path, by: signal.Signals) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    with subprocess.Popen(
        [sys.executable, script], cwd=Path(__file__).parents[2], env={"PYTHONPATH": "."},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as trainer:  # fmt: skip
        assert trainer.stdout
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2
        server = int(stat(workers[0])[1])
        assert server != trainer.pid
        trainer.send_signal(by)
    end = time.monotonic() + 30
    while left := [pid for pid in (*workers, server) if stat(pid)]:
        if time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"still there after 30 s: {left}")
        time.sleep(0.05)
