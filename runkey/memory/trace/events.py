"""What a traced training step is: allocations and frees of blocks of device memory, in order.

A block is the storage of one or more tensors.  Bytes are what was asked for; rounding, segments
and all else that an allocator adds is `runkey.memory.allocator`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Kind = Literal["alloc", "free"]
Phase = Literal["setup", "forward", "backward", "optimizer"]
"""setup: the model, its average and what lives as long as they do, before the first step."""
BlockClass = Literal[
    "parameter", "buffer", "gradient", "optimizer", "activation", "input", "temporary", "library"
]
"""parameter and buffer: the model's, and its moving average's (module `ema...`).  optimizer:
moments, step counters, the loss scale.  input: a batch as it came and as the model reads it.
activation: kept by the forward pass (or its recomputation) for the backward pass.  library:
workspaces that cuBLAS keeps.  temporary: everything else."""
CLASSES: tuple[BlockClass, ...] = get_args(BlockClass)


class Event(NamedTuple):
    """One allocation or free.  Both events of a block carry the same bytes, class and module."""

    kind: Kind
    block: int
    """Number of the block, unique in a session."""
    bytes: int
    """Bytes asked for, not rounded."""
    class_: BlockClass
    module: str
    """Path of the module that allocated it (`transformer.encoder.layers.0`), or whose backward
    pass did; a parameter's, buffer's, gradient's or moment's own path; "" outside of the model."""
    phase: Phase
    """When the event happened."""


class Mark(NamedTuple):
    """Where a phase begins."""

    start: int
    """Index of its first event; the end of the events if it has none."""
    phase: Phase


@dataclass(frozen=True, slots=True)
class Pass:
    """One micro-batch: what its forward and backward pass allocate follows from these numbers."""

    batch: int
    """Images."""
    height: int
    """Padded, pixels."""
    width: int
    objects: int
    """Boxes of each image."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One optimizer step over a window of micro-batches."""

    passes: tuple[Pass, ...]
    """The window's micro-batches; forward and backward phases alternate over them."""
    before: tuple[Event, ...]
    """Blocks that are alive when the step starts, as allocations."""
    events: tuple[Event, ...]
    marks: tuple[Mark, ...]

    @property
    def batch(self) -> int:
        """Images of the largest micro-batch."""
        return max(one.batch for one in self.passes)

    @property
    def height(self) -> int:
        """Largest padded height, pixels."""
        return max(one.height for one in self.passes)

    @property
    def width(self) -> int:
        """Largest padded width, pixels."""
        return max(one.width for one in self.passes)


@dataclass(frozen=True, slots=True)
class Session:
    """A training from its first allocation to a step like all later ones.

    Replayed in order (`setup`, `first.events`, then `steady.events` as often as one likes) it is
    what an allocator would see of a training on a single shape.
    """

    setup: tuple[Event, ...]
    """Allocations and frees while the model, the average and the optimizer are built."""
    first: Trace
    """The first step: it makes the optimizer's state and the libraries' workspaces."""
    steady: Trace
    """Every later step.  What is alive at its end is what was alive at its start, block by block
    of the same bytes; see `runkey.memory.allocator.replay`."""
