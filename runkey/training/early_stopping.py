"""When a metric no longer improves, as pure functions of its recorded history."""

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
class StopDecision:
    """What a history of evaluations says."""

    stop: bool
    waited: int
    """Evaluations on end without improvement."""
    reason: str
    """What was seen, in one line; empty while training goes on."""


def decide_stop(
    history: Sequence[float], judge: MetricComparator, patience: int, metric: str = "the metric"
) -> StopDecision:
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
        return StopDecision(False, waited, "")
    least = f" by more than {judge.min_delta:g}" if judge.min_delta else ""
    if not at:
        seen = f"{metric} was never a number"
    else:
        latest = history[at:][-_MOST_SHOWN:]
        later = ", ".join(f"{value:.4g}" for value in latest)
        more = "... " if len(history) - at > len(latest) else ""
        seen = f"best {metric} {best:.4g} at evaluation {at} of {len(history)}, then {more}{later}"
    return StopDecision(True, waited, f"early stop: {seen}: {waited} without improvement{least}")


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


def loss_gap(values: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """`val/loss_gap`: how far the held-out loss lies above the training loss.

    Both are sums of the same parts over the same layers, divided by numbers of true boxes (detr: of
    weighted queries); the loss of denoising queries, which evaluations have none of, is left out.
    What differs: training images are augmented; the training loss is the mean over an epoch's
    steps, of weights that were still moving, with dropout and batch statistics; the held-out loss
    is of the weights at its end, averaged if there is an average.  So the gap may be below 0 early
    on; what tells of overfitting is that it grows.

    Args:
        values: the epoch's, by metric name.
        metrics: the evaluation's.

    Returns:
        Nothing where one of the two losses is missing.
    """
    if "val/loss" not in metrics or "train/epoch_loss" not in values:
        return {}
    trained = values["train/epoch_loss"] - values.get("train/epoch_loss_denoising", 0.0)
    return {"val/loss_gap": metrics["val/loss"] - trained}
