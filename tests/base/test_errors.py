"""A stage's error: folded on a terminal, one line in a pipe or a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runkey.params.render import render_preset
from tests.support.terminal import COLUMNS, on_terminal, screen

REPOSITORY = Path(__file__).parents[2]
STAGE = [sys.executable, "-m", "stages.prepare"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder whose params.yaml has a misspelt name."""
    sample = render_preset("sample")
    assert sample.count("\n  epochs: ") == 1
    (tmp_path / "params.yaml").write_text(sample.replace("\n  epochs: ", "\n  epoch: "))
    for package in ("stages", "runkey"):
        (tmp_path / package).symlink_to(REPOSITORY / package)
    return tmp_path


def test_on_a_terminal_and_in_a_pipe(checkout: Path) -> None:
    done = subprocess.run(STAGE, cwd=checkout, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: params.yaml: unknown key training.epoch; did you mean")
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) > COLUMNS

    code, written = on_terminal(STAGE, cwd=checkout)
    lines = [line for line in screen(written) if line]
    assert code == 1
    assert len(lines) > 1
    assert max(map(len, lines)) <= COLUMNS
    assert all(line.startswith("  ") for line in lines[1:])
    assert " ".join(line.strip() for line in lines) == done.stderr.strip()


@pytest.mark.parametrize("stage", ["prepare", "profile_memory", "train", "evaluate"])
def test_a_python_without_the_packages_is_named(stage: str) -> None:
    """-S leaves the environment's packages out, as the system's Python does."""
    command = [sys.executable, "-S", "-m", f"stages.{stage}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {sys.executable}: no package pydantic; "
        "`source .venv/bin/activate` or `make repro`\n"
    )
