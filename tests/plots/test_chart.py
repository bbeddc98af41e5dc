"""Charts of characters."""

from __future__ import annotations

import numpy as np
import pytest

from runkey.plots.watch import LABEL_WIDTH, chart


def text(rows) -> list[str]:
    return ["".join(character for character, _ in row) for row in rows]


def line(*values):
    return np.arange(len(values), dtype=float), np.array(values, dtype=float)


def test_a_straight_line_with_marks():
    rows = text(chart([line(0, 1, 2, 3)], LABEL_WIDTH + 1 + 4, 4, dots=False))
    assert rows == [
        "       3|   *",
        "        |  * ",
        "        | *  ",
        "       0|*   ",
    ]


def test_a_straight_line_in_braille():
    rows = text(chart([line(*range(8))], LABEL_WIDTH + 1 + 4, 2))
    assert rows == ["       7│  ⡠⠊", "       0│⡠⠊  "]


def test_two_curves_are_told_apart():
    rows = chart([line(0, 0), line(5, 5)], LABEL_WIDTH + 1 + 10, 3, dots=False)
    assert {number for row in rows for _, number in row} == {0, 1, None}
    assert text(rows)[0].endswith("+" * 10)
    assert text(rows)[-1].endswith("*" * 10)


@pytest.mark.parametrize(
    "curves",
    [[], [line()], [line(np.nan, np.inf)], [line(3)], [line(0, 0)], [line(-2, 1)], [line(1e-9, 1)]],
)
@pytest.mark.parametrize("width", [5, 20, 49])
@pytest.mark.parametrize("dots", [True, False])
def test_any_curve_keeps_to_its_place(curves, width, dots):
    rows = text(chart(curves, width, 5, dots=dots))
    assert len(rows) == 5
    assert {len(row) for row in rows} == {max(width, LABEL_WIDTH + 1)}
