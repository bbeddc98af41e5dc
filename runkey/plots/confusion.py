"""Which class is taken for which, with the background."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray

from runkey.evaluation.confusion import Confusion
from runkey.plots.style import BLACK, drawing, say_nothing_yet

MOST_CLASSES = 20
MOST_LETTERS = 16
_BLUES = LinearSegmentedColormap.from_list("blues", ["#FFFFFF", "#8EC8EC", "#0072B2", "#003A63"])
_OTHERS = "other classes"


def confusion_matrix(counted: Confusion, names: list[str], path: Path) -> Path:
    """Draw counts, coloured by their share of the row.

    Of more than twenty classes those with the most faults are shown, the others as one.

    Args:
        counted: the counts.
        names: of the classes, in letters that the font has.
        path: the picture, PNG.
    """
    counts, labels = _most_confused(counted.counts, names)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    with drawing(path, panels=1, height=1.2 + 0.37 * len(counts)) as (_, (axes,)):
        axes.set_title(
            f"Which class was taken for which, at score {counted.threshold:.2f} and above"
        )
        if not counts.any():
            say_nothing_yet(axes, "no object and no detection")
            return path
        axes.imshow(shares, cmap=_BLUES, vmin=0, vmax=1, aspect="auto")
        size = 9 if len(counts) <= 12 else 7
        for row, column in zip(*np.nonzero(counts), strict=True):
            ink = "white" if shares[row, column] > 0.45 else BLACK
            text = f"{counts[row, column]:,}"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=ink)
        _name_axes(axes, labels)
    return path


def _name_axes(axes: Any, labels: list[str]) -> None:
    last = len(labels)
    short = [label if len(label) <= MOST_LETTERS else label[:15] + "…" for label in labels]
    axes.set_xticks(range(last + 1), [*short, "missed"])
    axes.set_yticks(range(last + 1), [*short, "background"])
    if last > 8 or max(map(len, short), default=0) > 8:
        axes.tick_params(axis="x", rotation=40)
        for label in axes.get_xticklabels():
            label.set_ha("right")
            label.set_rotation_mode("anchor")
    axes.set_xlabel("detected as (a match is IoU 0.5)")
    axes.set_ylabel("truth; colour: share of the row")
    axes.grid(visible=False)
    axes.axhline(last - 0.5, color=BLACK, linewidth=1)
    axes.axvline(last - 0.5, color=BLACK, linewidth=1)


def _most_confused(
    counts: NDArray[np.int64], names: list[str]
) -> tuple[NDArray[np.int64], list[str]]:
    """Counts and names of at most twenty classes, in their order, the others added up."""
    if len(names) <= MOST_CLASSES:
        return counts, names
    faults = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diag(counts)
    shown = sorted(np.argsort(-faults[:-1], kind="stable")[: MOST_CLASSES - 1].tolist())
    others = len(shown)
    place = np.full(len(counts), others)
    place[shown] = range(others)
    place[-1] = others + 1
    few = np.zeros((others + 2, others + 2), dtype=np.int64)
    np.add.at(few, (place[:, None], place[None]), counts)
    return few, [*(names[k] for k in shown), _OTHERS]
