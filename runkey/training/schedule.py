"""Learning-rate schedules and early stopping: pure functions of the step and of the evaluations.

    rate of step s = peak rate * schedule.factor(s, history)

A resumed training needs no state but its step and the metrics logged so far. Steps that a guard
skips count too. Warm-up multiplies each shape except cosine, which starts where warm-up ends, and
onecycle, whose own rise replaces it. Epochs are counted from step 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from runkey import params
from runkey.errors import TrainingError

# Values after the best one that the reason of an early stop shows, the latest.
_MOST_SHOWN = 8

Mode = Literal["max", "min"]
"""Whether larger or smaller values of a metric are better."""


@dataclass(frozen=True)
class Schedule:
    """The length of a training, and its learning rates."""

    total_steps: int
    factor: Callable[[int, Sequence[float]], float]
    """The factor on every rate: of the updates tried before a step (0..total_steps-1), and for
    plateau of the watched metric at each evaluation so far."""


def build_schedule(
    section: params.Schedule, *, epochs: int, steps_per_epoch: int, mode: Mode
) -> Schedule:
    """Build the schedule of a training.

    `mode` says whether larger or smaller is better of the metric that plateau watches (the one of
    `training.early_stopping`).
    """
    name, gamma, least = section.name, section.gamma, section.min_factor
    total, start = epochs * steps_per_epoch, section.warmup_start
    warmup_steps = round(section.warmup_fraction * total)
    peak_step = max(0.0, section.peak_fraction * total - 1)
    drops: Sequence[int] = section.milestones
    if name == "step":
        drops = range(section.step_epochs, epochs, section.step_epochs)

    def warmup(step: int) -> float:
        return 1.0 if step >= warmup_steps else start + (1 - start) * step / warmup_steps

    def shape(step: int, history: Sequence[float]) -> float:
        match name:
            case "step" | "multistep":
                return math.pow(gamma, sum(step >= drop * steps_per_epoch for drop in drops))
            case "exponential":
                return math.pow(gamma, step / steps_per_epoch)
            case "cyclical":  # Smith 2017: from the least factor up to 1 and down again, repeatedly
                place = step / (section.cycle_epochs * steps_per_epoch) % 1.0
                return least + (1 - least) * (1 - abs(2 * place - 1))
            case "plateau":
                lowered = count_drops(history, mode, section.min_delta, section.patience)
                return max(least, math.pow(gamma, lowered))
        return 1.0

    def factor(step: int, history: Sequence[float] = ()) -> float:
        if name == "onecycle":  # Smith and Topin 2018: a cosine rise to 1, then a cosine fall
            if step < peak_step:
                return _cosine(start, 1.0, step / peak_step)
            return _cosine(1.0, least, (step - peak_step) / max(1.0, total - 1 - peak_step))
        if name == "cosine" and step >= warmup_steps:  # a period of Loshchilov and Hutter 2017
            return _cosine(1.0, least, (step - warmup_steps) / max(1, total - warmup_steps))
        return warmup(step) * shape(step, history)

    return Schedule(total, factor)


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def improvements(history: Sequence[float], mode: Mode, min_delta: float = 0.0) -> list[int]:
    """List the evaluations, from 1, that were better than all before by more than `min_delta`.

    NaN is worse than every number.
    """
    sign = 1 if mode == "max" else -1
    found, best = [], -math.inf
    for number, value in enumerate(history, start=1):
        if sign * value - best > min_delta:
            found.append(number)
            best = sign * value
    return found


def count_drops(history: Sequence[float], mode: Mode, min_delta: float, patience: int) -> int:
    """Count the plateaus: `patience` evaluations in a row without improvement.

    After a drop the count starts again; the best value so far stands.
    """
    ends = [0, *improvements(history, mode, min_delta), len(history) + 1]
    return sum((after - before - 1) // patience for before, after in pairwise(ends))


def decide_stop(history: Sequence[float], section: params.EarlyStopping) -> str:
    """Return why to stop early after the evaluations so far; empty while training goes on.

    `history` is the section's metric at each of them, in order.
    """
    at = max(improvements(history, section.mode, section.min_delta), default=0)
    waited = len(history) - at
    if waited < section.patience or not section.enabled:
        return ""
    least = f" by more than {section.min_delta:g}" if section.min_delta else ""
    seen = f"{section.metric} was never a number"
    if at:
        later = ", ".join(f"{value:.4g}" for value in history[at:][-_MOST_SHOWN:])
        more = "... " if waited > _MOST_SHOWN else ""
        best = f"{section.metric} {history[at - 1]:.4g}"
        seen = f"best {best} at evaluation {at} of {len(history)}, then {more}{later}"
    return f"early stop: {seen}: {waited} without improvement{least}"


def check_watched(metrics: Mapping[str, float], metric: str) -> None:
    """Raise TrainingError if an evaluation has no such metric."""
    if metric not in metrics:
        known = ", ".join(sorted(metrics))
        raise TrainingError(
            f"params.yaml: training.early_stopping.metric = {metric!r} is not logged at "
            f"evaluations; there are: {known}"
        )


def loss_gap(values: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """Compute `val/loss_gap`, the generalisation gap: val loss minus train loss.

    Both are sums of the same parts over the same layers, divided by numbers of true boxes (detr: of
    weighted queries); the loss of denoising queries, which evaluations do not have, is left out.
    They differ in this: training images are augmented, and the training loss is the mean over an
    epoch's steps, of weights that were still moving, with dropout and batch statistics; the val
    loss is of the weights at its end, averaged if there is an average. So the gap may start below
    0; overfitting shows in its growth.

    `values` are the epoch's, `metrics` the evaluation's, by metric name. Returns nothing if one of
    the two losses is missing.
    """
    if "val/loss" not in metrics or "train/epoch_loss" not in values:
        return {}
    trained = values["train/epoch_loss"] - values.get("train/epoch_loss_denoising", 0.0)
    return {"val/loss_gap": metrics["val/loss"] - trained}
