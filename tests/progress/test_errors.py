"""Errors as users see them: folded on a terminal, one line in a pipe or a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.terminal import COLUMNS, on_terminal, screen

REPOSITORY = Path(__file__).parents[2]
TEXT = (
    "data/annotations/instances_train.json: image 1 (a.jpg), annotation 102: box [20, 5, -3.5, 6] "
    "has a negative side; set data.checks.negative_box: fix or drop in params.yaml or mend the file"
)
PROGRAM = (
    "from runkey.errors import DataError, report_errors\n"
    "with report_errors():\n"
    f"    raise DataError({TEXT!r})\n"
)


def test_a_terminal_shows_an_error_folded_between_words() -> None:
    code, written = on_terminal([sys.executable, "-c", PROGRAM], cwd=REPOSITORY)
    lines = screen(written)
    assert code == 1
    assert len(lines) == 2
    assert max(map(len, lines)) <= COLUMNS
    assert lines[1].startswith("  ")
    assert " ".join(" ".join(lines).split()) == f"error: {TEXT}"


def test_a_pipe_gets_an_error_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, f"error: {TEXT}\n")
