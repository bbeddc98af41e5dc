"""What rules ask of a log: its latest values, and the parameters as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.plots.log import Point, TrainingLog

FEWEST = 8
"""Logged steps, or samples of the machine, that say something."""


def recent(log: TrainingLog, name: str) -> NDArray[np.float64]:
    """Finite values of the logged steps of the last two whole epochs."""
    begin = log.epochs[-3].step if len(log.epochs) > 2 else log.epochs[0].step
    steps, values = log.of_steps(name)
    return values[(steps > begin) & np.isfinite(values)]


def finite(log: TrainingLog, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of the epochs' ends, without those that are not finite."""
    steps, values = log.of_epochs(name)
    good = np.isfinite(values)
    return steps[good], values[good]


def skipped_lately(log: TrainingLog) -> int:
    """Steps of the last epoch that were skipped, if it was one in a hundred or more.

    With fp16 one in ten: its loss scale finds its place, and later its bounds, by such steps.
    """
    steps, counts = log.of_epochs("train/skipped_steps")
    if len(counts) < 2:
        return 0
    skipped, tried = counts[-1] - counts[-2], steps[-1] - steps[-2]
    precision = str(log.events.get("training_start", {}).get("precision"))
    scaled = precision.startswith("float16")
    few = max(3, tried / 10) if scaled else max(1, tried / 100)
    return int(skipped) if np.isfinite(skipped) and skipped >= few else 0


def median(samples: Sequence[Point], names: Sequence[str]) -> float:
    """Of all samples of all these metrics; NaN, which is neither high nor low, without any."""
    values = [s.values[name] for s in samples for name in names if name in s.values]
    return float(np.median(values)) if values else float("nan")


def now(name: str, settings: Mapping[str, Any]) -> str:
    """A parameter, with the value that it has."""
    if name not in settings:
        return name
    value = settings[name]
    return f"{name} (now {value if isinstance(value, str) else json.dumps(value)})"
