"""Timeline of the memory in use during a training step, as PNG and as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.memory.predict import Prediction
from runkey.memory.trace.events import CLASSES, Timeline, Trace, timeline_of
from runkey.plots import style
from runkey.units import GIB, MIB, counted

# From below: what stays allocated, then what is allocated and freed.
_LAYERS = (
    ("parameters", ("parameter", "buffer"), style.BLUE),
    ("optimizer", ("optimizer",), style.SKY),
    ("libraries", ("library",), style.GREY),
    ("gradients", ("gradient",), style.ORANGE),
    ("input", ("input",), style.YELLOW),
    ("activations", ("activation",), style.GREEN),
    ("temporary", ("temporary",), style.VERMILLION),
)
_COLUMNS = 500
_LEAST_WIDTH = 0.07
"""Of a phase, as a part of the picture: the optimizer allocates next to nothing."""
_FAR = 2.5
"""A level more than this many times the peak is written in the title, not drawn."""


def draw_step(
    prediction: Prediction, images: int, folder: Path, budget_gib: float | None
) -> list[Path]:
    """Draw the memory of a predicted step by class and phase, its upper bound and the budget.

    The step has a micro-batch of `images`; `timeline.png` and `timeline.svg` go into the folder.
    """
    model = prediction.model
    height, width = model.shapes.worst_of(images)
    levels = {"upper bound": float(model.gpu.upper(images))}
    if budget_gib is not None:
        levels[f"budget {budget_gib:g} GiB"] = budget_gib * GIB
    title = (
        f"Memory of a training step: {counted(images, 'image')} of {height} x {width}, "
        f"{model.precision}, on a GPU"
    )
    timeline = timeline_of(_in_fixed_order(prediction.trace(images)))
    paths = [folder / f"timeline{suffix}" for suffix in (".png", ".svg")]
    for path in paths:
        with style.drawing(path, "", height=4.4) as (axes,):
            _draw(axes, timeline, title, levels)
    return paths


def _in_fixed_order(trace: Trace) -> Trace:
    """Sort the frees between two allocations of a phase by block.

    When autocast ends, torch frees its copies of the weights in the order of their addresses'
    hashes, which differs from process to process.
    """
    starts = {mark.start for mark in trace.marks}
    begins = (event.kind == "alloc" or i in starts for i, event in enumerate(trace.events))
    ordered = sorted(zip(accumulate(begins), trace.events, strict=True))
    return replace(trace, events=tuple(event for _, event in ordered))


def _draw(axes: Any, timeline: Timeline, title: str, levels: Mapping[str, float]) -> None:
    """Draw a step and some levels, in bytes by label."""
    unit, name, digits = (GIB, "GiB", 2) if timeline.peak_bytes >= GIB else (MIB, "MiB", 1)
    positions, starts = _positions(timeline)
    events = _drawn_events(timeline, positions)
    _draw_layers(axes, positions[events], timeline.live[:, events] / unit)
    peak = top = timeline.peak_bytes / unit
    dashes = iter(("--", ":"))
    for text, level in levels.items():
        if level > _FAR * timeline.peak_bytes:
            title += f"\n{text}: {level / timeline.peak_bytes:,.0f} x the peak"
        else:
            look = {"color": style.BLACK, "linestyle": next(dashes), "linewidth": 1.3}
            axes.axhline(level / unit, **look, label=text)
            top = max(top, level / unit)
    place = positions[events][int(timeline.total[events].argmax())]
    mark = {"color": style.BLACK, "marker": "v", "markersize": 6, "zorder": 5}
    axes.plot([place], [peak], **mark, linestyle="none")
    offset, side = (-6, "right") if place >= 0.8 else (6, "left")
    look = {"textcoords": "offset points", "ha": side, "fontsize": 9}
    axes.annotate(f"peak {peak:.{digits}f} {name}", (place, peak), (offset, 5), **look)
    axes.set(title=title, ylim=(0, top * 1.25), ylabel=f"allocated, {name}")
    _draw_phases(axes, timeline, [*positions[starts].tolist(), 1.0])
    handles, labels = (found[::-1] for found in axes.get_legend_handles_labels())
    axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), borderaxespad=0.8)


def _draw_layers(axes: Any, places: NDArray[np.float64], live: NDArray[np.float64]) -> None:
    """Stack the layers that hold anything of `live` [classes, E] at `places` [E], 0 to 1.

    A point at which neither edge of a layer changes is left out, to keep the SVG small.
    """
    below = np.zeros_like(places)
    for label, classes, colour in _LAYERS:
        above = below + live[[CLASSES.index(one) for one in classes]].sum(0)
        if (above > below).any():
            changes = (np.diff(below, prepend=np.nan) != 0) | (np.diff(above, prepend=np.nan) != 0)
            changes[-1] = True
            edges = (places[changes], below[changes], above[changes])
            axes.fill_between(*edges, label=label, color=colour, step="post", linewidth=0)
        below = above


def _positions(timeline: Timeline) -> tuple[NDArray[np.float64], list[int]]:
    """Return where each event lies, 0 to 1, and the first event of each phase.

    Phases are as wide as they have events, but not too narrow.
    """
    count = len(timeline.total)
    starts = [0, *(mark.start for mark in timeline.marks[1:])]
    lengths = np.diff([*starts, count]).astype(float)
    widths = np.maximum(lengths / lengths.sum(), _LEAST_WIDTH)
    ends = np.concatenate(([0.0], widths.cumsum() / widths.sum()))
    return np.interp(np.arange(count), [*starts, count], ends), starts


def _drawn_events(timeline: Timeline, positions: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the event with most bytes of each column of the picture."""
    column = np.minimum((positions * _COLUMNS).astype(np.int64), _COLUMNS - 1)
    order = np.lexsort((timeline.total, column))
    last = np.flatnonzero(np.diff(column[order], append=_COLUMNS))
    return np.sort(order[last])


def _draw_phases(axes: Any, timeline: Timeline, edges: Sequence[float]) -> None:
    look = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top", "fontsize": 9}
    for number, (left, right) in enumerate(pairwise(edges)):
        if number % 2:
            axes.axvspan(left, right, color=style.PALE, zorder=0)
        look["rotation"] = 90 if right - left < 0.1 else 0
        axes.text((left + right) / 2, 0.98, timeline.marks[number].phase, **look)
        axes.axvline(right, color=style.GREY, linewidth=0.6)
    axes.set(xlim=(0, 1), xticks=[], xlabel="allocations and frees in order; time is not to scale")
    axes.grid(visible=False, axis="x")
