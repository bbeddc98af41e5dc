"""Ctrl-C while an entry point still imports: one line and exit code 130."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STAGES = ["prepare", "profile_memory", "train", "evaluate"]


def interrupted_in(tmp_path: Path, imported: str, *arguments: str) -> tuple[int, str, str]:
    """Run `python -m` with a module that sends the process SIGINT when it is imported."""
    module = f"import os, signal, time\nos.kill(os.getpid(), {int(signal.SIGINT)})\ntime.sleep(9)\n"
    (tmp_path / f"{imported}.py").write_text(module)
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("imported", "arguments"),
    [
        *(("ruamel", [f"stages.{stage}"]) for stage in STAGES),  # at the top of a stage's file
        ("torch", ["stages.profile_memory"]),  # where it begins to work
        ("typer", ["runkey", "list"]),
        ("torch", ["runkey", "memory"]),
        ("rich", ["runkey", "watch"]),
    ],
)
def test_one_line(tmp_path: Path, imported: str, arguments: list[str]) -> None:
    assert interrupted_in(tmp_path, imported, *arguments) == (130, "", "interrupted\n")


def test_a_python_without_the_packages_is_named() -> None:
    command = [sys.executable, "-S", "-m", "runkey", "list"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {sys.executable}: no package typer; `source .venv/bin/activate` or `make repro`\n"
    )
