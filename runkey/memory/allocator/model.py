"""torch's CUDA caching allocator on one stream, with its default settings.

As in torch 2.10 (`c10/cuda/CUDACachingAllocator`): requests are rounded to 512 bytes; small ones
(up to 1 MiB) come from segments of 2 MiB, others from segments of 20 MiB, or of their own size
rounded to 2 MiB from 10 MiB on.  The smallest free block that is large enough is used and, if what
is left over is worth it, split; a freed block is joined with free neighbours and kept.  A segment
goes back to the GPU only when a request would not fit otherwise; then all that are wholly free do.
With expandable segments each pool has one segment that grows, and shrinks, by pages.
"""

from __future__ import annotations

from runkey.memory.allocator.blocks import Block, Pool

KIB, MIB = 2**10, 2**20
_ROUND = 512
_SMALL_REQUEST = MIB
_SMALL_SEGMENT = 2 * MIB
_LARGE_SEGMENT = 20 * MIB
_OWN_SEGMENT = 10 * MIB
_OWN_ROUND = 2 * MIB
# Room for an expandable segment's addresses: whole pages, more than any GPU has memory.
_ADDRESSES = _LARGE_SEGMENT * 2**26


class OutOfBudgetError(Exception):
    """A request does not fit in the budget, even after all cached memory was given back."""


def rounded(size: int) -> int:
    """Bytes that a request takes at least."""
    return max(_ROUND, -(-size // _ROUND) * _ROUND)


class Allocator:
    """Hands out blocks; counts as `torch.cuda.memory_allocated` and `memory_reserved` do."""

    def __init__(self, budget: int | None = None, *, expandable: bool = False) -> None:
        """An empty cache.

        Args:
            budget: most bytes that may be reserved; None: no limit.
            expandable: `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`.
        """
        self.budget = budget
        self.expandable = expandable
        self.allocated = self.max_allocated = 0
        self.reserved = self.max_reserved = 0
        self.retries = 0
        """How often cached memory had to be given back (`num_alloc_retries`)."""
        self.small, self.large = Pool(small=True), Pool(small=False)
        self._next_address = 0
        # Expandable: the first block of each pool's one segment.
        self._heads: dict[bool, Block] = {}

    def allocate(self, size: int) -> Block:
        """A block of at least `size` bytes.

        Raises:
            OutOfBudgetError: there is no room.
        """
        size = rounded(size)
        pool = self.small if size <= _SMALL_REQUEST else self.large
        block = pool.take(size) or self._grow(pool, size)
        left = block.size - size
        if left >= _ROUND if pool.small or self.expandable else left > _SMALL_REQUEST:
            pool.add(block.cut(size))
        block.free = False
        self.allocated += block.size
        if self.allocated > self.max_allocated:
            self.max_allocated = self.allocated
        return block

    def release(self, block: Block) -> None:
        """Free a block; its memory stays reserved."""
        assert not block.free
        self.allocated -= block.size
        block.free = True
        self._join(block)

    def empty_cache(self) -> None:
        """Give wholly free segments (expandable: pages) back to the GPU."""
        for pool in (self.small, self.large):
            for block in list(pool.blocks.values()):
                if self.expandable:
                    self._unmap(block)
                elif block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def reset_peaks(self) -> None:
        """Count peaks from here on."""
        self.max_allocated, self.max_reserved = self.allocated, self.reserved

    def _grow(self, pool: Pool, size: int) -> Block:
        """A new segment's block, or an expandable segment's, after a second try if need be."""
        grow = self._expand if self.expandable else self._new_segment
        try:
            return grow(pool, size)
        except OutOfBudgetError:
            self.empty_cache()
            self.retries += 1
            return grow(pool, size)

    def _new_segment(self, pool: Pool, size: int) -> Block:
        size = segment_size(size)
        self._reserve(size)
        block = Block(pool, self._next_address, size)
        self._next_address += size + _ROUND  # Segments never touch.
        return block

    def _reserve(self, size: int) -> None:
        if self.budget is not None and self.reserved + size > self.budget:
            raise OutOfBudgetError
        self.reserved += size
        if self.reserved > self.max_reserved:
            self.max_reserved = self.reserved

    def _join(self, block: Block) -> Block:
        """Join a free block with free neighbours and put it into its pool."""
        pool = block.pool
        before, after = block.before, block.after
        if after is not None and after.free and after.mapped:
            pool.remove(after)
            block.swallow_next()
        if before is not None and before.free and before.mapped:
            pool.remove(before)
            before.swallow_next()
            block = before
        pool.add(block)
        return block

    def _expand(self, pool: Pool, size: int) -> Block:
        """Map pages at the lowest addresses where `size` bytes can be had."""
        head = self._heads.get(pool.small)
        if head is None:
            start = 0 if pool.small else _ADDRESSES
            head = self._heads[pool.small] = Block(pool, start, _ADDRESSES, mapped=False)
        block = _first_gap(head, size)
        if not block.mapped:
            block = self._map(block, size)
        while block.size < size:
            assert block.after is not None
            block = self._map(block.after, size - block.size)
        pool.remove(block)
        return block

    def _map(self, block: Block, size: int) -> Block:
        """Put memory behind an unmapped block's first `size` bytes, in whole pages."""
        page = _SMALL_SEGMENT if block.pool.small else _LARGE_SEGMENT
        size = min(block.size, -(-size // page) * page)
        self._reserve(size)
        if size < block.size:
            block.cut(size)
        block.mapped = True
        return self._join(block)

    def _unmap(self, block: Block) -> None:
        """Take the memory from behind a free block's whole pages."""
        page = _SMALL_SEGMENT if block.pool.small else _LARGE_SEGMENT
        start, end = -(-block.address // page) * page, block.end() // page * page
        if start >= end:
            return
        pool = block.pool
        pool.remove(block)
        if start > block.address:
            whole = block.cut(start - block.address)
            pool.add(block)
        else:
            whole = block
        if end < whole.end():
            pool.add(whole.cut(end - start))
        whole.mapped = False
        self.reserved -= whole.size
        _join_unmapped(whole)


def segment_size(size: int) -> int:
    """Bytes of the segment that is made for a rounded request."""
    if size <= _SMALL_REQUEST:
        return _SMALL_SEGMENT
    if size < _OWN_SEGMENT:
        return _LARGE_SEGMENT
    return -(-size // _OWN_ROUND) * _OWN_ROUND


def _first_gap(head: Block, size: int) -> Block:
    """The first free or unmapped block from which on `size` bytes are free, some unmapped."""
    block: Block | None = head
    while block is not None:
        if not block.mapped:
            first = block
            if block.before is not None and block.before.free:
                first = block.before
            room, at = 0, first
            while room < size and at is not None and at.free:
                room += at.size
                at = at.after  # type: ignore[assignment]
            if room >= size:
                return first
        block = block.after
    raise AssertionError("the addresses have run out")


def _join_unmapped(block: Block) -> None:
    after, before = block.after, block.before
    if after is not None and not after.mapped:
        block.swallow_next()
    if before is not None and not before.mapped:
        before.swallow_next()
