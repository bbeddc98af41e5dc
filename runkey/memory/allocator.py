"""Traces through the allocator: what `max_memory_allocated` and `max_memory_reserved` would be.

    replay = Replay(session.setup, session.first, budget=..., expandable=...)
    for trace in traces:                       # of one session, in any order
        replay.step(trace)
    replay.result

Every step leaves what it found (`Session.steady`), so any step can follow any other of its session.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from runkey.memory.trace.tracker import Event, Trace

# Blocks of a segment, and the free ones of a pool, ordered as the allocator looks for them.


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


# torch's CUDA caching allocator on one stream, with its default settings.


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


@dataclass(frozen=True, slots=True)
class Result:
    """Peaks in bytes, as torch counts them."""

    allocated: int
    reserved: int
    retries: int
    """How often cached memory had to be given back first."""
    out_of_memory_at: int | None
    """Number of the step (the first one is 0) that did not fit; None: all did."""


class Replay:
    """A training's allocations, step by step."""

    def __init__(
        self,
        setup: Iterable[Event],
        first: Trace,
        *,
        budget: int | None = None,
        expandable: bool = False,
    ) -> None:
        """Replay the building of the model and the first step."""
        self.allocator = Allocator(budget, expandable=expandable)
        self._blocks: dict[int, Block] = {}
        self._steps = 0
        self._failed: int | None = None
        self._run(setup)
        self._run(first.events)
        self._steps = 1

    def step(self, trace: Trace) -> bool:
        """Replay a step like all later ones; False: it, or one before, did not fit.

        The first one replayed must be the session's own `steady`, whose `before` names the blocks
        that the first step left; what stands for them afterwards is kept under the same numbers.
        """
        fits = self._run(trace.events)
        if fits:
            for old, new in carried(trace):
                self._blocks[old] = self._blocks.pop(new)
        self._steps += 1
        return fits

    @property
    def result(self) -> Result:
        """Peaks since the start, or since `reset_peaks` of the allocator."""
        allocator = self.allocator
        return Result(
            allocator.max_allocated, allocator.max_reserved, allocator.retries, self._failed
        )

    def _run(self, events: Iterable[Event]) -> bool:
        if self._failed is not None:
            return False
        blocks, allocator = self._blocks, self.allocator
        allocate, release = allocator.allocate, allocator.release
        try:
            for event in events:
                if event[0] == "alloc":
                    blocks[event[1]] = allocate(event[2])
                else:
                    release(blocks.pop(event[1]))
        except OutOfBudgetError:
            self._failed = self._steps
            return False
        return True


def carried(trace: Trace) -> list[tuple[int, int]]:
    """(block of `before` that the step frees, block that takes its place at the end)."""
    before = {event.block: event for event in trace.before}
    gone: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    new: dict[int, Event] = {}
    for event in trace.events:
        if event.kind == "alloc":
            new[event.block] = event
        elif event.block in before:
            gone[_meaning(event)].append(event.block)
        else:
            del new[event.block]
    pairs = []
    for event in new.values():
        pairs.append((gone[_meaning(event)].pop(0), event.block))
    assert not any(gone.values()), "the step does not leave what it found"
    return pairs


def replay_steps(
    setup: Iterable[Event],
    first: Trace,
    steps: Sequence[Trace],
    *,
    budget: int | None = None,
    expandable: bool = False,
) -> Result:
    """Replay a training from its start; see `Replay`."""
    replay = Replay(setup, first, budget=budget, expandable=expandable)
    for trace in steps:
        if not replay.step(trace):
            break
    return replay.result


def _meaning(event: Event) -> tuple[str, str, int]:
    return event.class_, event.module, event.bytes
