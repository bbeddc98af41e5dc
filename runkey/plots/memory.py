"""What is alive during a training step: one picture, as PNG and as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.memory.memory_model import GIB, MIB
from runkey.memory.predict import Prediction
from runkey.memory.timeline import Timeline, timeline_of
from runkey.memory.trace.tracker import CLASSES
from runkey.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    SKY,
    VERMILLION,
    YELLOW,
    drawing,
)

# From below: what stays, then what comes and goes.
_LAYERS = (
    ("parameters", ("parameter", "buffer"), BLUE),
    ("optimizer", ("optimizer",), SKY),
    ("libraries", ("library",), GREY),
    ("gradients", ("gradient",), ORANGE),
    ("input", ("input",), YELLOW),
    ("activations", ("activation",), GREEN),
    ("temporary", ("temporary",), VERMILLION),
)
_COLUMNS = 500
_LEAST_WIDTH = 0.07
"""Of a phase, as a part of the whole: the optimizer allocates next to nothing."""
_FAR = 2.5
"""A line further above the peak than this many times is told in words."""


def draw_step(
    prediction: Prediction, images: int, folder: Path, budget_gib: float | None
) -> list[Path]:
    """Draw a predicted step with its bound and the budget.

    Args:
        prediction: of the training.
        images: micro-batch.
        folder: see `write_memory_picture`.
        budget_gib: `memory.budget_gib`, if it is a number.
    """
    model = prediction.model
    height, width = model.census.worst_of(images)
    lines = [("upper bound", float(model.gpu.upper(images)))]
    if budget_gib is not None:
        lines.append((f"budget {budget_gib:g} GiB", budget_gib * GIB))
    return write_memory_picture(
        timeline_of(prediction.trace(images)),
        folder,
        title=f"Memory of a training step: {images} images of {height} x {width}, "
        f"{model.precision}, on a GPU",
        lines=lines,
    )


def write_memory_picture(
    timeline: Timeline, folder: Path, *, title: str, lines: Sequence[tuple[str, float]] = ()
) -> list[Path]:
    """Draw memory by class over a step, with bands for its phases.

    Args:
        timeline: the step.
        folder: where `timeline.png` and `timeline.svg` go.
        title: what was traced.
        lines: levels to draw, each a text and bytes.

    Returns:
        The written files.
    """
    paths = [folder / f"timeline{suffix}" for suffix in (".png", ".svg")]
    for path in paths:
        with drawing(path, panels=1, height=4.4) as (_, (axes,)):
            _draw(axes, timeline, title, lines)
    return paths


def _draw(axes: Any, timeline: Timeline, title: str, lines: Sequence[tuple[str, float]]) -> None:
    unit, name = (GIB, "GiB") if timeline.peak_bytes >= GIB else (MIB, "MiB")
    events, places = _columns(timeline)
    heights = [
        timeline.live[[CLASSES.index(c) for c in classes]][:, events].sum(0) / unit
        for _, classes, _ in _LAYERS
    ]
    _draw_layers(axes, places, heights)
    top = timeline.peak_bytes / unit
    near = [(text, level) for text, level in lines if level <= _FAR * timeline.peak_bytes]
    for (text, level), style in zip(near, ("--", ":", "-."), strict=False):
        axes.axhline(level / unit, color=BLACK, linestyle=style, linewidth=1.3, label=text)
        top = max(top, level / unit)
    far = [
        f"{text}: {level / timeline.peak_bytes:,.0f} x the peak"
        for text, level in lines
        if (text, level) not in near
    ]
    _mark_peak(axes, timeline, events, places, unit, name)
    axes.set_title("\n".join([title, *far]))
    axes.set_ylim(0, top * 1.25)
    axes.set_ylabel(f"alive, {name}")
    _bands(axes, timeline)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), borderaxespad=0.8
    )


def _draw_layers(
    axes: Any, places: NDArray[np.float64], heights: Sequence[NDArray[np.float64]]
) -> None:
    """Stack the layers that hold anything.

    A point where neither edge of a layer moves is left out: an SVG's size is that of its points.
    """
    below = np.zeros_like(places)
    for (label, _, colour), height in zip(_LAYERS, heights, strict=True):
        if not height.max() > 0:
            continue
        above = below + height
        moves = (np.diff(below, prepend=np.nan) != 0) | (np.diff(above, prepend=np.nan) != 0)
        moves[-1] = True
        axes.fill_between(
            places[moves],
            below[moves],
            above[moves],
            label=label,
            color=colour,
            step="post",
            linewidth=0,
        )
        below = above


def _columns(timeline: Timeline) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Which events are drawn and where, 0 to 1: in every column, the one with most alive."""
    total = timeline.total
    at = _positions(timeline)
    column = np.minimum((at * _COLUMNS).astype(np.int64), _COLUMNS - 1)
    order = np.lexsort((total, column))
    last = np.flatnonzero(np.diff(column[order], append=_COLUMNS))
    events = np.sort(order[last])
    return events, at[events]


def _positions(timeline: Timeline) -> NDArray[np.float64]:
    """Where each event lies, 0 to 1: phases as wide as they are long, but not too narrow."""
    count = len(timeline.total)
    starts = _starts(timeline)
    lengths = np.diff([*starts, count]).astype(float)
    widths = np.maximum(lengths / lengths.sum(), _LEAST_WIDTH)
    ends = np.concatenate(([0.0], widths.cumsum() / widths.sum()))
    return np.interp(np.arange(count), [*starts, count], ends)


def _starts(timeline: Timeline) -> list[int]:
    """First event of each phase."""
    return [0, *(mark.start for mark in timeline.marks[1:])]


def _bands(axes: Any, timeline: Timeline) -> None:
    """A shade and a name for each phase."""
    at = _positions(timeline)
    edges = [*(float(at[start]) for start in _starts(timeline)), 1.0]
    for number, (left, right) in enumerate(pairwise(edges)):
        if number % 2:
            axes.axvspan(left, right, color=PALE, zorder=0)
        name = timeline.marks[number].phase
        axes.text(
            (left + right) / 2,
            0.98,
            name,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=9,
            rotation=90 if right - left < 0.1 else 0,
        )
        axes.axvline(right, color=GREY, linewidth=0.6)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("allocations and frees in their order; time is not to scale")


def _mark_peak(
    axes: Any,
    timeline: Timeline,
    events: NDArray[np.int64],
    places: NDArray[np.float64],
    unit: int,
    name: str,
) -> None:
    """Say how much the peak is, where it is."""
    place = places[int(timeline.total[events].argmax())]
    level = timeline.peak_bytes / unit
    axes.plot([place], [level], color=BLACK, marker="v", markersize=6, linestyle="none", zorder=5)
    axes.annotate(
        f"{level:.2f} {name}" if unit == GIB else f"{level:.1f} {name}",
        (place, level),
        (6, 5) if place < 0.8 else (-6, 5),
        textcoords="offset points",
        ha="left" if place < 0.8 else "right",
        fontsize=9,
    )
