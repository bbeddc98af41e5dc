"""When a metric no longer improves, as pure functions of its recorded history."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from runkey.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Judge:
    """Compares two values of a metric.  NaN is the worst value there is."""

    mode: Literal["max", "min"]
    """max: larger is better."""
    min_delta: float = 0.0
    """Smallest change that counts as improvement, in the metric's unit."""

    @property
    def worst(self) -> float:
        """What every value but NaN, and the worst infinity, is better than."""
        return -math.inf if self.mode == "max" else math.inf

    def better(self, value: float, best: float) -> bool:
        """Whether `value` improves on `best` by more than the smallest change."""
        if math.isnan(value):
            return False
        gain = value - best if self.mode == "max" else best - value
        return gain > self.min_delta


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a history of evaluations says."""

    stop: bool
    waited: int
    """Evaluations on end without improvement."""
    reason: str
    """What was seen, in one line; empty while training goes on."""


def judge_history(
    history: Sequence[float], judge: Judge, patience: int, metric: str = "the metric"
) -> Verdict:
    """Whether to stop after the evaluations so far.

    Args:
        history: the metric at each evaluation, in order.
        judge: what counts as improvement.
        patience: evaluations on end without improvement before training stops.
        metric: its name, for the reason.
    """
    best, at, waited = judge.worst, 0, 0
    for number, value in enumerate(history, start=1):
        if judge.better(value, best):
            best, at, waited = value, number, 0
        else:
            waited += 1
    if waited < patience:
        return Verdict(False, waited, "")
    seen = f"{metric} was never a number" if not at else f"best {metric} {best:.4g}"
    where = "" if not at else f" at evaluation {at} of {len(history)}"
    least = f" by more than {judge.min_delta:g}" if judge.min_delta else ""
    return Verdict(
        True, waited, f"early stop: {seen}{where}, {waited} without improvement{least} since"
    )


def watched_value(metrics: Mapping[str, float], metric: str) -> float:
    """The metric that early stopping watches, out of an evaluation's.

    Raises:
        TrainingError: evaluations do not log it.
    """
    if metric not in metrics:
        known = ", ".join(sorted(metrics))
        raise TrainingError(
            f"params.yaml: training.early_stopping.metric = {metric!r} is not logged at "
            f"evaluations; there are: {known}"
        )
    return metrics[metric]
