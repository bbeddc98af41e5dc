"""A training on a terminal: how far it is, its curves, its hints."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from runkey.plots.hints import Hint
from runkey.plots.log import TrainingLog
from runkey.plots.watch.chart import MARKS, Cell, Curve, chart
from runkey.plots.watch.tell import ended, last_step, seconds_left, total_steps
from runkey.progress import WIDTH
from runkey.training.progress import clock, pace_parts

_STYLES = ("blue", "yellow", "green")
_BAR = 30
_GAP = 2
_ROWS = 3
"""Of panels, two in each."""
_BESIDES = 10
"""Rows of a terminal that are not charts: heads, the hints, the prompt."""
_LEAST_HEIGHT = 5

Lines = Sequence[tuple[str, str, bool]]
"""Name in the legend, name of the metric, whether it is one of the epochs' ends."""
_PANELS: Sequence[tuple[str, Lines]] = (
    (
        "loss",
        (
            ("train, a step", "train/loss", False),
            ("held-out", "val/loss", True),
            ("train, epoch", "train/epoch_loss", True),
        ),
    ),
    ("AP of held-out images", (("AP", "val/AP", True), ("AP50", "val/AP50", True))),
    ("learning rate", (("", "train/lr", False),)),
    (
        "gradient norm",
        (("before", "train/grad_norm", False), ("clipped", "train/grad_norm_clipped", False)),
    ),
    ("images per second", (("", "train/images_per_second", False),)),
    ("share of the time waiting for data", (("", "train/data_wait_share", False),)),
)


def screen(
    title: str,
    log: TrainingLog,
    hints: Sequence[Hint],
    now: float,
    width: int,
    height: int,
    *,
    dots: bool,
) -> RenderableType:
    """What is shown now.

    Args:
        title: of the training: key and name.
        log: as far as it is.
        hints: that it gives.
        now: seconds since 1970.
        width: columns of the terminal; at most 100 are used.
        height: its rows; of low terminals, fewer charts are drawn.
        dots: whether curves are coloured dots of Braille; else each has a mark of its own.
    """
    width = min(width, WIDTH)
    rows = _ROWS
    while rows > 1 and (height - _BESIDES) // rows < _LEAST_HEIGHT + 1:
        rows -= 1
    chart_height = min(8, max(_LEAST_HEIGHT, (height - _BESIDES) // rows - 1))
    lines = [Text(line) for hint in hints for line in hint.wrapped(width)]
    grid = Table.grid(padding=(0, _GAP, 0, 0))
    panel_width = (width - 2 * _GAP) // 2
    for row in range(rows):
        panels = _PANELS[2 * row : 2 * row + 2]
        grid.add_row(
            *(_panel(log, panel, panel_width, chart_height, dots=dots) for panel in panels)
        )
    return Group(*_head(title, log, now, width, dots=dots), grid, *lines)


def _head(title: str, log: TrainingLog, now: float, width: int, *, dots: bool) -> list[Text]:
    step, total = last_step(log), total_steps(log)
    done = round(_BAR * step / total) if total else 0
    full, empty = ("━", "─") if dots else ("#", "-")
    left = seconds_left(log, now)
    end = ended(log)
    state = "" if step or end else "waiting for the first step"
    if not state and not end and not math.isnan(left):
        state = f"left {clock(left)}"
    per_epoch = log.steps_per_epoch
    epoch = f"epoch {step / per_epoch:.1f}/{total / per_epoch:.0f}  " if per_epoch and total else ""
    progress = Text.assemble(
        (full * done, "green"), empty * (_BAR - done), f"  {epoch}step {step:,}/{total:,}  {state}"
    )
    values = log.steps[-1].values if log.steps else {}
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    head = [Text(title, style="bold"), progress, Text("  ".join(pace_parts(finite, "train/loss")))]
    for text in head:
        text.truncate(width, overflow="ellipsis" if dots else "crop")
    return [*head, *(Text(line) for line in textwrap.wrap(end, width))]


def _panel(
    log: TrainingLog, panel: tuple[str, Lines], width: int, height: int, *, dots: bool
) -> Text:
    name, lines = panel
    curves: list[Curve] = [
        log.of_epochs(metric) if at_ends else log.of_steps(metric) for _, metric, at_ends in lines
    ]
    text = Text(name, style="bold")
    for number, (label, _, _) in enumerate(lines):
        if label and len(curves[number][0]):
            mark = "" if dots else f"{MARKS[number]} "
            text.append(f"  {mark}{label}", style=f"not bold {_STYLES[number]}")
    text.truncate(width)
    for row in chart(curves, width, height, dots=dots):
        text.append("\n", style="not bold")
        for character, style in _runs(row):
            text.append(character, style=style)
    return text


def _runs(row: Sequence[Cell]) -> list[tuple[str, str]]:
    """Neighbours of one style together."""
    runs: list[tuple[str, str]] = []
    for character, number in row:
        style = "not bold" if number is None else f"not bold {_STYLES[number]}"
        if runs and runs[-1][1] == style:
            runs[-1] = (runs[-1][0] + character, style)
        else:
            runs.append((character, style))
    return runs
