"""Gradient norms before and after clipping, and the share that is clipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.plots.events import mark_events
from runkey.plots.log import TrainingLog
from runkey.plots.steps import marker, step_axis
from runkey.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    VERMILLION,
    drawing,
    legend,
    plain_log_scale,
    say_nothing_yet,
)

# Rounding makes a clipped norm differ a little from the norm; clipping makes it differ more.
_CLIPPED = 1.001


def gradient_norm(log: TrainingLog, path: Path) -> Path:
    """Joint gradient norm before and after clipping, and the share of steps that were clipped."""
    steps, before = log.of_steps("train/grad_norm")
    after_steps, after = log.of_steps("train/grad_norm_clipped")
    with drawing(path, panels=2, height=2.7) as (figure, (norms, shares)):
        norms.set_title("Gradient norm and clipping")
        if not len(steps) or len(steps) != len(after_steps):
            for axes in (norms, shares):
                say_nothing_yet(axes)
            return path
        clipped = before > after * _CLIPPED
        norms.plot(steps, before, color=VERMILLION, alpha=0.3, linewidth=1)
        norms.plot(
            steps,
            _smooth(before),
            color=VERMILLION,
            label="before clipping, median of 9",
            marker=marker(steps),
            markersize=4,
        )
        norms.plot(
            steps,
            after,
            color=BLUE,
            label="after",
            marker=marker(steps),
            markersize=4,
        )
        _draw_threshold(norms, log)
        if (before[np.isfinite(before)] > 0).any():
            plain_log_scale(norms)
        norms.set_ylabel("2-norm of all gradients")
        legend(norms)

        share_steps, share = _share_by_epoch(log, steps, clipped)
        shares.plot(share_steps, 100 * share, color=GREEN, marker=marker(share_steps), markersize=4)
        shares.set_title(f"Clipped: {clipped.mean():.0%} of the logged steps")
        shares.set_ylabel("steps clipped, %")
        shares.set_ylim(-4, 104)
        step_axis(shares, log)
        mark_events(figure, (norms,), log)
    return path


def _draw_threshold(axes: Any, log: TrainingLog) -> None:
    """The largest norm that was let through, where norms are clipped: a line, or a curve."""
    steps, limits = log.of_steps("train/clip_threshold")
    finite = limits[np.isfinite(limits)]
    if not len(finite):
        return
    least, most = float(finite.min()), float(finite.max())
    moves = most > least * _CLIPPED
    label = f"threshold {least:.3g} to {most:.3g}" if moves else f"threshold {least:.3g}"
    axes.plot(steps, limits, color=BLACK, linestyle="--", linewidth=1.2, label=label)


def _share_by_epoch(
    log: TrainingLog, steps: NDArray[np.float64], clipped: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share of the logged steps that were clipped, in each epoch, at the epoch's end."""
    per_epoch = log.steps_per_epoch or float(steps[-1])
    epochs = np.ceil(steps / per_epoch)
    which = np.unique(epochs)
    share = np.array([clipped[epochs == epoch].mean() for epoch in which])
    return np.minimum(which * per_epoch, steps[-1]), share


def _smooth(values: NDArray[np.float64], width: int = 9) -> NDArray[np.float64]:
    """Running median; shorter windows at the ends."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.nanmedian(w) if np.isfinite(w).any() else np.nan for w in windows])
