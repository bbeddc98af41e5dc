"""What happened on the way, marked on the curves: steps skipped, rollbacks, resumes, hints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.lines import Line2D

from runkey.plots.log import TrainingLog
from runkey.plots.style import BLACK, GREEN, ORANGE, PURPLE, SKY, VERMILLION


@dataclass(frozen=True, slots=True)
class _Kind:
    one: str
    many: str
    marker: str
    colour: str
    across: bool = False
    """Whether a line goes through the panels: what comes after it is another training."""


# Told apart by shape as well as by colour.
_KINDS = {
    "skipped_step": _Kind("skipped step", "skipped steps", "X", VERMILLION),
    "loss_spike": _Kind("loss spike", "loss spikes", "^", ORANGE),
    "rollback": _Kind("rollback", "rollbacks", "<", BLACK, across=True),
    "gave_up": _Kind("gave up", "gave up", "s", BLACK),
    "evaluation_failed": _Kind("failed evaluation", "failed evaluations", "v", SKY),
    "split": _Kind("batch split", "batch splits", "P", SKY),
    "resumed": _Kind("resumed", "resumed", ">", GREEN, across=True),
    "hint": _Kind("hint", "hints", "D", PURPLE),
}
_SIZE = 8


def mark_events(figure: Any, panels: Sequence[Any], log: TrainingLog) -> None:
    """Mark a training's events on the lower edge of panels over optimizer steps, if there are any.

    Args:
        figure: gets a line above all panels that names the marks, with how many there are.
        panels: axes.
        log: of the training.
    """
    handles = []
    for name, kind in _KINDS.items():
        steps = log.places.get(name)
        if not steps:
            continue
        for axes in panels:
            _mark(axes, sorted(steps), kind)
        label = kind.one if len(steps) == 1 else f"{len(steps):,} {kind.many}"
        handles.append(_handle(kind, label))
    if handles:
        figure.legend(
            handles=handles,
            loc="outside upper right",
            ncols=min(4, len(handles)),
            columnspacing=1.4,
            handletextpad=0.2,
            borderaxespad=0.15,
        )


def _mark(axes: Any, steps: Sequence[int], kind: _Kind) -> None:
    if kind.across:
        for step in steps:
            axes.axvline(step, color=kind.colour, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    # Edges below all marks: those of marks that stand close would hide them.
    for colour, size, order in (("white", _SIZE + 2, 5), (kind.colour, _SIZE, 6)):
        axes.plot(
            steps,
            [0.0] * len(steps),
            transform=axes.get_xaxis_transform(),  # steps across, the panel's edge below
            color=colour,
            marker=kind.marker,
            markersize=size,
            markeredgewidth=0,
            linestyle="none",
            clip_on=False,
            zorder=order,
        )


def _handle(kind: _Kind, label: str) -> Line2D:
    return Line2D(
        [],
        [],
        color=kind.colour,
        marker=kind.marker,
        markersize=_SIZE,
        linestyle="none",
        label=label,
    )
