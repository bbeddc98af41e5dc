"""AP by the size of objects: of all classes together and of each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.evaluation.files import read_metrics
from runkey.plots.fonts import drawable
from runkey.plots.style import BLACK, BLUE, GREEN, ORANGE, PALE, drawing, legend, say_nothing_yet

MOST_CLASSES = 20
SIZES = {
    "small": ("small, to 32² px", ORANGE, "o"),
    "medium": ("medium, to 96² px", GREEN, "s"),
    "large": ("large", BLUE, "D"),
}


def ap_by_size(metrics: Path, path: Path) -> Path:
    """Draw AP of small, medium and large objects, with how many there are.

    Of more than twenty classes the worst are shown.

    Args:
        metrics: evaluation/metrics.json.
        path: the picture, PNG.

    Raises:
        DataError: there is no such file.
    """
    content = read_metrics(metrics)
    classes = {name: c for name, c in content["per_class"].items() if c["AP"] is not None}
    worst = sorted(classes, key=lambda name: classes[name]["AP"])[:MOST_CLASSES]
    shown = [name for name in classes if name in worst]
    height = max(3.4, 0.9 + 0.27 * len(shown))
    with drawing(path, panels=1, height=height, columns=2) as (_, (left, right)):
        left.set_title("AP by size of the object")
        right.set_title("" if shown else "Each class")
        if not shown:
            for axes in (left, right):
                say_nothing_yet(axes, "no class has objects in the held-out images")
            return path
        _draw_all(left, content)
        _draw_classes(right, {name: classes[name] for name in shown})
        if len(shown) < len(classes):
            right.set_xlabel(f"AP, 0 to 1; the worst {len(shown)} of {len(classes)} classes")
        for axes, limit in ((left, left.set_ylim), (right, right.set_xlim)):
            limit(0, 1.03)
            axes.spines["left"].set_visible(axes is left)
    return path


def _draw_all(axes: Any, content: dict[str, Any]) -> None:
    values = np.array([_value(content.get(f"AP_{size}")) for size in SIZES])
    colours = [colour for _, colour, _ in SIZES.values()]
    axes.bar(range(len(SIZES)), np.nan_to_num(values), color=colours, width=0.6)
    for place, value in enumerate(values):
        text = f"{value:.3f}" if math.isfinite(value) else "none there"
        at = (place, value if math.isfinite(value) else 0.0)
        axes.annotate(
            text,
            at,
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    objects = {
        size: sum(_objects(c, size) for c in content["per_class"].values()) for size in SIZES
    }
    axes.axhline(
        _value(content["AP"]), color=BLACK, linestyle="--", linewidth=1.2, label="AP of all"
    )
    axes.set_xticks(
        range(len(SIZES)),
        [f"{size}\n{objects[size]:,} objects" for size in SIZES],
    )
    axes.set_ylabel("AP, 0 to 1")
    axes.grid(visible=False, axis="x")
    legend(axes)


def _draw_classes(axes: Any, classes: dict[str, dict[str, Any]]) -> None:
    rows = np.arange(len(classes))
    by_size = {
        size: np.array([_value(c["by_size"].get(size, {}).get("AP")) for c in classes.values()])
        for size in SIZES
    }
    every = np.array(list(by_size.values()))
    axes.barh(rows, _spread(every), left=_lowest(every), height=0.16, color=PALE, zorder=1)
    for size, (label, colour, marker) in SIZES.items():
        axes.scatter(by_size[size], rows, color=colour, marker=marker, s=30, label=label, zorder=3)
    names = [drawable(name, f"class {row + 1}") for row, name in enumerate(classes)]
    axes.set_yticks(rows, [name if len(name) <= 18 else name[:17] + "…" for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("AP, 0 to 1")
    axes.grid(visible=False, axis="y")
    legend(axes)


def _lowest(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[sizes, K] -> [K]; 0 for a class without any."""
    lowest: NDArray[np.float64] = np.where(np.isnan(values), np.inf, values).min(axis=0)
    return np.where(np.isfinite(lowest), lowest, 0.0)


def _spread(values: NDArray[np.float64]) -> NDArray[np.float64]:
    highest: NDArray[np.float64] = np.nan_to_num(values).max(axis=0)
    return highest - _lowest(values)


def _objects(of_class: dict[str, Any], size: str) -> int:
    return int(of_class["by_size"].get(size, {}).get("objects", 0))


def _value(number: float | None) -> float:
    return math.nan if number is None else float(number)
