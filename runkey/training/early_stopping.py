"""Early stopping: when a metric no longer improves, as pure functions of its history."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from runkey.errors import TrainingError

# Values after the best one that the reason shows, the latest.
_MOST_SHOWN = 8


@dataclass(frozen=True, slots=True)
class MetricComparator:
    """Compares two values of a metric. NaN is worse than every number."""

    mode: Literal["max", "min"]
    """max: larger is better."""
    min_delta: float = 0.0
    """Smallest change that counts as improvement, in the metric's unit."""

    @property
    def worst(self) -> float:
        """The value that every number but the same infinity is better than."""
        return -math.inf if self.mode == "max" else math.inf

    def better(self, value: float, best: float) -> bool:
        """Return True if `value` improves on `best` by more than the smallest change."""
        if math.isnan(value):
            return False
        gain = value - best if self.mode == "max" else best - value
        return gain > self.min_delta


@dataclass(frozen=True, slots=True)
class StopDecision:
    """Whether training stops after a history of evaluations, and why."""

    stop: bool
    waited: int
    """Evaluations on end without improvement."""
    reason: str
    """One line; empty while training goes on."""


def decide_stop(
    history: Sequence[float],
    comparator: MetricComparator,
    patience: int,
    metric: str = "the metric",
) -> StopDecision:
    """Decide whether to stop after the evaluations so far.

    Args:
        history: the metric at each evaluation, in order.
        comparator: what counts as improvement.
        patience: evaluations on end without improvement before training stops.
        metric: its name, for the reason.
    """
    best, at, waited = comparator.worst, 0, 0
    for number, value in enumerate(history, start=1):
        if comparator.better(value, best):
            best, at, waited = value, number, 0
        else:
            waited += 1
    if waited < patience:
        return StopDecision(False, waited, "")
    least = f" by more than {comparator.min_delta:g}" if comparator.min_delta else ""
    if not at:
        seen = f"{metric} was never a number"
    else:
        latest = history[at:][-_MOST_SHOWN:]
        later = ", ".join(f"{value:.4g}" for value in latest)
        more = "... " if len(history) - at > len(latest) else ""
        seen = f"best {metric} {best:.4g} at evaluation {at} of {len(history)}, then {more}{later}"
    return StopDecision(True, waited, f"early stop: {seen}: {waited} without improvement{least}")


def watched_value(metrics: Mapping[str, float], metric: str) -> float:
    """Pick the metric that early stopping watches from an evaluation's.

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


def loss_gap(values: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """Compute `val/loss_gap`, the generalisation gap: val loss minus train loss.

    Both are sums of the same parts over the same layers, divided by numbers of true boxes (detr: of
    weighted queries); the loss of denoising queries, which evaluations do not have, is left out.
    They differ in this: training images are augmented, and the training loss is the mean over an
    epoch's steps, of weights that were still moving, with dropout and batch statistics; the val
    loss is of the weights at its end, averaged if there is an average. So the gap may start below
    0; overfitting shows in its growth.

    Args:
        values: the epoch's, by metric name.
        metrics: the evaluation's.

    Returns:
        Empty if one of the two losses is missing.
    """
    if "val/loss" not in metrics or "train/epoch_loss" not in values:
        return {}
    trained = values["train/epoch_loss"] - values.get("train/epoch_loss_denoising", 0.0)
    return {"val/loss_gap": metrics["val/loss"] - trained}
