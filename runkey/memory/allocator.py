"""A model of torch's CUDA caching allocator: one stream, expandable segments, no limit.

It follows torch's sources (`CUDACachingAllocator.cpp`) with the setting that training uses,
`PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`: the same requests get the same addresses, and
the same `max_memory_allocated` and `max_memory_reserved` (benchmarks/gpu_steps.py).
"""

from __future__ import annotations

from bisect import bisect_left, insort

from runkey.memory.trace.events import ROUND_BYTES, round_up
from runkey.units import MIB

_SMALL_REQUEST = MIB
_SMALL_PAGE, _LARGE_PAGE = 2 * MIB, 20 * MIB
# Where the segment of large blocks starts: behind more small ones than any GPU has memory for.
_LARGE_START = _LARGE_PAGE * 2**26


class Block:
    """A piece of a pool's segment; `before` and `after` are its neighbours."""

    __slots__ = ("address", "after", "before", "free", "pool", "size")

    def __init__(self, pool: Pool, address: int, size: int, before: Block | None) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.free = True
        self.before = before
        self.after: Block | None = None

    def split(self, size: int) -> Block:
        """Keep the first `size` bytes; return the rest as a free block that must be added."""
        rest = Block(self.pool, self.address + size, self.size - size, self)
        rest.after = self.after
        if self.after is None:
            self.pool.last = rest
        else:
            self.after.before = rest
        self.after = rest
        self.size = size
        return rest

    def merge(self, rest: Block) -> None:
        """Take over the next block."""
        self.size += rest.size
        self.after = rest.after
        if rest.after is None:
            self.pool.last = self
        else:
            rest.after.before = self

    def end(self) -> int:
        """Return the address behind the last byte."""
        return self.address + self.size


class Pool:
    """The segment for small or for large requests, with its free blocks by size and address."""

    def __init__(self, start: int, page: int) -> None:
        """Start with an empty segment.

        Args:
            start: its first address.
            page: bytes by which it grows.
        """
        self.end = start
        self.page = page
        self.last: Block | None = None
        self.keys: list[tuple[int, int]] = []
        """(size, address) of the free blocks."""
        self.blocks: dict[int, Block] = {}
        """Free blocks by address."""

    def add(self, block: Block) -> None:
        """Add a free block."""
        insort(self.keys, (block.size, block.address))
        self.blocks[block.address] = block

    def remove(self, block: Block) -> None:
        """Remove a free block, to use it or to merge it with another."""
        keys = self.keys
        del keys[bisect_left(keys, (block.size, block.address))]
        del self.blocks[block.address]

    def take(self, size: int) -> Block | None:
        """Remove and return the smallest free block of `size` bytes or more, if there is one."""
        keys = self.keys
        index = bisect_left(keys, (size, 0))
        if index == len(keys):
            return None
        address = keys[index][1]
        del keys[index]
        return self.blocks.pop(address)

    def grow(self, size: int) -> tuple[Block, int]:
        """Map pages until `size` bytes are free at the end; return that block and the new bytes."""
        last = self.last
        free = last.size if last is not None and last.free else 0
        new = -(-(size - free) // self.page) * self.page
        block = Block(self, self.end, new, last)
        self.end += new
        if last is not None:
            last.after = block
        self.last = block
        if last is not None and last.free:
            self.remove(last)
            last.merge(block)
            block = last
        return block, new


class Allocator:
    """The allocator; it counts as `torch.cuda.memory_allocated` and `memory_reserved` do."""

    def __init__(self) -> None:
        """Start with an empty cache."""
        self.allocated = self.max_allocated = 0
        self.reserved = 0
        """Memory is never returned, so this is the most that was reserved, too."""
        self.small, self.large = Pool(0, _SMALL_PAGE), Pool(_LARGE_START, _LARGE_PAGE)

    def allocate(self, size: int) -> Block:
        """Return a block of at least `size` bytes."""
        size = max(ROUND_BYTES, round_up(size))
        pool = self.small if size <= _SMALL_REQUEST else self.large
        block = pool.take(size)
        if block is None:
            block, new = pool.grow(size)
            self.reserved += new
        if block.size - size >= ROUND_BYTES:
            pool.add(block.split(size))
        block.free = False
        self.allocated += block.size
        self.max_allocated = max(self.max_allocated, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Free a block and merge it with free neighbours; its memory stays reserved."""
        assert not block.free
        self.allocated -= block.size
        block.free = True
        before, after = block.before, block.after
        if after is not None and after.free:
            block.pool.remove(after)
            block.merge(after)
        if before is not None and before.free:
            block.pool.remove(before)
            before.merge(block)
            block = before
        block.pool.add(block)
