"""One trainer in a folder: real processes."""

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress

import pytest

from runkey.errors import TrainingError
from runkey.training.lock import LOCK, locked

HOLDER = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from runkey.training.lock import locked
    with locked(Path(sys.argv[1])):
        if sys.argv[2] == "worker" and os.fork() == 0:
            time.sleep(60)      # with all files of its parent open
        print("held", flush=True)
        time.sleep(60)
    """
)


@pytest.fixture
def hold(tmp_path):
    """Starts a process that holds the folder; afterwards it is ended, with what it started."""
    started = []

    def hold(kind="alone"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "folder"), kind],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.stdout.close()
        with suppress(ProcessLookupError):  # a test has killed them all
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_second_trainer_is_told_who_the_first_is(tmp_path, hold):
    first = hold()
    folder = tmp_path / "folder"
    with pytest.raises(TrainingError) as caught, locked(folder):
        pytest.fail("two trainers")
    text = str(caught.value)
    assert text.startswith(f"{folder}: process {first.pid} trains this key already; ")
    assert "`dvc repro`" in text
    assert "\n" not in text


@pytest.mark.parametrize("kind", ["alone", "worker"])
def test_a_killed_trainer_holds_nothing(tmp_path, hold, kind):
    first = hold(kind)
    first.send_signal(signal.SIGKILL)
    first.wait()
    if kind == "worker":
        os.killpg(first.pid, 0)  # its child lives, and has the lock's file open
    held = []
    with locked(tmp_path / "folder"):
        held.append(True)
    assert held


def test_it_can_be_taken_again(tmp_path, hold):
    for _ in range(2):
        with locked(tmp_path / "folder"):
            assert (tmp_path / "folder" / LOCK).is_file()
    assert hold()


def test_a_folder_that_cannot_be_made_holds_nobody_up(tmp_path, lines):
    (tmp_path / "file").touch()
    ran = []
    with locked(tmp_path / "file" / "folder"):
        ran.append(True)
    assert ran
    assert len(lines) == 1
    assert "cannot be written (Not a directory)" in lines[0]
