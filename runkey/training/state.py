"""The state of a training, in one place, so that it can be saved whole, and the metrics in it.

Beside it there are only the tensors of model, optimizer, moving average and loss scaler, each with
a state_dict of its own (`TrainContext.parts`). Counters of early stopping and plateau are not
saved: both are functions of `evaluations`.

Reading a step's values at once would wait for the device. They are copied to the host behind the
step itself, and read when the next one has been queued.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepValues:
    """Values of one optimizer step, on the host."""

    step: int
    """Optimizer steps tried up to and with this one."""
    image_ids: tuple[int, ...]
    """COCO ids of the images it was computed from."""
    rates: dict[str, float]
    """Learning rates by metric name; see `current_rates`."""
    values: dict[str, float]
    """By metric name; those of a step that is still queued are not known yet."""
    faults: tuple[str, ...] = ()
    """What the matching found that is not finite."""


class DelayedReader:
    """Returns each step's values one step later, when the device has delivered them.

    The copy to the host is queued behind the step itself; by the time it is read, the matcher of
    the next step has waited for the device anyway.
    """

    def __init__(self) -> None:
        self._queued: tuple[StepValues, Tensor, torch.cuda.Event | None] | None = None

    def push(self, step: StepValues, values: Mapping[str, Tensor]) -> StepValues | None:
        """Queue device scalars by metric name; return the step before this one, if there is one."""
        previous = self.flush()
        stacked = torch.stack([value.detach().float() for value in values.values()])
        arrived = None
        if stacked.is_cuda:
            host = torch.empty(stacked.shape, pin_memory=True)
            stacked = host.copy_(stacked, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()  # type: ignore[no-untyped-call]
        self._queued = (replace(step, values=dict.fromkeys(values, 0.0)), stacked, arrived)
        return previous

    def flush(self) -> StepValues | None:
        """Return the step that is still queued, waiting for it if need be."""
        if self._queued is None:
            return None
        step, stacked, arrived = self._queued
        self._queued = None
        if arrived is not None:
            arrived.synchronize()
        return replace(step, values=dict(zip(step.values, stacked.tolist(), strict=True)))


class Stopwatch:
    """Wall time, lap by lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the start or the lap before."""
        before, self._last = self._last, time.perf_counter()
        return self._last - before


@dataclass
class Throughput:
    """Images, the time that they took, and how much of it was waiting for data."""

    images: int = 0
    wait_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, images: int, wait_seconds: float, seconds: float) -> None:
        """Add a step; `seconds` include those of waiting."""
        self.images += images
        self.wait_seconds += wait_seconds
        self.seconds += seconds

    def as_metrics(self) -> dict[str, float]:
        """Return images per second and the share (0..1) of time without data, by metric name."""
        seconds = max(1e-9, self.seconds)
        return {
            "train/images_per_second": self.images / seconds,
            "train/data_wait_share": min(1.0, self.wait_seconds / seconds),
        }


def timed[T](items: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Yield each item with the seconds that it was waited for."""
    watch = Stopwatch()
    for item in items:
        yield item, watch.lap()
        watch.lap()


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

    sums: dict[str, float] = field(default_factory=dict)
    """Of losses and gradient norms, by metric name, without those that are not finite."""
    counts: dict[str, int] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rates of the last step, by metric name."""

    def add_values(self, values: Mapping[str, float]) -> None:
        """Add one more of each value."""
        for name, value in values.items():
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Return the mean of each name that had a finite value."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}


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
        guard, best = plain["guard"], plain["best"]
        skips = [Skip(**skip) for skip in guard["skips"]]
        rollbacks = [Rollback(**rollback) for rollback in guard["rollbacks"]]
        nested = {
            "running": Running(**plain["running"]),
            "guard": GuardState(**guard | {"skips": skips, "rollbacks": rollbacks}),
            "best": Best(**best) if best else None,
        }
        return cls(**{**plain, **nested}, best_weights=best_weights)

    def watched(self, metric: str) -> list[float]:
        """Return one metric at each evaluation so far."""
        return [metrics[metric] for metrics in self.evaluations]
