"""`runkey watch`: follow a training on a terminal, by its log."""

from __future__ import annotations

import logging
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import batched, groupby, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from runkey.files import open_plain
from runkey.plots.hints import Hint, all_hints, logged_hints
from runkey.plots.log import SAMPLES, GrowingLog, Point, Series, TrainingLog
from runkey.progress import WIDTH, escaped
from runkey.training.progress import clock, epoch_line, pace_parts
from runkey.units import counted

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 1.0
LABEL_WIDTH = 8
"""Characters left of a chart, for its largest and smallest value."""
Cell = tuple[str, int | None]
"""A character, and the index of the curve it belongs to; None: an axis or nothing."""
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of the Braille block, by column and row of a character's dots."""
_MARKERS = "*+ox"
"""Of the curves, where there are no colours to tell them apart."""
_COLOURS = ("blue", "yellow", "green")
_BAR, _GAP, _CHART_ROWS = 30, 2, 3
_OTHER_ROWS = 10
"""Rows of a terminal that are no charts: head, hints, prompt."""
_LEAST_HEIGHT = 5

_PANELS = {
    "loss": {
        "train/loss": "train, each step",
        "val/loss": "validation",
        "train/epoch_loss": "train, epoch mean",
    },
    "validation AP": {"val/AP": "AP", "val/AP50": "AP50"},
    "learning rate": {"train/lr": ""},
    "gradient norm": {"train/grad_norm": "before", "train/grad_norm_clipped": "clipped"},
    "images per second": {"train/images_per_second": ""},
    "share of the time waiting for data": {"train/data_wait_share": ""},
}
"""Legend by metric of each chart's curves."""


def follow(path: Path, title: str, params: Mapping[str, Any], is_alive: Callable[[], bool]) -> bool:
    """Show a training until it ends: its curves on a terminal, log messages elsewhere.

    Its log must exist; `is_alive` returns True while a process writes it. `params` are by dotted
    name, for hints; {} if not known. Return True if it ended, False if it was interrupted.
    """
    # A training's folder is removed once it is recorded; an open file can still be read.
    with open_plain(path) as file, _display(title, params) as show:
        growing = GrowingLog(Path(f"/proc/self/fd/{file.fileno()}"), path.with_name(SAMPLES))
        while True:
            alive = is_alive()  # before reading, so that the last lines are read, too
            growing.update()
            show(growing.log)
            if _ending(growing.log) or not alive:
                return bool(_ending(growing.log))
            time.sleep(_PAUSE_SECONDS)


@contextmanager
def _display(title: str, params: Mapping[str, Any]) -> Iterator[Callable[[TrainingLog], None]]:
    """Yield what shows a log: a screen that is drawn anew, or where there is no terminal, news."""
    if not sys.stdout.isatty():
        logger.info(title)
        yield News(params).show
        return
    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False) as live:

        def show(log: TrainingLog) -> None:
            hints = all_hints(log, params)
            live.update(screen(title, log, hints, time.time(), console), refresh=True)

        yield show


class News:
    """What was added to a growing log, as lines: one or two for each epoch, hints, the end."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params
        self._epochs = 0
        self._shown: set[str] = set()

    def lines(self, log: TrainingLog) -> list[str]:
        """Return lines about what is new since the last call, at most 100 columns wide."""
        lines: list[str] = []
        if start := log.last_event("training_start"):
            text = f"training on {start.get('device')}, {counted(f'{total_steps(log):,}', 'step')}"
            lines += self._once("start", [text])
        new = range(self._epochs, len(log.epochs))
        self._epochs = len(log.epochs)  # fewer than before if another training began
        for number in new:
            lines += _epoch_lines(log, number)
        for hint in all_hints(log, self._params) if new else logged_hints(log):
            lines += self._once(f"hint {hint.kind}", hint.lines())
        if end := _ending(log):
            lines += self._once("end", textwrap.wrap(end, WIDTH))
        return lines

    def show(self, log: TrainingLog) -> None:
        """Log what is new."""
        for line in self.lines(log):
            logger.info(line)

    def _once(self, what: str, lines: list[str]) -> list[str]:
        is_new = what not in self._shown
        self._shown.add(what)
        return lines if is_new else []


def total_steps(log: TrainingLog) -> int:
    """Return the optimizer steps of the whole training; 0 if they were not logged."""
    total = log.last_event("training_start").get("total_steps", 0)
    return total if isinstance(total, int) and 0 <= total < 1e12 else 0


def seconds_left(log: TrainingLog, now: float) -> float:
    """Estimate the remaining time from the pace of the last two epochs; NaN after too few steps."""
    since = log.steps[-1].step - 2 * (log.steps_per_epoch or 0) if log.steps else 0
    recent = [point for point in log.steps if point.step >= since]
    if len(recent) < 2 or not total_steps(log):
        return math.nan
    first, last = recent[0], recent[-1]
    seconds_per_step = (last.seconds - first.seconds) / (last.step - first.step)
    left = (total_steps(log) - last.step) * seconds_per_step - (now - last.seconds)
    return max(0.0, left)


def _ending(log: TrainingLog) -> str:
    """Return how the training ended; empty while it runs."""
    end = log.last_event("training_end")
    if not end:
        return ""
    return f"{end.get('reason')}; saved the weights of epoch {end.get('best_epoch')}"


def _finite(point: Point) -> dict[str, float]:
    return {name: value for name, value in point.values.items() if math.isfinite(value)}


def _epoch_lines(log: TrainingLog, number: int) -> list[str]:
    """Return the lines of an epoch, as the training itself logs them."""
    point = log.epochs[number]
    per_epoch = log.steps_per_epoch or point.step
    until = TrainingLog(log.steps, log.epochs[: number + 1])
    steps = [p for p in log.steps if p.step <= point.step]
    left = seconds_left(TrainingLog(steps, events=log.events), point.seconds)
    finite = _finite(point)
    return epoch_line(
        round(point.step / per_epoch),
        round(max(total_steps(log), log.last_step) / per_epoch),
        finite,
        0.0 if math.isnan(left) else left,
        watched="val/AP",
        is_best="val/AP" in finite and until.best_step() == point.step,
    ).split("\n")


def screen(
    title: str, log: TrainingLog, hints: Sequence[Hint], now: float, console: Console
) -> RenderableType:
    """Return what is shown on a terminal; a low one shows fewer charts."""
    width = min(console.width, WIDTH)
    # Braille dots need colours to tell curves apart; plain markers have a shape for each.
    has_colours = console.color_system is not None and not console.no_color
    dots = has_colours and console.encoding.lower().startswith("utf")
    free = console.height - _OTHER_ROWS
    rows = min(_CHART_ROWS, max(1, free // (_LEAST_HEIGHT + 1)))
    size = (width - 2 * _GAP) // 2, min(8, max(_LEAST_HEIGHT, free // rows - 1))
    grid = Table.grid(padding=(0, _GAP, 0, 0))
    for names in islice(batched(_PANELS, 2), rows):
        grid.add_row(*(_panel(log, name, *size, dots=dots) for name in names))
    lines = [Text(escaped(line)) for hint in hints for line in hint.lines(width)]
    return Group(*_head(title, log, now, width, dots=dots), grid, *lines)


def _head(title: str, log: TrainingLog, now: float, width: int, *, dots: bool) -> list[Text]:
    step, total = log.last_step, total_steps(log)
    done = round(_BAR * step / total) if total else 0
    full, empty = ("━", "─") if dots else ("#", "-")
    left, end = seconds_left(log, now), _ending(log)
    waiting = "" if math.isnan(left) else f"left {clock(left)}"
    state = "" if end else waiting if step else "waiting for the first step"
    per_epoch = log.steps_per_epoch
    epoch = f"epoch {step / per_epoch:.1f}/{total / per_epoch:.0f}  " if per_epoch and total else ""
    progress = Text.assemble(
        (full * done, "green"), empty * (_BAR - done), f"  {epoch}step {step:,}/{total:,}  {state}"
    )
    finite = _finite(log.steps[-1]) if log.steps else {}
    head = [
        Text(escaped(title), style="bold"),
        progress,
        Text("  ".join(pace_parts(finite, "train/loss"))),
    ]
    for text in head:
        text.truncate(width, overflow="ellipsis" if dots else "crop")
    return [*head, *(Text(line) for line in textwrap.wrap(escaped(end), width))]


def _panel(log: TrainingLog, name: str, width: int, height: int, *, dots: bool) -> Text:
    curves = _PANELS[name]
    series = [log.series(metric) for metric in curves]
    text = Text(name, style="bold")
    for number, label in enumerate(curves.values()):
        if label and len(series[number][0]):
            mark = "" if dots else f"{_MARKERS[number]} "
            text.append(f"  {mark}{label}", style=f"not bold {_COLOURS[number]}")
    text.truncate(width)
    for row in chart(series, width, height, dots=dots):
        text.append("\n", style="not bold")
        for index, cells in groupby(row, key=lambda cell: cell[1]):
            style = "not bold" if index is None else f"not bold {_COLOURS[index]}"
            text.append("".join(character for character, _ in cells), style=style)
    return text


def chart(
    curves: Sequence[Series], width: int, height: int, *, dots: bool = True
) -> list[list[Cell]]:
    """Draw curves in rows of `width` characters, labels included; the vertical axis includes 0.

    Curves may be empty; values that are not finite are left out. With `dots` they are drawn with
    Braille dots, four rows and two columns to a character.
    """
    columns = max(0, width - LABEL_WIDTH - 1)
    rows: list[list[Cell]] = [[(" ", None)] * columns for _ in range(height)]
    labels = [""] * height
    finite = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in curves]
    values = np.hstack([[0.0], *(y for _, y in finite)])
    if len(values) > 1 and columns:
        low, high = float(values.min()), float(values.max()) if values.any() else 1.0
        labels[0], labels[-1] = f"{high:.3g}", f"{low:.3g}"
        _draw_curves(rows, finite, low, high, dots=dots)
    axis = "│" if dots else "|"
    return [
        [*((character, None) for character in f"{label:>{LABEL_WIDTH}}{axis}"), *row]
        for label, row in zip(labels, rows, strict=True)
    ]


def _draw_curves(
    rows: list[list[Cell]], curves: Sequence[Series], low: float, high: float, *, dots: bool
) -> None:
    height, columns = len(rows), len(rows[0])
    across, down = (2, 4) if dots else (1, 1)
    bits = np.zeros((height, columns), dtype=np.int64)
    places = np.hstack([x for x, _ in curves])
    begin, length = float(places.min()), float(np.ptp(places)) or 1.0
    for number, (x, y) in enumerate(curves):
        xs = np.round((x - begin) / length * (across * columns - 1)).astype(int)
        ys = np.round((high - y) / (high - low) * (down * height - 1)).astype(int)
        points = list(zip(xs.tolist(), ys.tolist(), strict=True))
        # A line from each point to the next one, and a dot at the first.
        for (x0, y0), (x1, y1) in pairwise([*points[:1], *points]):
            steps = max(abs(x1 - x0), abs(y1 - y0), 1)
            for part in (step / steps for step in range(1, steps + 1)):
                dot_x, dot_y = round(x0 + part * (x1 - x0)), round(y0 + part * (y1 - y0))
                row, column = dot_y // down, dot_x // across
                character = _MARKERS[number % len(_MARKERS)]
                if dots:
                    bits[row, column] |= _DOTS[dot_x % 2][dot_y % 4]
                    character = chr(0x2800 + bits[row, column])
                rows[row][column] = (character, number)
