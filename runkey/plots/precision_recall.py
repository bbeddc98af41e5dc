"""Precision over recall, of each class and at each IoU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.evaluation.files import read_precision_recall
from runkey.plots.fonts import drawable
from runkey.plots.style import (
    BLACK,
    CYCLE,
    GREY,
    drawing,
    legend_beside,
    say_nothing_yet,
    shades,
)

MOST_NAMED = 8
LINES = (*CYCLE[:7], GREY)  # a yellow line is hard to see on white


def precision_recall(curves: Path, path: Path) -> Path:
    """Draw the curves that `evaluate` wrote.

    Above: each class at IoU 0.5 (of more than eight classes, the best and the worst four by name).
    Below: the mean over classes at several IoU.

    Args:
        curves: evaluation/precision_recall.json.
        path: the picture, PNG.

    Raises:
        DataError: there is no such file.
    """
    content = read_precision_recall(curves)
    recall = np.array(content["recall"], dtype=np.float64)
    classes = [c for c in content["classes"] if c["precision"] is not None]
    with drawing(path, panels=2, height=3.1) as (_, (upper, lower)):
        upper.set_title("Precision over recall of each class, at IoU 0.5")
        lower.set_title("Mean of the classes, by IoU")
        if not classes:
            for axes in (upper, lower):
                say_nothing_yet(axes, "no class has objects in the held-out images")
            return path
        precision = np.array([c["precision"] for c in classes], dtype=np.float64)
        _draw_classes(upper, recall, precision[:, 0], [c["name"] for c in classes])
        _draw_ious(lower, recall, precision.mean(axis=0), content["iou"])
        for axes in (upper, lower):
            axes.set_xlim(0, 1.01)
            axes.set_ylim(0, 1.03)
            axes.set_ylabel("precision: share right")
        lower.set_xlabel("recall: share of the objects that are found")
    return path


def _draw_classes(
    axes: Any, recall: NDArray[np.float64], precision: NDArray[np.float64], names: list[str]
) -> None:
    ap50 = precision.mean(axis=1)
    order = np.argsort(-ap50, kind="stable")
    half = MOST_NAMED // 2
    named = order if len(names) <= MOST_NAMED else np.concatenate([order[:half], order[-half:]])
    for k in range(len(names)):
        if k not in named:
            axes.plot(recall, precision[k], color=GREY, alpha=0.25, linewidth=0.8)
    for colour, k in zip(LINES, named, strict=False):
        name = drawable(names[k], f"class number {k + 1}")
        short = name if len(name) <= 22 else name[:21] + "…"
        axes.plot(recall, precision[k], color=colour, label=f"{short}  {ap50[k]:.2f}")
    title = "class, AP50" if len(names) <= MOST_NAMED else f"best and worst {half}, AP50"
    legend_beside(axes, title)


def _draw_ious(
    axes: Any, recall: NDArray[np.float64], precision: NDArray[np.float64], ious: list[float]
) -> None:
    chosen = [t for t in range(len(ious)) if round(ious[t] * 100) % 10 == 0 or t == len(ious) - 1]
    for colour, t in zip(shades(len(chosen)), chosen, strict=True):
        axes.plot(
            recall, precision[t], color=colour, label=f"{ious[t]:.2f}  {precision[t].mean():.2f}"
        )
    axes.plot(
        recall,
        precision.mean(axis=0),
        color=BLACK,
        linestyle="--",
        label=f"mean  {precision.mean():.2f}",
    )
    legend_beside(axes, "IoU, AP")
