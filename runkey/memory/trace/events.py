"""The trace of a training step: allocations and frees of device memory, and what is alive when."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

Kind = Literal["alloc", "free"]
Phase = Literal["setup", "forward", "backward", "optimizer"]
"""setup: before the first step, while the model and its moving average are built."""
BlockClass = Literal[
    "parameter", "buffer", "gradient", "optimizer", "activation", "input", "temporary", "library"
]
"""parameter, buffer: of the model and of its moving average (module `ema...`).
gradient: of a parameter. optimizer: moments, step counters, the loss scale.
activation: kept by the forward pass, or its recomputation, for the backward pass.
input: a batch as loaded and as the model reads it. library: workspaces that cuBLAS keeps.
temporary: everything else."""
CLASSES: tuple[BlockClass, ...] = get_args(BlockClass)

ROUND_BYTES = 512
"""CUDA's caching allocator hands out multiples of this."""


def round_up[T: (int, NDArray[np.int64])](size: T) -> T:
    """Return the bytes that a block of `size` bytes takes."""
    return -(-size // ROUND_BYTES) * ROUND_BYTES


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The sizes of a micro-batch; what its forward and backward pass allocate follows from them."""

    images: int
    height: int
    """Padded, pixels."""
    width: int
    """Padded, pixels."""
    objects: int
    """Boxes of each image."""


class Event(NamedTuple):
    """One allocation or free; both events of a block carry the same bytes, class and module."""

    kind: Kind
    block: int
    """Number of the block, unique in a recording."""
    bytes: int
    """Requested bytes, not rounded."""
    class_: BlockClass
    module: str
    """Path of the module that allocated the block (`transformer.encoder.layers.0`), or whose
    backward pass did; of a parameter, buffer, gradient or moment, its own path; "" outside of the
    model."""

    @property
    def change(self) -> int:
        """Rounded bytes, negative for a free."""
        return round_up(self.bytes) if self.kind == "alloc" else -round_up(self.bytes)


class Mark(NamedTuple):
    """The start of a phase."""

    start: int
    """Index of its first event; the end of the events if it has none."""
    phase: Phase


@dataclass(frozen=True, slots=True)
class Trace:
    """One optimizer step over a global batch."""

    micro_batches: tuple[MicroBatch, ...]
    """Forward and backward phases alternate over them."""
    before: tuple[Event, ...]
    """Blocks that are alive when the step starts, as allocations."""
    events: tuple[Event, ...]
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class Timeline:
    """Bytes alive before the step and after each of its events."""

    live: NDArray[np.int64]
    """[classes in the order of `CLASSES`, events + 1]."""
    marks: tuple[Mark, ...]

    @property
    def total(self) -> NDArray[np.int64]:
        """Bytes alive in all classes, [events + 1]."""
        total: NDArray[np.int64] = self.live.sum(0)
        return total

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once."""
        return int(self.total.max())


def timeline_of(trace: Trace) -> Timeline:
    """Add up what is alive after each event of a step."""
    rows = {name: row for row, name in enumerate(CLASSES)}
    change = np.zeros((len(CLASSES), len(trace.events) + 1), dtype=np.int64)
    for event in trace.before:
        change[rows[event.class_], 0] += event.change
    for column, event in enumerate(trace.events, start=1):
        change[rows[event.class_], column] += event.change
    return Timeline(change.cumsum(1), trace.marks)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """What is alive at a step's peak."""

    phase: str
    """Phase of the peak."""
    classes: dict[BlockClass, int]
    """Bytes by class, in the order of `CLASSES`."""
    modules: dict[str, dict[BlockClass, int]]
    """The same by part of the model: `backbone.layer1`, `transformer.encoder`, `ema`, ..."""


def break_down(trace: Trace) -> Breakdown:
    """Attribute the bytes at a step's peak to classes and modules."""
    peak = int(timeline_of(trace).total.argmax())  # events before it
    phase = [mark.phase for mark in trace.marks if mark.start <= max(0, peak - 1)][-1]
    parts: Counter[tuple[str, BlockClass]] = Counter()
    for event in (*trace.before, *trace.events[:peak]):
        parts[_part_of(event.module), event.class_] += event.change
    modules: dict[str, dict[BlockClass, int]] = {}
    for (module, class_), size in parts.items():
        if size:
            modules.setdefault(module, {})[class_] = size
    sums = {name: sum(one.get(name, 0) for one in modules.values()) for name in CLASSES}
    return Breakdown(phase, sums, modules)


def _part_of(module: str) -> str:
    """Return the part of the model that a module belongs to; "" is the step around the model."""
    path = module.replace("backbone.0.body", "backbone").replace("backbone.0", "backbone")
    names = path.split(".")
    return ".".join(names[: 2 if names[0] in ("backbone", "transformer") else 1])
