"""Line charts of characters: dots of Braille, or a plain mark for each curve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

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
