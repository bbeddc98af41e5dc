"""Numbers of a running epoch: read late, so that nobody waits for the device."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from runkey.data.dataset import GlobalBatch
from runkey.training.distributed import World

# Where values of a training go, as far as the training knows.


class Tracker(Protocol):
    """Takes values and events.  Calls are cheap, buffered, and never raise."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics by name at an optimizer step."""

    def event(self, kind: str, **fields: object) -> None:
        """Record something that happened once: the device chosen, an early stop.

        What happens in a step has the field `step`.
        """

    def position(self) -> Mapping[str, int | str]:
        """Where the log is now, safe on disk up to there; for a checkpoint."""
        ...

    def resume(self, position: Mapping[str, int | str] | None) -> None:
        """Go on where a checkpoint was taken.

        What the log holds after that place will be given once more, equal in all but times, and is
        not to be recorded twice.

        Args:
            position: what `position` gave then; None: training starts from its beginning.
        """


class Quiet:
    """A tracker that keeps nothing."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Keep nothing."""

    def event(self, kind: str, **fields: object) -> None:
        """Keep nothing."""

    def position(self) -> Mapping[str, int | str]:
        """Nowhere."""
        return {}

    def resume(self, position: Mapping[str, int | str] | None) -> None:
        """Nothing to go on with."""


class Contained:
    """Passes everything on to a tracker until that one raises, then says so and goes on without it.

    Trackers promise never to raise; a broken promise may cost the log, but not the training.
    """

    def __init__(self, tracker: Tracker, say: Callable[[str], None]) -> None:
        """Wrap `tracker`; `say` prints a line."""
        self._tracker: Tracker = tracker
        self._say = say

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        try:
            self._tracker.log(values, step)
        except Exception as error:  # noqa: BLE001  whatever it is, training goes on
            self._give_up(error)

    def event(self, kind: str, **fields: object) -> None:
        """See `Tracker.event`."""
        try:
            self._tracker.event(kind, **fields)
        except Exception as error:  # noqa: BLE001  whatever it is, training goes on
            self._give_up(error)

    def position(self) -> Mapping[str, int | str]:
        """See `Tracker.position`."""
        try:
            return self._tracker.position()
        except Exception as error:  # noqa: BLE001  whatever it is, training goes on
            self._give_up(error)
            return {}

    def resume(self, position: Mapping[str, int | str] | None) -> None:
        """See `Tracker.resume`."""
        try:
            self._tracker.resume(position)
        except Exception as error:  # noqa: BLE001  whatever it is, training goes on
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._tracker = Quiet()
        self._say(f"tracking stopped, training goes on: {type(error).__name__}: {error}")


# Batch norm's running statistics: put back where the step that changed them does not count.


class RunningStatistics:
    """The buffers that a module's forward pass changes in training.

    A forward pass poisons them before anyone knows that its loss is not finite, and unlike the
    optimizer's update this cannot be left out afterwards.
    """

    def __init__(self, module: nn.Module) -> None:
        """Find them in `module`, which is on its device already."""
        by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for part in module.modules():
            if isinstance(part, _NormBase) and part.track_running_stats:
                for buffer in part.buffers(recurse=False):
                    by_dtype[buffer.dtype].append(buffer)
        self._groups = list(by_dtype.values())

    def copy(self) -> list[Tensor]:
        """Their present values, one flat tensor for each dtype."""
        return [_joined(group) for group in self._groups]

    @torch.no_grad()
    def restore(self, saved: list[Tensor], where: Tensor) -> None:
        """Put back, bit for bit, what `copy` gave, where `where` is not 0; without a host sync.

        Args:
            saved: from `copy`.
            where: float scalar on the device, 0 or 1.
        """
        for group, before in zip(self._groups, saved, strict=True):
            # A few kernels for all buffers, not one for each of a hundred.
            _write(group, torch.where(where > 0, before, _joined(group)))

    @torch.no_grad()
    def average(self, world: World) -> None:
        """Give all ranks the mean of their statistics, and rank 0's number of batches.

        Each rank has moved them by the images of its own share, as each micro-batch does in one
        process.  The mean is the same bits everywhere.
        """
        if world.size == 1:
            return
        for group in self._groups:
            joined = _joined(group)
            if joined.is_floating_point():
                world.add_up(joined)
                joined /= world.size
            else:
                joined *= world.is_main
                world.add_up(joined)
            _write(group, joined)


def _write(tensors: list[Tensor], joined: Tensor) -> None:
    """The way back from `_joined`."""
    parts = torch.split(joined, [tensor.numel() for tensor in tensors])
    views = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, views)


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


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


def timed(windows: Iterable[GlobalBatch], *paces: Pace) -> Iterator[GlobalBatch]:
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
