"""A training on a terminal: how far it is, its curves, its hints."""

from __future__ import annotations

import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from runkey.plots.hints import Hint, all_hints, told_hints
from runkey.plots.log import SAMPLES, GrowingLog, TrainingLog, read_samples
from runkey.progress import WIDTH
from runkey.training.progress import clock, epoch_line, pace_parts

# Line charts of characters: dots of Braille, or a plain mark for each curve.


Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Places and values; values that are not finite are left out."""
Cell = tuple[str, int | None]
"""A character, and the number of the curve that it belongs to; None: an axis or nothing."""

LABEL = 8
"""Characters left of a chart, for its largest and smallest value."""
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of the Braille block, by column and row of a character's dots."""
MARKS = "*+ox"
"""Of the first curve, the second one, ..."""


def chart(
    curves: Sequence[Curve], width: int, height: int, *, dots: bool = True
) -> list[list[Cell]]:
    """Draw curves on common axes; the vertical one begins at 0.

    Args:
        curves: what to draw; there may be none, and they may be empty.
        width: characters of a row, the labels included.
        height: rows.
        dots: whether the terminal shows Braille, and colours to tell the curves apart by.

    Returns:
        `height` rows of `width` cells.
    """
    columns = width - LABEL - 1
    good = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in curves]
    every = [y for _, y in good if len(y)]
    if not every or columns < 1:
        return _framed(_blank(columns, height), math.nan, math.nan, dots=dots)
    values, places = np.concatenate(every), np.concatenate([x for x, _ in good])
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    if high <= low:
        high = 1.0
    across, down = (2, 4) if dots else (1, 1)
    rows = _blank(columns, height)
    bits = np.zeros((height, columns), dtype=np.int64)
    begin, length = float(places.min()), float(np.ptp(places)) or 1.0
    for number, (x, y) in enumerate(good):
        dots_x = np.round((x - begin) / length * (across * columns - 1)).astype(int)
        dots_y = np.round((high - y) / (high - low) * (down * height - 1)).astype(int)
        for dot_x, dot_y in _joined(dots_x.tolist(), dots_y.tolist()):
            row, column = dot_y // down, dot_x // across
            if dots:
                bits[row, column] |= _DOTS[dot_x % 2][dot_y % 4]
                rows[row][column] = (chr(0x2800 + bits[row, column]), number)
            else:
                rows[row][column] = (MARKS[number % len(MARKS)], number)
    return _framed(rows, low, high, dots=dots)


def _joined(xs: Sequence[int], ys: Sequence[int]) -> Iterable[tuple[int, int]]:
    """All dots on the lines between points."""
    if len(xs) == 1:
        yield xs[0], ys[0]
    for (x, y), (next_x, next_y) in zip(
        zip(xs[:-1], ys[:-1], strict=True), zip(xs[1:], ys[1:], strict=True), strict=True
    ):
        steps = max(abs(next_x - x), abs(next_y - y), 1)
        for step in range(steps + 1):
            part = step / steps
            yield round(x + part * (next_x - x)), round(y + part * (next_y - y))


def _blank(columns: int, height: int) -> list[list[Cell]]:
    return [[(" ", None)] * max(0, columns) for _ in range(height)]


def _framed(rows: list[list[Cell]], low: float, high: float, *, dots: bool) -> list[list[Cell]]:
    """The rows with a vertical axis left of them, and its ends' values."""
    axis = "│" if dots else "|"
    framed = []
    for number, row in enumerate(rows):
        value = {0: high, len(rows) - 1: low}.get(number, math.nan)
        label = "" if math.isnan(value) else f"{value:.3g}"
        framed.append([(character, None) for character in f"{label:>{LABEL}}{axis}"] + row)
    return framed


# Follows the log of a training until the training ends.


PAUSE_SECONDS = 1.0


def follow(
    log: Path,
    title: str,
    params: Mapping[str, Any],
    is_alive: Callable[[], bool],
    say: Callable[[str], None],
    *,
    pause_seconds: float = PAUSE_SECONDS,
) -> bool:
    """Show a training until it ends: its curves on a terminal, lines elsewhere.

    Args:
        log: its JSONL file, which must be there.
        title: of the training: key and name.
        params: its parameters by dotted name, for hints; {} if they are not known.
        is_alive: whether somebody still writes the log.
        say: prints a line.
        pause_seconds: between two looks.

    Returns:
        Whether it came to its end; False: it was interrupted.
    """
    samples = log.with_name(SAMPLES)
    # The folder of a training goes when it is recorded; what is open can still be read.
    file = os.open(log, os.O_RDONLY)
    try:
        growing = GrowingLog(Path(f"/proc/self/fd/{file}"))
        if sys.stdout.isatty() and find_spec("rich"):
            with _drawing(title, params, samples) as show:
                return _until_it_ends(growing, is_alive, show, pause_seconds)
        say(title)
        teller = Teller(params, samples)

        def tell(log: TrainingLog) -> None:
            for line in teller.new_lines(log):
                say(line)

        return _until_it_ends(growing, is_alive, tell, pause_seconds)
    finally:
        os.close(file)


def _until_it_ends(
    growing: GrowingLog,
    is_alive: Callable[[], bool],
    show: Callable[[TrainingLog], None],
    pause_seconds: float,
) -> bool:
    while True:
        going = is_alive()  # before reading: what a trainer wrote last is read, too
        growing.update()
        show(growing.log)
        if ended(growing.log) or not going:
            return bool(ended(growing.log))
        time.sleep(pause_seconds)


@contextmanager
def _drawing(
    title: str, params: Mapping[str, Any], samples: Path
) -> Iterator[Callable[[TrainingLog], None]]:
    """Draws a log over what was drawn before."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    # Dots tell curves apart by colour alone; plain marks have a shape for each.
    dots = (
        console.encoding.lower().startswith("utf")
        and console.color_system is not None
        and not console.no_color
    )
    with Live(console=console, auto_refresh=False) as live:

        def show(log: TrainingLog) -> None:
            hints = all_hints(log, params, read_samples(samples))
            live.update(
                screen(
                    title,
                    log,
                    hints,
                    time.time(),
                    console.width,
                    console.height,
                    dots=dots,
                ),
                refresh=True,
            )

        yield show


# What a growing log says, as lines: one or two for each epoch, the hints, the end.


class Teller:
    """Tells what was added to a log since it was asked last."""

    def __init__(self, params: Mapping[str, Any], samples: Path) -> None:
        """Nothing has been told.

        Args:
            params: of the training, see `find_hints`.
            samples: of the machine; need not be there.
        """
        self._params, self._samples = params, samples
        self._epochs = 0
        self._hints: set[str] = set()
        self._started = self._ended = False

    def new_lines(self, log: TrainingLog) -> list[str]:
        """Lines about what is new, at most 100 columns wide."""
        lines: list[str] = []
        start = log.events.get("training_start")
        if start and not self._started:
            self._started = True
            lines.append(f"training on {start.get('device')}, {total_steps(log):,} steps")
        # A training that goes on after an interruption takes steps back.
        self._epochs = min(self._epochs, len(log.epochs))
        if self._epochs < len(log.epochs):
            for number in range(self._epochs, len(log.epochs)):
                lines += _epoch(log, number).split("\n")
            self._epochs = len(log.epochs)
            lines += self._new(all_hints(log, self._params, read_samples(self._samples)))
        lines += self._new(told_hints(log))  # of an epoch that was read a moment before them
        if (end := ended(log)) and not self._ended:
            self._ended = True
            lines += textwrap.wrap(end, WIDTH)
        return lines

    def _new(self, hints: Iterable[Hint]) -> list[str]:
        lines = []
        for hint in hints:
            if hint.kind not in self._hints:
                self._hints.add(hint.kind)
                lines += hint.lines
        return lines


def ended(log: TrainingLog) -> str:
    """How the training ended; empty while it goes on."""
    end = log.events.get("training_end")
    if not end:
        return ""
    return f"{end.get('reason')}; kept the weights of epoch {end.get('best_epoch')}"


def total_steps(log: TrainingLog) -> int:
    """Optimizer steps of the whole training; 0 if the log does not say."""
    return int(log.events.get("training_start", {}).get("total_steps", 0))


def last_step(log: TrainingLog) -> int:
    """The newest step that was logged; 0 before the first."""
    return max((points[-1].step for points in (log.steps, log.epochs) if points), default=0)


def seconds_left(log: TrainingLog, now: float) -> float:
    """Time that the steps to come take if they are like those of the last two epochs.

    Args:
        log: of the training.
        now: seconds since 1970.

    Returns:
        NaN if there is nothing to go by.
    """
    since = log.steps[-1].step - 2 * (log.steps_per_epoch or 0) if log.steps else 0
    recent = [point for point in log.steps if point.step >= since]
    if len(recent) < 2 or not total_steps(log):
        return math.nan
    pace = (recent[-1].seconds - recent[0].seconds) / (recent[-1].step - recent[0].step)
    left = (total_steps(log) - recent[-1].step) * pace - (now - recent[-1].seconds)
    return max(0.0, left)


def _epoch(log: TrainingLog, number: int) -> str:
    """The lines of an epoch, as the training itself prints them."""
    point = log.epochs[number]
    per_epoch = log.steps_per_epoch or point.step
    epochs = round(max(total_steps(log), last_step(log)) / per_epoch)
    seen = TrainingLog(log.steps, log.epochs[: number + 1])
    left = seconds_left(
        TrainingLog([p for p in log.steps if p.step <= point.step], [], log.events), point.seconds
    )
    finite = {name: value for name, value in point.values.items() if math.isfinite(value)}
    return epoch_line(
        round(point.step / per_epoch),
        epochs,
        finite,
        0.0 if math.isnan(left) else left,
        watched="val/AP",
        is_best="val/AP" in finite and seen.best_step() == point.step,
    )


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
