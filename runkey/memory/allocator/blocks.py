"""Blocks of a segment, and the free ones of a pool, ordered as the allocator looks for them."""

from __future__ import annotations

from bisect import bisect_left, insort


class Block:
    """A piece of a segment; its neighbours in the segment are `before` and `after`."""

    __slots__ = ("address", "after", "before", "free", "mapped", "pool", "size")

    def __init__(self, pool: Pool, address: int, size: int, *, mapped: bool = True) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.mapped = mapped
        """Whether there is memory behind its addresses (expandable segments can lack some)."""
        self.free = True
        self.before: Block | None = None
        self.after: Block | None = None

    def cut(self, size: int) -> Block:
        """Keep the first `size` bytes; the rest is a block of its own, in no pool yet."""
        rest = Block(self.pool, self.address + size, self.size - size, mapped=self.mapped)
        rest.before, rest.after = self, self.after
        if self.after is not None:
            self.after.before = rest
        self.after = rest
        self.size = size
        return rest

    def swallow_next(self) -> None:
        """Take the next block's bytes."""
        rest = self.after
        assert rest is not None
        self.size += rest.size
        self.after = rest.after
        if rest.after is not None:
            rest.after.before = self

    def end(self) -> int:
        """Address behind the last byte."""
        return self.address + self.size


class Pool:
    """The free blocks for small or for large requests, by size, then by address."""

    def __init__(self, *, small: bool) -> None:
        self.small = small
        self.keys: list[tuple[int, int]] = []
        self.blocks: dict[int, Block] = {}
        """Free blocks by address."""

    def add(self, block: Block) -> None:
        """Make a block available."""
        insort(self.keys, (block.size, block.address))
        self.blocks[block.address] = block

    def remove(self, block: Block) -> None:
        """Take a block out, whether to use it or to join it to another."""
        keys = self.keys
        del keys[bisect_left(keys, (block.size, block.address))]
        del self.blocks[block.address]

    def take(self, size: int) -> Block | None:
        """The smallest free block of `size` bytes or more, taken out; None: there is none."""
        keys = self.keys
        index = bisect_left(keys, (size, 0))
        if index == len(keys):
            return None
        address = keys[index][1]
        del keys[index]
        return self.blocks.pop(address)
