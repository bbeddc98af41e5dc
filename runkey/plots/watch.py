"""`runkey watch`: follow a training on a terminal, by its log."""

from __future__ import annotations

import logging
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from runkey.plots.hints import Hint, all_hints, logged_hints
from runkey.plots.log import SAMPLES, GrowingLog, Series, TrainingLog, read_samples
from runkey.progress import WIDTH
from runkey.training.progress import clock, epoch_line, pace_parts

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 1.0
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

Curves = Sequence[tuple[str, str, bool]]
"""Name in the legend, name of the metric, whether it is logged at the end of epochs."""
_PANELS: Sequence[tuple[str, Curves]] = (
    (
        "loss",
        (
            ("train, each step", "train/loss", False),
            ("validation", "val/loss", True),
            ("train, epoch mean", "train/epoch_loss", True),
        ),
    ),
    ("validation AP", (("AP", "val/AP", True), ("AP50", "val/AP50", True))),
    ("learning rate", (("", "train/lr", False),)),
    (
        "gradient norm",
        (("before", "train/grad_norm", False), ("clipped", "train/grad_norm_clipped", False)),
    ),
    ("images per second", (("", "train/images_per_second", False),)),
    ("share of the time waiting for data", (("", "train/data_wait_share", False),)),
)


def follow(
    log: Path,
    title: str,
    params: Mapping[str, Any],
    is_alive: Callable[[], bool],
    *,
    pause_seconds: float = PAUSE_SECONDS,
) -> bool:
    """Show a training until it ends: its curves on a terminal, log messages elsewhere.

    Args:
        log: its JSONL file, which must exist.
        title: key and name of the training.
        params: its parameters by dotted name, for hints; {} if not known.
        is_alive: returns True while a process writes the log.
        pause_seconds: between two reads.

    Returns:
        True if the training ended; False if it was interrupted.
    """
    samples = log.with_name(SAMPLES)
    # A training's folder is removed once it is recorded; an open file can still be read.
    file = os.open(log, os.O_RDONLY)
    try:
        growing = GrowingLog(Path(f"/proc/self/fd/{file}"))
        if sys.stdout.isatty() and find_spec("rich"):
            with _live_screen(title, params, samples) as show:
                return _until_it_ends(growing, is_alive, show, pause_seconds)
        logger.info(title)
        news = News(params, samples)

        def show_news(log: TrainingLog) -> None:
            for line in news.lines(log):
                logger.info(line)

        return _until_it_ends(growing, is_alive, show_news, pause_seconds)
    finally:
        os.close(file)


def _until_it_ends(
    growing: GrowingLog,
    is_alive: Callable[[], bool],
    show: Callable[[TrainingLog], None],
    pause_seconds: float,
) -> bool:
    while True:
        alive = is_alive()  # before reading, so that the last lines are read, too
        growing.update()
        show(growing.log)
        if _ending(growing.log) or not alive:
            return bool(_ending(growing.log))
        time.sleep(pause_seconds)


@contextmanager
def _live_screen(
    title: str, params: Mapping[str, Any], samples: Path
) -> Iterator[Callable[[TrainingLog], None]]:
    """Yield a function that draws a log in place of what it drew before."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    # Braille dots need colours to tell curves apart; plain markers have a shape for each.
    dots = (
        console.encoding.lower().startswith("utf")
        and console.color_system is not None
        and not console.no_color
    )
    with Live(console=console, auto_refresh=False) as live:

        def show(log: TrainingLog) -> None:
            hints = all_hints(log, params, read_samples(samples))
            size = (console.width, console.height)
            live.update(screen(title, log, hints, time.time(), *size, dots=dots), refresh=True)

        yield show


class News:
    """What was added to a growing log, as lines: one or two for each epoch, hints, the end."""

    def __init__(self, params: Mapping[str, Any], samples: Path) -> None:
        """Begin with an empty log.

        Args:
            params: of the training, see `find_hints`.
            samples: of the machine; need not exist.
        """
        self._params, self._samples = params, samples
        self._epochs = 0
        self._hints: set[str] = set()
        self._started = self._ended = False

    def lines(self, log: TrainingLog) -> list[str]:
        """Return lines about what is new since the last call, at most 100 columns wide."""
        lines: list[str] = []
        start = log.events.get("training_start")
        if start and not self._started:
            self._started = True
            lines.append(f"training on {start.get('device')}, {total_steps(log):,} steps")
        # A training that resumes takes steps back.
        self._epochs = min(self._epochs, len(log.epochs))
        if self._epochs < len(log.epochs):
            for number in range(self._epochs, len(log.epochs)):
                lines += _epoch_lines(log, number)
            self._epochs = len(log.epochs)
            lines += self._new_hints(all_hints(log, self._params, read_samples(self._samples)))
        lines += self._new_hints(logged_hints(log))  # of an epoch that was read just before them
        if (end := _ending(log)) and not self._ended:
            self._ended = True
            lines += textwrap.wrap(end, WIDTH)
        return lines

    def _new_hints(self, hints: Iterable[Hint]) -> list[str]:
        lines = []
        for hint in hints:
            if hint.kind not in self._hints:
                self._hints.add(hint.kind)
                lines += hint.lines
        return lines


def total_steps(log: TrainingLog) -> int:
    """Return the optimizer steps of the whole training; 0 if they were not logged."""
    return int(log.events.get("training_start", {}).get("total_steps", 0))


def seconds_left(log: TrainingLog, now: float) -> float:
    """Estimate the remaining time from the pace of the last two epochs.

    Args:
        log: of the training.
        now: seconds since 1970.

    Returns:
        NaN if too few steps were logged.
    """
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
    end = log.events.get("training_end")
    if not end:
        return ""
    return f"{end.get('reason')}; saved the weights of epoch {end.get('best_epoch')}"


def _last_step(log: TrainingLog) -> int:
    return max((points[-1].step for points in (log.steps, log.epochs) if points), default=0)


def _epoch_lines(log: TrainingLog, number: int) -> list[str]:
    """Return the lines of an epoch, as the training itself logs them."""
    point = log.epochs[number]
    per_epoch = log.steps_per_epoch or point.step
    until = TrainingLog(log.steps, log.epochs[: number + 1])
    left = seconds_left(
        TrainingLog([p for p in log.steps if p.step <= point.step], [], log.events), point.seconds
    )
    finite = {name: value for name, value in point.values.items() if math.isfinite(value)}
    return epoch_line(
        round(point.step / per_epoch),
        round(max(total_steps(log), _last_step(log)) / per_epoch),
        finite,
        0.0 if math.isnan(left) else left,
        watched="val/AP",
        is_best="val/AP" in finite and until.best_step() == point.step,
    ).split("\n")


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
    """Return what is shown on a terminal.

    Args:
        title: key and name of the training.
        log: so far.
        hints: that it gives.
        now: seconds since 1970.
        width: columns of the terminal; at most 100 are used.
        height: its rows; a low terminal shows fewer charts.
        dots: draw curves of coloured Braille dots, else with a marker for each.
    """
    width = min(width, WIDTH)
    rows = _CHART_ROWS
    while rows > 1 and (height - _OTHER_ROWS) // rows < _LEAST_HEIGHT + 1:
        rows -= 1
    chart_height = min(8, max(_LEAST_HEIGHT, (height - _OTHER_ROWS) // rows - 1))
    grid = Table.grid(padding=(0, _GAP, 0, 0))
    chart_width = (width - 2 * _GAP) // 2
    for row in range(rows):
        panels = _PANELS[2 * row : 2 * row + 2]
        grid.add_row(*(_panel(log, one, chart_width, chart_height, dots=dots) for one in panels))
    lines = [Text(line) for hint in hints for line in hint.wrapped(width)]
    return Group(*_head(title, log, now, width, dots=dots), grid, *lines)


def _head(title: str, log: TrainingLog, now: float, width: int, *, dots: bool) -> list[Text]:
    step, total = _last_step(log), total_steps(log)
    done = round(_BAR * step / total) if total else 0
    full, empty = ("━", "─") if dots else ("#", "-")
    left = seconds_left(log, now)
    end = _ending(log)
    state = "" if step or end else "waiting for the first step"
    if step and not end and not math.isnan(left):
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
    log: TrainingLog, panel: tuple[str, Curves], width: int, height: int, *, dots: bool
) -> Text:
    name, curves = panel
    series = [
        log.of_epochs(metric) if at_ends else log.of_steps(metric) for _, metric, at_ends in curves
    ]
    text = Text(name, style="bold")
    for number, (label, _, _) in enumerate(curves):
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
    """Draw curves of characters on common axes; the vertical one includes 0.

    Args:
        curves: places and values; may be empty, and values that are not finite are left out.
        width: characters of a row, the labels included.
        height: rows.
        dots: draw Braille dots, four rows and two columns to a character.

    Returns:
        `height` rows of `width` cells.
    """
    columns = max(0, width - LABEL_WIDTH - 1)
    rows: list[list[Cell]] = [[(" ", None)] * columns for _ in range(height)]
    finite = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in curves]
    drawn = [y for _, y in finite if len(y)]
    if not drawn or not columns:
        return _with_axis(rows, math.nan, math.nan, dots=dots)
    values, places = np.concatenate(drawn), np.concatenate([x for x, _ in finite])
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    if high <= low:
        high = 1.0
    across, down = (2, 4) if dots else (1, 1)
    bits = np.zeros((height, columns), dtype=np.int64)
    begin, length = float(places.min()), float(np.ptp(places)) or 1.0
    for number, (x, y) in enumerate(finite):
        xs = np.round((x - begin) / length * (across * columns - 1)).astype(int)
        ys = np.round((high - y) / (high - low) * (down * height - 1)).astype(int)
        for dot_x, dot_y in _line_dots(xs.tolist(), ys.tolist()):
            row, column = dot_y // down, dot_x // across
            character = _MARKERS[number % len(_MARKERS)]
            if dots:
                bits[row, column] |= _DOTS[dot_x % 2][dot_y % 4]
                character = chr(0x2800 + bits[row, column])
            rows[row][column] = (character, number)
    return _with_axis(rows, low, high, dots=dots)


def _line_dots(xs: Sequence[int], ys: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield all dots on the lines between points."""
    points = list(zip(xs, ys, strict=True))
    yield from points[:1]
    for (x, y), (next_x, next_y) in pairwise(points):
        steps = max(abs(next_x - x), abs(next_y - y), 1)
        for step in range(1, steps + 1):
            part = step / steps
            yield round(x + part * (next_x - x)), round(y + part * (next_y - y))


def _with_axis(rows: list[list[Cell]], low: float, high: float, *, dots: bool) -> list[list[Cell]]:
    """Put a vertical axis with its lowest and highest value left of the rows."""
    axis = "│" if dots else "|"
    framed = []
    for number, row in enumerate(rows):
        value = {0: high, len(rows) - 1: low}.get(number, math.nan)
        label = "" if math.isnan(value) else f"{value:.3g}"
        framed.append([(character, None) for character in f"{label:>{LABEL_WIDTH}}{axis}"] + row)
    return framed
