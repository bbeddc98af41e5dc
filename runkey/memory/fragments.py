"""Census batches replayed through the model of the allocator: how much it holds on to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runkey.memory.allocator.blocks import Block
from runkey.memory.allocator.model import Allocator
from runkey.memory.template import Template
from runkey.memory.trace.events import Pass


@dataclass(frozen=True, slots=True)
class Replay:
    """What census batches did to the model of the allocator."""

    images: int
    """Micro-batch."""
    batches: int
    """Forward passes."""
    allocated_bytes: int
    """Most that was alive at once, a convolution's workspace too."""
    reserved_bytes: int
    """Most that the allocator held."""

    @property
    def fragments_bytes(self) -> int:
        """What the allocator held beside what was alive."""
        return self.reserved_bytes - self.allocated_bytes


def replay(template: Template, windows: Sequence[Sequence[Pass]], workspace_share: float) -> Replay:
    """Replay training steps; the allocator has no limit, and expandable segments.

    Args:
        template: the step.
        windows: its micro-batches.
        workspace_share: see `Template.moves`.
    """
    allocator = Allocator(expandable=True)
    blocks: dict[int, Block] = {}
    for is_allocation, handle, size in template.moves(windows, workspace_share):
        if is_allocation:
            blocks[handle] = allocator.allocate(size)
        else:
            allocator.release(blocks.pop(handle))
    return Replay(
        images=max(one.batch for window in windows for one in window),
        batches=sum(len(window) for window in windows),
        allocated_bytes=allocator.max_allocated,
        reserved_bytes=allocator.max_reserved,
    )
