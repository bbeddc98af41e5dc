"""The horizontal axis of a training: optimizer steps, and epochs below."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.plots.log import TrainingLog
from runkey.plots.style import whole_numbers


def step_axis(axes: Any, log: TrainingLog) -> None:
    """Optimizer steps below the lowest panel, and epochs below those."""
    last = max([p.step for p in (*log.steps[-1:], *log.epochs[-1:])], default=1)
    axes.set_xlim(0, max(1, last) * 1.02)
    axes.set_xlabel("optimizer step")
    whole_numbers(axes)
    per_epoch = log.steps_per_epoch
    if per_epoch:
        below = axes.secondary_xaxis(
            "bottom", functions=(lambda step: step / per_epoch, lambda epoch: epoch * per_epoch)
        )
        below.set_xlabel("epoch")
        below.spines["bottom"].set_position(("outward", 38))
        whole_numbers(below)


def marker(steps: NDArray[np.float64]) -> str:
    """Dots while there are few points; a single one would not show at all without."""
    return "o" if len(steps) <= 60 else ""
