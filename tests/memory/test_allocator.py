"""The caching allocator: rules that hold for any requests, and cases taken from its sources."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from runkey.memory.template import Allocator, Block
from runkey.units import KIB, MIB

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

    def __init__(self) -> None:
        self.allocator = Allocator()
        self.alive: list[tuple[int, Block]] = []

    def do(self, program: list[int], check: bool = True) -> None:
        for number in program:
            if number > 0:
                self.alive.append((number, self.allocator.allocate(number)))
            elif self.alive:
                self.allocator.release(self.alive.pop(-number % len(self.alive))[1])
            if check:
                self.check()

    def check(self) -> None:
        allocator = self.allocator
        used = [(block.address, block.size) for _, block in self.alive]
        for segment in (allocator.small, allocator.large):
            free = [(address, size) for size, address in segment.free]
            own = [block for block in used if segment.start <= block[0] < segment.end]
            # No overlap, no leak: the segment is one chain of blocks that ends where it ends.
            end = segment.start
            for address, size in sorted([*free, *own]):
                assert address == end
                end += size
            assert end == segment.end
            # Free neighbours are one block, and blocks are found by their size.
            assert not {address for address, _ in free} & {sum(block) for block in free}
            assert segment.free == sorted(segment.free)
            assert all(allocator.segment(size) is segment for _, size in own)
        assert sum(size for _, size in used) == allocator.allocated
        assert allocator.reserved >= allocator.max_allocated >= allocator.allocated
        assert all(block.size >= asked and block.size % 512 == 0 for asked, block in self.alive)


@settings(max_examples=60, deadline=None)
@given(programs)
def test_no_overlap_no_leak_and_nothing_is_lost(program):
    run = Run()
    run.do(program)
    for _, block in run.alive:
        run.allocator.release(block)
    run.alive = []
    run.check()
    assert run.allocator.allocated == 0
    # The same program again has the same peak, in the memory that is there.
    most = run.allocator.max_allocated
    run.do(program)
    assert run.allocator.max_allocated == most


def test_small_and_large_requests_are_rounded_as_in_the_sources():
    allocator = Allocator()
    assert [allocator.allocate(n).size for n in (1, 512, 513)] == [512, 512, 1024]
    assert allocator.reserved == 2 * MIB
    assert allocator.allocate(MIB + 512).size == MIB + 512
    assert allocator.reserved == 22 * MIB


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


def test_the_segment_grows_by_pages_and_fills_its_holes():
    allocator = Allocator()
    first = allocator.allocate(30 * MIB)
    assert allocator.reserved == 40 * MIB
    second = allocator.allocate(30 * MIB)
    assert (second.address, allocator.reserved) == (sum(first), 60 * MIB)
    allocator.release(first)
    assert allocator.allocate(25 * MIB).address == first.address
    allocator.allocate(5 * MIB)
    assert allocator.reserved == 60 * MIB
    allocator.release(second)
    # The free end of the segment counts: only one more page is needed.
    third = allocator.allocate(35 * MIB)
    assert (third.address, allocator.reserved) == (second.address, 80 * MIB)
