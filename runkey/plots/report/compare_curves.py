"""Curves of several runs on one axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.plots.fonts import drawable
from runkey.plots.log import TrainingLog
from runkey.plots.style import BLACK, CYCLE, YELLOW, drawing, legend_beside, say_nothing_yet

_COLOURS = [colour for colour in CYCLE if colour != YELLOW]
_PANELS = (
    ("AP of held-out images", "AP, 0 to 1", "val/AP"),
    ("Loss of held-out images", "loss, per object", "val/loss"),
    ("Loss of training, mean of each epoch", "loss, per object", "train/epoch_loss"),
    ("Learning rate", "rate per step", "train/lr"),
)
_MOST_LETTERS = 34


def compare_curves(runs: Sequence[tuple[str, TrainingLog]], path: Path) -> Path:
    """Draw AP, losses and learning rate of runs over epochs, a colour a run.

    Args:
        runs: names and logs; a log may be empty.
        path: the picture, PNG.
    """
    with drawing(path, panels=len(_PANELS), height=1.9) as (_, panels):
        for axes, (title, label, metric) in zip(panels, _PANELS, strict=True):
            axes.set_title(title)
            drawn = [_draw(axes, log, metric, number) for number, (_, log) in enumerate(runs)]
            if not any(drawn):
                say_nothing_yet(axes)
                continue
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            if metric == "train/lr":
                axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")
        for number, (name, _) in enumerate(runs):
            panels[0].plot([], [], color=_colour(number), linestyle=_dash(number), label=_cut(name))
        legend_beside(panels[0])
        panels[-1].set_xlabel("epoch")
    return path


def _draw(axes: Any, log: TrainingLog, metric: str, number: int) -> bool:
    """One run's curve, with a star at the weights that it kept; False if it has none."""
    epochs, values = _by_epoch(log, metric)
    if not np.isfinite(values).any():
        return False
    marker = "o" if len(epochs) <= 40 else ""
    axes.plot(
        epochs,
        values,
        color=_colour(number),
        linestyle=_dash(number),
        marker=marker,
        markersize=3,
    )
    best = log.best_step()
    per_epoch = log.steps_per_epoch
    if metric == "val/AP" and best is not None and per_epoch:
        at = np.argmin(np.abs(epochs - best / per_epoch))
        axes.plot(
            epochs[at],
            values[at],
            color=_colour(number),
            marker="*",
            markersize=13,
            markeredgecolor=BLACK,
            markeredgewidth=0.6,
            zorder=5,
        )
    return True


def _by_epoch(log: TrainingLog, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Epochs, whole or not, and the values at them: runs may differ in steps an epoch."""
    steps, values = log.of_steps(metric) if metric == "train/lr" else log.of_epochs(metric)
    return steps / (log.steps_per_epoch or 1.0), values


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _dash(number: int) -> str:
    return ("-", "--", ":", "-.")[number // len(_COLOURS) % 4]


def _cut(name: str) -> str:
    text = drawable(name, "run")
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"
