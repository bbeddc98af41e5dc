"""The state of a training, in one place, so that it can be saved whole.

Beside it there are only the tensors of model, optimizer, moving average and loss scaler, each with
a state_dict of its own (`TrainContext.parts`). Counters of early stopping and plateau are not
saved: both are functions of `evaluations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from runkey.training.metrics import Means, Throughput

NORMS_KEPT = 100
"""Gradient norms in a report."""


@dataclass
class Skip:
    """A skipped step: its loss or gradients were not finite, and nothing was updated."""

    step: int
    """Its number, from 1."""
    image_ids: list[int]
    lr: float
    """Of the main parameter group."""
    values: dict[str, float]
    """By metric name: losses and gradient norms."""
    faults: list[str]
    """What the matching found."""


@dataclass
class Rollback:
    """A return to the weights of an anchor."""

    at: int
    """Steps done then."""
    to: int
    """Step of the anchor."""
    reason: str


@dataclass
class GuardState:
    """What the guard decides by; saved, so that a resumed training decides the same."""

    skips: list[Skip] = field(default_factory=list)
    """Those that count, since the last rollback; the latest few."""
    scaler_skips: int = 0
    """Steps that fp16's loss scaler skipped while it searched its factor; they do not count."""
    rollbacks: list[Rollback] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """The latest finite ones, the last one last."""
    norms: list[float] = field(default_factory=list)
    """Gradient norms of the latest steps, finite or not, the last one last."""
    spikes: int = 0
    """Losses far above the others."""
    last_spike: int | None = None
    """Step of the latest one."""


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    metrics: dict[str, float]
    epoch: int
    """Epochs done, from 1."""
    step: int
    """Optimizer steps done."""


@dataclass
class Running(Throughput):
    """Metrics of the current epoch, up to the last step that was read, interruptions left out."""

    means: Means = field(default_factory=Means)
    """Of losses and gradient norms."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rates of the last step, by metric name."""


@dataclass
class LoopState:
    """Progress and history of a training; at its end, the result."""

    epoch: int = 0
    """Epochs closed: trained, evaluated if that was due, and logged."""
    step: int = 0
    """Optimizer steps tried; the position in the current epoch follows from both. All steps of the
    epoch may be done, but not yet its evaluation."""
    limit: int | None = None
    """Most padded pixels (images x height x width) of a forward pass; see `training.step`."""
    skipped_steps: int = 0
    """Steps in which loss or gradients were not finite, so that nothing was updated."""
    skipped_in_a_row: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """Metrics of each evaluation, in order."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Values of each epoch by metric name, with `epoch` and `step`."""
    running: Running = field(default_factory=Running)
    guard: GuardState = field(default_factory=GuardState)
    best: Best | None = None
    """Only None before the first evaluation."""
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    """State dict of the best weights: contiguous tensors on the host. They are never changed, only
    replaced."""
    seconds: float = 0.0
    """Wall time of training and evaluating, interruptions left out."""
    stop_reason: str = ""
    """Empty while training goes on."""

    def as_plain(self) -> dict[str, Any]:
        """Copy everything but the weights, as dicts, lists, numbers and strings."""
        plain = asdict(replace(self, best_weights={}))
        del plain["best_weights"]
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], best_weights: dict[str, Tensor]) -> LoopState:
        """Rebuild from what `as_plain` gave."""
        running, guard, best = plain["running"], plain["guard"], plain["best"]
        skips = [Skip(**skip) for skip in guard["skips"]]
        rollbacks = [Rollback(**rollback) for rollback in guard["rollbacks"]]
        nested = {
            "running": Running(**running | {"means": Means(**running["means"])}),
            "guard": GuardState(**guard | {"skips": skips, "rollbacks": rollbacks}),
            "best": Best(**best) if best else None,
        }
        return cls(**{**plain, **nested}, best_weights=best_weights)

    def watched(self, metric: str) -> list[float]:
        """Return one metric at each evaluation so far."""
        return [metrics[metric] for metrics in self.evaluations]
