"""Progress of long steps: bars on a terminal, which is a real one here, and lines elsewhere."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runkey import progress as module
from runkey.progress import each, log_to_terminal, progress
from tests.support.terminal import COLUMNS
from tests.support.terminal import on_terminal as run_on_terminal

REPOSITORY = Path(__file__).parents[2]


def on_terminal(code: str) -> str:
    """What a program writes to a terminal of 100 columns."""
    exit_code, written = run_on_terminal([sys.executable, "-c", code], cwd=REPOSITORY)
    assert exit_code == 0, written
    return written


def without_colour(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_a_terminal_shows_a_bar_which_goes_and_lines_that_stay() -> None:
    written = on_terminal(
        "import time\n"
        "from runkey.progress import progress\n"
        "with progress('evaluate', 4, 'images') as steps:\n"
        "    steps.advance(2)\n"
        "    print('a result', flush=True)\n"
        "    with progress('get', 3e6, 'bytes') as inner:\n"
        "        inner.advance(1.5e6, 'model/weights.pt')\n"
        "        time.sleep(0.3)\n"
        "print('the end')\n"
    )
    text = without_colour(written)
    assert "evaluate ━" in text
    assert "2/4 images" in text
    assert "get 1.5/3.0 MB  model/weights.pt" in text
    assert "a result" in text
    # The last thing before the end is that the bar's line is erased.
    assert re.search(r"\x1b\[2K(\x1b\[\?25h\r)?the end\s*$", written)


def test_training_fits_a_terminal_of_100_columns() -> None:
    written = on_terminal(
        "import time\n"
        "from runkey.progress import progress\n"
        "from runkey.training.progress import bar_text\n"
        "values = {'train/loss': 14.51, 'train/grad_norm': 0.4123, 'train/lr': 8.1e-4,\n"
        "          'train/images_per_second': 1052.13, 'train/data_wait_share': 0.12}\n"
        "with progress('train', 1000, lines=False) as steps:\n"
        "    steps.advance(350, bar_text(values, 3700), 'epoch 35/100')\n"
        "    time.sleep(0.3)\n"
    )
    shown = [line for line in re.split(r"[\r\n]+", without_colour(written)) if "35/100" in line]
    assert shown
    assert max(map(len, shown)) <= COLUMNS
    assert "35%" in shown[-1]
    assert shown[-1].rstrip().endswith("left 1h01m")


def test_no_terminal_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress("evaluate", 4, "images") as steps:
        steps.advance(2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(module, "EVERY_SECONDS", 0.0)
    with progress("evaluate", 4, "images") as steps:
        steps.advance(2)
        steps.advance(2)  # all: the step itself says what came out
    with progress("get", 3e6, "bytes") as steps:
        steps.advance(1.5e6, "model/weights.pt")
    with progress("train", 10, lines=False) as steps:
        steps.advance(5)
    assert capsys.readouterr() == (
        "",
        "evaluate: 2/4 images\nget: 1.5/3.0 MB  model/weights.pt\n",
    )


def test_what_a_stage_tells_is_never_wider_than_100_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log_to_terminal()
    logger = logging.getLogger("runkey.stage")
    logger.info("a short line\n  an indented one")
    logger.info("early stop: " + ", ".join(f"word{n}" for n in range(40)))
    logger.info("  " + "x" * 120)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["a short line", "  an indented one"]
    assert lines[3].startswith("  word")
    assert max(map(len, lines[:-1])) <= 100
    assert lines[-1].strip() == "x" * 120  # a path, say, is not broken


def test_a_loop_hands_out_its_items(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY_SECONDS", 0.0)
    assert list(each("predict", ["a", "b", "c"], "settings")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "predict: 1/3 settings\npredict: 2/3 settings\n"


def test_bars_can_be_unwanted() -> None:
    written = on_terminal(
        "from runkey.progress import progress, want_bars\n"
        "want_bars(False)\n"
        "with progress('evaluate', 4, 'images') as steps:\n"
        "    steps.advance(2)\n"
    )
    assert written == ""


def test_importing_it_costs_nothing() -> None:
    code = "import sys, runkey.progress; print('rich' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
