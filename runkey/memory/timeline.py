"""What is alive during a traced step, by class and by module."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runkey.memory.trace.tracker import CLASSES, BlockClass, Event, Mark, Trace

ROUND_BYTES = 512
"""CUDA's caching allocator hands out multiples of this."""


def rounded(size: int) -> int:
    """Bytes that a block of `size` bytes takes."""
    return -(-size // ROUND_BYTES) * ROUND_BYTES


_DEEP = ("backbone", "transformer")
"""Modules that are told apart by their children."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Bytes alive before the step and after each of its events."""

    live: NDArray[np.int64]
    """[classes in the order of `CLASSES`, events + 1]."""
    marks: tuple[Mark, ...]

    @property
    def total(self) -> NDArray[np.int64]:
        """[events + 1]."""
        total: NDArray[np.int64] = self.live.sum(0)
        return total

    @property
    def peak(self) -> int:
        """Events that have happened when most is alive."""
        return int(self.total.argmax())

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at once."""
        return int(self.total.max())

    def phase_at(self, events: int) -> str:
        """The phase in which that many events have happened."""
        return [mark.phase for mark in self.marks if mark.start <= max(0, events - 1)][-1]


def timeline_of(trace: Trace) -> Timeline:
    """Follow a step from event to event."""
    places = {name: row for row, name in enumerate(CLASSES)}
    change = np.zeros((len(CLASSES), len(trace.events) + 1), dtype=np.int64)
    for event in trace.before:
        change[places[event.class_], 0] += rounded(event.bytes)
    for number, event in enumerate(trace.events, start=1):
        change[places[event.class_], number] += _signed(event)
    return Timeline(change.cumsum(1), trace.marks)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """What is alive at a step's peak."""

    phase: str
    """In which the peak is."""
    classes: dict[BlockClass, int]
    """Bytes by class, in the order of `CLASSES`."""
    modules: dict[str, dict[BlockClass, int]]
    """The same by part of the model: `backbone.layer1`, `transformer.encoder`, `ema`, ..."""


def break_down(trace: Trace) -> Breakdown:
    """Who holds the memory at the peak of a step."""
    timeline = timeline_of(trace)
    parts: Counter[tuple[str, BlockClass]] = Counter()
    for event in (*trace.before, *trace.events[: timeline.peak]):
        parts[_group(event.module), event.class_] += _signed(event)
    modules: dict[str, dict[BlockClass, int]] = {}
    for (module, class_), size in parts.items():
        if size:
            modules.setdefault(module, {})[class_] = size
    sums = {name: sum(one.get(name, 0) for one in modules.values()) for name in CLASSES}
    return Breakdown(timeline.phase_at(timeline.peak), sums, modules)


def _group(module: str) -> str:
    """The part of the model that a module belongs to; "" is the step around the model."""
    names = (
        module.replace("backbone.0.body", "backbone").replace("backbone.0", "backbone").split(".")
    )
    return ".".join(names[: 2 if names[0] in _DEEP else 1])


def _signed(event: Event) -> int:
    return rounded(event.bytes) if event.kind == "alloc" else -rounded(event.bytes)
