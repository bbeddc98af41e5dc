"""Learning-rate schedules: the factor on every rate, as a pure function of the optimizer step.

    rate of step s = peak rate * Schedule.factor(s, history)

A resumed training needs no state but its step; plateau also needs the metrics logged so far. Steps
that a guard skips count too. Warm-up multiplies each shape except cosine, which starts where
warm-up ends, and onecycle, whose own rise replaces it. Epochs are counted from step 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from runkey import params
from runkey.training.early_stopping import MetricComparator


@dataclass(frozen=True)
class Schedule:
    """A shape and its numbers, all in optimizer steps."""

    name: str
    total_steps: int
    warmup_steps: int
    warmup_start: float
    drop_steps: tuple[int, ...]
    """Steps at which step and multistep drop, rising."""
    steps_per_epoch: int
    gamma: float
    min_factor: float
    peak_step: float
    cycle_steps: float
    patience: int
    comparator: MetricComparator

    def factor(self, step: int, history: Sequence[float] = ()) -> float:
        """Return the factor of an optimizer step.

        Args:
            step: updates tried before this one, 0..total_steps-1.
            history: the watched metric at each evaluation so far (plateau only).
        """
        if self.name == "onecycle":
            return self._onecycle(step)
        if self.name == "cosine":
            return self._warmup(step) if step < self.warmup_steps else self._cosine(step)
        return self._warmup(step) * self._shape(step, history)

    def _warmup(self, step: int) -> float:
        if step >= self.warmup_steps:
            return 1.0
        return self.warmup_start + (1 - self.warmup_start) * step / self.warmup_steps

    def _shape(self, step: int, history: Sequence[float]) -> float:
        match self.name:
            case "constant":
                return 1.0
            case "step" | "multistep":
                return math.pow(self.gamma, sum(step >= drop for drop in self.drop_steps))
            case "exponential":
                return math.pow(self.gamma, step / self.steps_per_epoch)
            case "cyclical":
                return self._triangle(step)
            case "plateau":
                drops = count_drops(history, self.comparator, self.patience)
                return max(self.min_factor, math.pow(self.gamma, drops))
        raise ValueError(f"schedule {self.name!r}")

    def _cosine(self, step: int) -> float:
        """One period of SGDR (Loshchilov and Hutter 2017)."""
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return _cosine_between(1.0, self.min_factor, done)

    def _onecycle(self, step: int) -> float:
        """Smith and Topin 2018: a cosine rise to 1 at `peak_step`, then a cosine fall."""
        if step < self.peak_step:
            return _cosine_between(self.warmup_start, 1.0, step / self.peak_step)
        fall = max(1.0, self.total_steps - 1 - self.peak_step)
        return _cosine_between(1.0, self.min_factor, (step - self.peak_step) / fall)

    def _triangle(self, step: int) -> float:
        """Smith 2017: from `min_factor` up to 1 and down again, repeatedly."""
        place = step / self.cycle_steps % 1.0
        return self.min_factor + (1 - self.min_factor) * (1 - abs(2 * place - 1))


def _cosine_between(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def count_drops(history: Sequence[float], comparator: MetricComparator, patience: int) -> int:
    """Count the plateaus: `patience` evaluations in a row without improvement.

    After a drop the count starts again; the best value so far stands.
    """
    drops, waited, best = 0, 0, comparator.worst
    for value in history:
        if comparator.better(value, best):
            best, waited = value, 0
        else:
            waited += 1
        if waited >= patience:
            drops, waited = drops + 1, 0
    return drops


def build_schedule(
    section: params.Schedule,
    *,
    epochs: int,
    steps_per_epoch: int,
    mode: Literal["max", "min"],
) -> Schedule:
    """Build the schedule of a training.

    Args:
        section: the schedule's parameters.
        epochs: passes over the data.
        steps_per_epoch: optimizer steps in one pass.
        mode: whether larger or smaller is better of the metric that plateau watches (the one of
            `training.early_stopping`).
    """
    total = epochs * steps_per_epoch
    drops: Sequence[int] = section.milestones if section.name == "multistep" else ()
    if section.name == "step":
        drops = range(section.step_epochs, epochs, section.step_epochs)
    return Schedule(
        name=section.name,
        total_steps=total,
        warmup_steps=round(section.warmup_fraction * total),
        warmup_start=section.warmup_start,
        drop_steps=tuple(epoch * steps_per_epoch for epoch in drops),
        steps_per_epoch=steps_per_epoch,
        gamma=section.gamma,
        min_factor=section.min_factor,
        peak_step=max(0.0, section.peak_fraction * total - 1),
        cycle_steps=section.cycle_epochs * steps_per_epoch,
        patience=section.patience,
        comparator=MetricComparator(mode, section.min_delta),
    )
