"""A sweep as parallel coordinates, and how much each of its parameters matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray

from runkey.plots.style import cut, drawing

_LEAST_POINTS = 6
"""Below that a forest says nothing about the parameters."""
_TREES = 200


def importance(points: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> dict[str, float]:
    """Return the share of each parameter that varies, largest first; {} of too few points.

    It is the decrease of the squared error by a random forest's splits on it (mean decrease in
    impurity, Breiman 2001), the shares adding up to 1.
    """
    names = [name for name in varying(points) if len(points) >= _LEAST_POINTS]
    if len(names) < 2 or len(set(scores)) < 2:
        return {}
    from sklearn.ensemble import RandomForestRegressor  # 1 s

    columns = np.stack([places([p.get(n) for p in points])[0] for n in names], axis=1)
    forest = RandomForestRegressor(_TREES, random_state=0).fit(columns, scores)
    shares = zip(names, map(float, forest.feature_importances_), strict=True)
    return dict(sorted(shares, key=lambda item: -item[1]))


def varying(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the parameters that are not the same in all points."""
    names = dict.fromkeys(name for point in points for name in point)
    return [n for n in names if len({str(point.get(n)) for point in points}) > 1]


def places(values: Sequence[Any]) -> tuple[NDArray[np.float64], list[tuple[float, str]]]:
    """Return where values lie on an axis from 0 to 1, and its ticks.

    Positive numbers over more than a factor of 10 lie on a logarithmic axis; what is no number has
    one place for each value.
    """
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        numbers = np.array(values, dtype=float)
        low, high = numbers.min(), numbers.max()
        is_log = low > 0 and high / low > 10
        scaled = np.log(numbers) if is_log else numbers
        span = np.ptp(scaled) or 1.0
        heights = (scaled - scaled.min()) / span
        known = sorted(set(zip(heights.tolist(), numbers.tolist(), strict=True)))
        shown = known if len(known) <= 6 else [known[0], known[-1]]
        return heights, [(height, f"{number:.4g}") for height, number in shown]
    kinds = sorted({str(value) for value in values})
    step = 1 / max(len(kinds) - 1, 1)
    heights = np.array([kinds.index(str(value)) * step for value in values])
    return heights, [(index * step, kind) for index, kind in enumerate(kinds)]


def draw_sweep(path: Path, points: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> None:
    """Draw a line for each point over the axes of its parameters and of AP, coloured by AP."""
    names = [*varying(points), "AP"]
    columns = [places([p.get(n) for p in points]) for n in names[:-1]] + [places(list(scores))]
    colours = colormaps["viridis"](columns[-1][0])
    with drawing(path, "AP by parameters", height=4.5) as [axes]:
        for row in np.argsort(scores):  # the best on top
            heights = [column[0][row] for column in columns]
            axes.plot(range(len(names)), heights, color=colours[row], marker="o", markersize=3)
        for place, (_, ticks) in enumerate(columns):
            axes.axvline(place, color="black", linewidth=0.8)
            for height, text in ticks:
                axes.annotate(
                    cut(text, 16), (place, height), xytext=(4, 2), textcoords="offset points"
                )
        axes.set_xticks(range(len(names)), names)
        axes.set(yticks=[], xlim=(-0.1, len(names) - 0.6))
        axes.grid(visible=False)
