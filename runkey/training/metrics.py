"""Per-step metrics: where they are logged to, and how they are read one step late.

Reading a step's values at once would wait for the device. They are copied to the host behind the
step itself, and read when the next one has been queued.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Records metrics and events. Calls are cheap, buffered, and never raise."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics by name at an optimizer step."""

    def event(self, kind: str, **fields: object) -> None:
        """Record something that happened once: the device chosen, an early stop.

        What happens in a step has the field `step`.
        """

    def position(self) -> Mapping[str, int | str]:
        """Return where the log is, safe on disk up to there; for a checkpoint."""
        ...

    def resume(self, position: Mapping[str, int | str] | None) -> None:
        """Continue where a checkpoint was taken; None: training starts from its beginning.

        What the log holds after that place will be logged again, equal in all but times, and must
        not be recorded twice.
        """


def safe_tracker(tracker: Tracker | None) -> Tracker:
    """Pass everything to a tracker, if there is one, until that raises; then to none.

    Trackers promise not to raise; a broken promise may cost the log, but not the training.
    """
    return cast("Tracker", _SafeTracker(tracker))


class _SafeTracker:
    def __init__(self, tracker: Tracker | None) -> None:
        self._tracker = tracker

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return partial(self._call, method)

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        if self._tracker is not None:
            try:
                return getattr(self._tracker, method)(*args, **options)
            except Exception as error:  # noqa: BLE001  whatever it is, training goes on
                self._tracker = None
                logger.info(f"tracking stopped, training goes on: {type(error).__name__}: {error}")
        return {}


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


@dataclass
class Means:
    """Means of values over an epoch; values that are not finite are left out."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: Mapping[str, float]) -> None:
        """Add one more of each value."""
        for name, value in values.items():
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Return the mean of each name that had a finite value."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}


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
