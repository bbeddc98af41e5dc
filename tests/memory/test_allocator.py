"""The caching allocator: rules that hold for any requests, and cases taken from its sources."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runkey.memory.allocator.blocks import Block
from runkey.memory.allocator.model import Allocator, OutOfBudgetError, rounded, segment_size

KIB, MIB = 2**10, 2**20

# (bytes) allocates, (-n) frees the n-th oldest block that is alive, modulo their number.
requests = st.one_of(
    st.integers(1, 8 * KIB),
    st.integers(8 * KIB, 2 * MIB),
    st.integers(2 * MIB, 24 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 20 * MIB]),
)
programs = st.lists(st.one_of(requests, st.integers(-40, -1)), max_size=80)


class Run:
    """A program on an allocator; `alive` holds what was asked for beside each block."""

    def __init__(self, budget: int | None, expandable: bool) -> None:
        self.allocator = Allocator(budget, expandable=expandable)
        self.alive: list[tuple[int, Block]] = []
        self.failed = False

    def do(self, program: list[int], check: bool = True) -> Run:
        for number in program:
            if number > 0:
                try:
                    self.alive.append((number, self.allocator.allocate(number)))
                except OutOfBudgetError:
                    self.failed = True
            elif self.alive:
                self.allocator.release(self.alive.pop(-number % len(self.alive))[1])
            if check:
                self.check()
        return self

    def check(self) -> None:
        allocator = self.allocator
        free = [*allocator.small.blocks.values(), *allocator.large.blocks.values()]
        used = [block for _, block in self.alive]
        every = sorted([*free, *used], key=lambda block: block.address)
        # No overlap.
        assert all(a.end() <= b.address for a, b in itertools.pairwise(every))
        # No leak: all memory is in use or free; and the counters say so.
        assert sum(block.size for block in used) == allocator.allocated
        assert sum(block.size for block in every) == allocator.reserved
        assert allocator.max_reserved >= allocator.reserved >= allocator.allocated
        assert allocator.budget is None or allocator.reserved <= allocator.budget
        assert all(block.size >= rounded(asked) for asked, block in self.alive)
        assert not any(block.free for block in used)
        for block in free:
            # Free neighbours are one block.
            assert block.after is None or not (block.after.free and block.after.mapped)
            assert block.free
            assert block.mapped
        for pool in (allocator.small, allocator.large):
            assert pool.keys == sorted((b.size, b.address) for b in pool.blocks.values())
            assert all(b.pool is pool for b in pool.blocks.values())


@settings(max_examples=60, deadline=None)
@given(programs, st.booleans(), st.one_of(st.none(), st.integers(2, 120)))
def test_no_overlap_no_leak_and_nothing_is_lost(program, expandable, budget_mib):
    run = Run(None if budget_mib is None else budget_mib * MIB, expandable).do(program)
    for _, block in run.alive:
        run.allocator.release(block)
    run.alive = []
    run.check()
    run.allocator.empty_cache()
    assert run.allocator.reserved == run.allocator.allocated == 0
    # An empty allocator is as good as a new one.
    again = Run(run.allocator.budget, expandable).do(program, check=False)
    run.allocator.reset_peaks()
    run.do(program, check=False)
    assert run.allocator.max_allocated == again.allocator.max_allocated
    assert run.allocator.max_reserved == again.allocator.max_reserved


@settings(max_examples=60, deadline=None)
@given(programs, st.booleans(), st.floats(0, 1.5))
def test_monotone_in_the_budget(program, expandable, part):
    free = Run(None, expandable).do(program, check=False).allocator
    budget = round(part * free.max_reserved)
    run = Run(budget, expandable).do(program, check=False)
    if budget < free.max_allocated:
        assert run.failed
    if budget >= free.max_reserved:
        assert not run.failed
        assert run.allocator.retries == 0
        assert run.allocator.max_reserved == free.max_reserved
        assert run.allocator.max_allocated == free.max_allocated


def test_segments_as_in_the_sources():
    assert [rounded(n) for n in (1, 512, 513)] == [512, 512, 1024]
    sizes = {512: 2, MIB: 2, MIB + 512: 20, 10 * MIB - 512: 20, 10 * MIB: 10, 10 * MIB + 512: 12}
    assert {n: segment_size(n) // MIB for n in sizes} == sizes


def test_what_is_left_over_of_a_large_block_stays_with_it():
    allocator = Allocator()
    allocator.allocate(19 * MIB + 512)  # a segment of its own, of 20 MiB
    assert (allocator.allocated, allocator.reserved) == (20 * MIB, 20 * MIB)
    allocator.allocate(5 * MIB)  # of 20 MiB that are made for it and others
    assert (allocator.allocated, allocator.reserved) == (25 * MIB, 40 * MIB)
    allocator.allocate(14 * MIB)  # takes the other 15
    assert (allocator.allocated, allocator.reserved) == (40 * MIB, 40 * MIB)
    allocator.allocate(512)  # small ones have segments of their own
    assert (allocator.allocated, allocator.reserved) == (40 * MIB + 512, 42 * MIB)


def test_the_best_fit_is_used_and_neighbours_are_joined():
    allocator = Allocator()
    blocks = [allocator.allocate(n * MIB) for n in (2, 3, 2, 4, 2)]
    assert allocator.reserved == 20 * MIB
    for index in (1, 3):
        allocator.release(blocks[index])
    assert allocator.allocate(3 * MIB).address == blocks[1].address
    assert allocator.allocate(4 * MIB).address == blocks[3].address
    for index in (0, 2, 4):
        allocator.release(blocks[index])
    assert allocator.reserved == 20 * MIB


def test_cached_memory_is_given_back_before_giving_up():
    allocator = Allocator(40 * MIB)
    first = allocator.allocate(30 * MIB)
    allocator.release(first)
    assert allocator.allocate(32 * MIB).size == 32 * MIB
    assert (allocator.retries, allocator.reserved) == (1, 32 * MIB)
    with pytest.raises(OutOfBudgetError):
        allocator.allocate(10 * MIB)
    assert allocator.retries == 2


def test_an_expandable_segment_grows_by_pages_and_fills_its_holes():
    allocator = Allocator(expandable=True)
    first = allocator.allocate(30 * MIB)
    assert allocator.reserved == 40 * MIB
    second = allocator.allocate(30 * MIB)
    assert (second.address, allocator.reserved) == (first.end(), 60 * MIB)
    allocator.release(first)
    assert allocator.allocate(25 * MIB).address == first.address
    allocator.allocate(5 * MIB)
    assert allocator.reserved == 60 * MIB
    allocator.release(second)
    allocator.empty_cache()  # the page that the first ones reach into stays
    assert allocator.reserved == 40 * MIB
