"""Numbers of a running epoch: read late, so that nobody waits for the device."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from runkey.data.batch import Window


@dataclass(frozen=True)
class Reading:
    """Values of one optimizer step, on the host."""

    step: int
    """Optimizer steps tried up to and with this one."""
    image_ids: tuple[int, ...]
    """COCO ids of the images it was computed from."""
    lr: float
    """Its rate."""
    values: dict[str, float]
    """By metric name."""
    faults: tuple[str, ...] = ()
    """What the matching found that is not finite."""


class LateReader:
    """Hands out each step's values one step later, when the device has long delivered them.

    The copy to the host is queued behind the step itself; by the time it is read, the matcher of
    the next step has waited for the device anyway.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._queued: tuple[Reading, Tensor, torch.cuda.Event | None] | None = None

    def push(self, reading: Reading, values: Mapping[str, Tensor]) -> Reading | None:
        """Queue device scalars of a step; the reading before it, if there is one.

        Args:
            reading: what is known of the step; its values are filled in later.
            values: scalars by metric name.
        """
        previous = self.flush()
        stacked = torch.stack([value.detach().float() for value in values.values()])
        arrived = None
        if stacked.is_cuda:
            host = torch.empty(stacked.shape, pin_memory=True)
            stacked = host.copy_(stacked, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()  # type: ignore[no-untyped-call]
        names = dict.fromkeys(values, 0.0)
        self._queued = (replace(reading, values=names), stacked, arrived)
        return previous

    def flush(self) -> Reading | None:
        """The reading that is still queued, waiting for it if need be."""
        if self._queued is None:
            return None
        reading, stacked, arrived = self._queued
        self._queued = None
        if arrived is not None:
            arrived.synchronize()
        values = dict(zip(reading.values, stacked.tolist(), strict=True))
        return replace(reading, values=values)


@dataclass
class Means:
    """Means of values over an epoch; values that are not finite are left out."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: Mapping[str, float]) -> None:
        """Take one more of each value."""
        for name, value in values.items():
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """The mean of each name that had a finite value."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}


class Stopwatch:
    """Wall time, lap by lap."""

    def __init__(self) -> None:
        """Start now."""
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the start or the lap before."""
        before, self._last = self._last, time.perf_counter()
        return self._last - before


@dataclass
class Pace:
    """How fast images go by, and how long the loop waited for them, since the start of a span."""

    images: int = 0
    wait_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def after(cls, images: int, wait_seconds: float, seconds: float) -> Pace:
        """A span that another process began, as far as that one counted it."""
        return cls(images, wait_seconds, time.perf_counter() - seconds)

    def restart(self) -> None:
        """Begin a new span now."""
        self.images, self.wait_seconds, self.started = 0, 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Length of the span so far."""
        return max(1e-9, time.perf_counter() - self.started)

    @property
    def images_per_second(self) -> float:
        """Throughput."""
        return self.images / self.seconds

    @property
    def data_wait_share(self) -> float:
        """Part of the time in which the loop had no data to work on, 0..1."""
        return min(1.0, self.wait_seconds / self.seconds)


def timed(windows: Iterable[Window], *paces: Pace) -> Iterator[Window]:
    """The same windows; the time that each was waited for goes to the paces."""
    iterator = iter(windows)
    while True:
        started = time.perf_counter()
        window = next(iterator, None)
        waited = time.perf_counter() - started
        for pace in paces:
            pace.wait_seconds += waited
        if window is None:
            return
        yield window
