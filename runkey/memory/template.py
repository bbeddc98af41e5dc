"""A traced training step as a template: its allocations for micro-batches of any size.

Every block's bytes are proportional to a known quantity of the micro-batch: a constant, the images,
images x cells of a feature map, images x tokens squared, ... Two traces of the largest shape give
the dependence on images; a third one, of another shape, tells the quantities apart.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runkey.data.sampler import Shape
from runkey.errors import TrainingError
from runkey.memory.trace.events import Event, MicroBatch, Trace, round_up
from runkey.units import MIB

_STRIDES = (1, 2, 4, 8, 16, 32)
# Attention kernels round the number of tokens up to these.
_PADS = (8, 16, 32)
# Rows and columns that TF's SAME padding adds before kernels of 3 and 5.
_SAME = (1, 3)
# Tokens of a ViT beside its patches: none, a class token, that and four registers.
_PREFIX = (0, 1, 5)


@dataclass(frozen=True, slots=True)
class Grid:
    """The cells that a body makes of an image."""

    strides: tuple[int, ...]
    """Pixels from token to token of each level, finest first."""
    pad_multiple: int = 1
    """The body sees images that are padded to multiples of so many pixels."""

    @property
    def is_plain(self) -> bool:
        """Return True for one level of unpadded images."""
        return len(self.strides) == 1 and self.pad_multiple == 1

    def tokens(self, height: int, width: int) -> int:
        """Return the tokens of an image of all levels."""
        return sum(-(-height // stride) * -(-width // stride) for stride in self.strides)


def quantities(one: MicroBatch, grid: Grid) -> NDArray[np.int64]:
    """Return what a block's bytes can be proportional to: first constants, then images times them.

    Simple numbers come before composed ones.
    """
    tokens = grid.tokens(one.height, one.width)
    plain = [1]
    if grid.pad_multiple > 1:  # before those of the image, which are never larger
        sides, multiple = (one.height, one.width), grid.pad_multiple
        height, width = (-(-side // multiple) * multiple for side in sides)
        plain += [height, width, *_cells(height, width).values()]
        for more in _SAME:
            plain += [(height // s + more) * (width // s + more) for s in _STRIDES]
        for more in _PREFIX:
            plain += _sequence((height // multiple) * (width // multiple) + more)
    plain += [one.height, one.width]
    for stride in grid.strides:
        plain += [-(-one.height // stride), -(-one.width // stride)]
    plain += _cells(one.height, one.width).values()
    plain += _sequence(tokens)[1:]
    if len(grid.strides) > 1:
        plain.append(tokens)
    # The second half begins with the images alone.
    return np.array([*plain, *(one.images * number for number in plain)], dtype=np.int64)


def _sequence(tokens: int) -> list[int]:
    """Return what attention over tokens allocates: by tokens, rounded up, and by pairs of them."""
    padded = [-(-tokens // pad) * pad for pad in _PADS]
    return [tokens, *padded, tokens * tokens, *(tokens * number for number in padded)]


def _cells(height: int, width: int) -> dict[int, int]:
    """Cells of a feature map by stride; every halving rounds up, as convolutions do."""
    cells = {}
    for stride in _STRIDES:
        cells[stride] = height * width
        height, width = -(-height // 2), -(-width // 2)
    return cells


_SMALLER, _LARGER = (0.8, 0.75, 0.7, 0.65, 0.6, 0.55), (1.3, 1.4, 1.5, 1.6, 1.7, 1.8)


def other_shape(worst: Shape, grid: Grid, queries: int = 0) -> Shape:
    """Return a shape that tells quantities apart, and that training treats like `worst`.

    Attention pads masks whose rows are no multiple of 8 or 16 tokens, and two-stage selection adds
    tokens if there are fewer than `queries`. Both allocate: both shapes must need it, or neither.
    Slices of a level of one row or column need no copies, so both must have such a level, or none.
    The shape is smaller; larger, if no smaller one will do; `worst`, if no shape will do.
    """
    (height, width), wanted = worst, _treatment(worst, grid, queries)
    for parts in (_SMALLER, _LARGER):
        steps = range(0, 2 * grid.strides[-1], 3)
        # Where more must be told apart, the sides vary one by one.
        together = [(less, less) for less in steps]
        apart = together if grid.is_plain else list(itertools.product(steps, steps))
        shapes = [
            (max(1, round(height * part) - rows), max(1, round(width * part * 0.87) - columns))
            for part in parts
            for rows, columns in apart
        ]
        alike = [one for one in shapes if _treatment(one, grid, queries) == wanted]
        if alike:
            break
    return max(alike, key=lambda one: _count_told_apart(worst, one, grid), default=worst)


def _treatment(shape: Shape, grid: Grid, queries: int) -> tuple[bool, ...]:
    tokens = grid.tokens(*shape)
    single = (side <= stride for stride in grid.strides for side in shape)
    return tokens % 8 == 0, tokens % 16 == 0, *single, tokens < queries


def _count_told_apart(worst: Shape, shape: Shape, grid: Grid) -> int:
    """Count the quantities that grow differently from one shape to the other."""
    one, other = (quantities(MicroBatch(1, *s, 0), grid) for s in (worst, shape))
    return len(np.unique(one / other))


class Laws:
    """Bytes of every block of a trace, for a micro-batch of any size."""

    def __init__(self, sizes: NDArray[np.int64], traced: Sequence[MicroBatch], grid: Grid) -> None:
        """Find which of `quantities` each block is proportional to.

        Args:
            sizes: [traces, blocks] bytes.
            traced: [traces] micro-batches; the first two differ in the images only.
            grid: of the body.
        """
        known = np.stack([quantities(one, grid) for one in traced]).astype(np.float64)
        blocks = sizes.shape[1]
        self._grid, self._index = grid, np.zeros(blocks, dtype=np.int64)
        self._slope, self._constant = np.zeros(blocks), np.zeros(blocks)
        unknown = np.ones(blocks, dtype=bool)
        for column, values in enumerate(known.T):
            per_unit = sizes / values[:, None]
            fits = unknown & (per_unit == per_unit[0]).all(0)
            self._index[fits], self._slope[fits] = column, per_unit[0, fits]
            unknown &= ~fits
        # Affine in the images whatever the shape: too much for all shapes below the largest.
        loose = np.flatnonzero(unknown)
        images = np.array([[one.images] for one in traced])
        rise = np.maximum(0, sizes[1, loose] - sizes[0, loose]) / (images[1] - images[0])
        self._index[loose], self._slope[loose] = known.shape[1] // 2, rise
        self._constant[loose] = (sizes[:, loose] - rise * images).max(0)
        self.loose = len(loose)
        """Number of blocks that follow no law exactly, and are bounded instead."""

    def bytes(self, one: MicroBatch) -> NDArray[np.int64]:
        """Return the bytes of each block for such a micro-batch."""
        values = self._constant + self._slope * quantities(one, self._grid)[self._index]
        return np.rint(values).astype(np.int64)


_CONVOLUTIONS = ("backbone.", "input_proj")
"""Modules whose operations may need a large workspace."""
_LEAST_WORKSPACE = MIB


def _difference(a: Trace, events: list[Event], b: Trace, others: list[Event]) -> str:
    """Name the first module that allocates other blocks in one of two traces."""
    pairs = itertools.zip_longest(events, others)
    event = next((one or other for one, other in pairs if one != other), None)
    first, second = (
        f"{one.images} x {one.height} x {one.width}"
        for one in (a.micro_batches[0], b.micro_batches[0])
    )
    return (
        f"memory cannot be predicted: {getattr(event, 'module', '') or 'the step'} allocates other"
        f" tensors for {second} (images x height x width) than for {first}; take another"
        " model.backbone, or other data.short_sides and data.long_side"
    )


class Template:
    """A step over two micro-batches, of which the second stands for all later ones."""

    def __init__(self, traces: Sequence[Trace], grid: Grid) -> None:
        """Find the law of each block.

        Args:
            traces: of the same step, each over two equal micro-batches. The first two differ in the
                images only, the third in the shape too.
            grid: of the body.

        Raises:
            TrainingError: the traces differ in more than bytes.
        """
        traces = [_numbered(trace) for trace in traces]
        every = [[*sorted(one.before, key=lambda e: e.block), *one.events] for one in traces]
        kinds = [[event._replace(bytes=0) for event in events] for events in every]
        for trace, kind in zip(traces[1:], kinds[1:], strict=True):
            if kind != kinds[0] or trace.marks != traces[0].marks:
                raise TrainingError(_difference(traces[0], kinds[0], trace, kind))
        sizes = np.array([[e.bytes for e in events if e.kind == "alloc"] for events in every])
        self.laws = Laws(sizes, [trace.micro_batches[0] for trace in traces], grid)
        self._trace = trace = traces[0]
        self._replacements = _replacements(trace)
        moves = [
            (e.kind == "alloc", e.block, e.kind == "alloc" and e.module.startswith(_CONVOLUTIONS))
            for e in trace.events
        ]
        is_allocation, self._blocks, self._convolutions = map(np.array, zip(*moves, strict=True))
        self._signs = np.where(is_allocation, 1, -1)
        second = [mark.start for mark in trace.marks if mark.phase == "forward"][1]
        update = [mark.start for mark in trace.marks if mark.phase == "optimizer"][-1]
        self._first, self._later, self._update = (
            moves[:second],
            moves[second:update],
            moves[update:],
        )

    def gradient_bytes(self) -> int:
        """Return the bytes of all gradients."""
        made = [e for e in self._trace.events if e.class_ == "gradient" and e.kind == "alloc"]
        return sum(round_up(event.bytes) for event in made)

    def peak(self, one: MicroBatch, workspace_share: float = 0.0) -> int:
        """Return the most bytes alive in a step over two such micro-batches.

        `workspace_share` is the bytes of a convolution's workspace, as a part of its result.
        """
        sizes = round_up(self.laws.bytes(one))
        before = sizes[[event.block for event in self._trace.before]].sum()
        alive = before + (sizes[self._blocks] * self._signs).cumsum()
        workspaces = workspace_share * sizes[self._blocks] * self._convolutions
        return int((alive + workspaces).max(initial=0))

    def at(self, one: MicroBatch) -> Trace:
        """Return the trace of a step over two such micro-batches."""
        sizes = self.laws.bytes(one).tolist()
        trace = _changed(self._trace, lambda event: event._replace(bytes=sizes[event.block]))
        return replace(trace, micro_batches=(one, one))

    def replay(self, steps: Sequence[Sequence[MicroBatch]], workspace_share: float) -> Allocator:
        """Run the steps of a training in the model of the allocator, and return it.

        `workspace_share`: see `peak`; a workspace is freed when its operation ends.
        """
        sizes = {one: self.laws.bytes(one).tolist() for step in steps for one in step}
        constant, allocator = sizes[steps[0][0]], Allocator()
        kinds = [(event.block, event.class_) for event in self._trace.before]
        # Gradients are alive from the first step's backward pass on.
        built = [block for block, kind in kinds if kind not in ("optimizer", "gradient")]
        live = {block: allocator.allocate(constant[block]) for block in built}
        # Only the first step allocates the optimizer's state.
        state = [block for block, kind in kinds if kind == "optimizer"]
        for step in steps:
            parts = [(self._first, step[0]), *((self._later, one) for one in step[1:])]
            for moves, one in [*parts, (self._update, step[0])]:
                if moves is self._update:
                    live |= {block: allocator.allocate(constant[block]) for block in state}
                    state = []
                for is_allocation, block, convolves in moves:
                    # What a pass left behind is replaced when the pass comes again; what a pass
                    # that is left out would have allocated is not freed.
                    old = live.pop(block, None)
                    if is_allocation:
                        live[block] = allocator.allocate(sizes[one][block])
                        workspace = round(workspace_share * sizes[one][block])
                        if convolves and workspace >= _LEAST_WORKSPACE:
                            allocator.release(allocator.allocate(workspace))
                    if old is not None:
                        allocator.release(old)
            for replacement, block in self._replacements:
                if replacement in live:
                    old = live.pop(block, None)
                    live[block] = live.pop(replacement)
                    if old is not None:
                        allocator.release(old)
        return allocator


def _numbered(trace: Trace) -> Trace:
    """Number the blocks from 0: those alive at the start by what they are, others in order."""
    numbers: dict[int, int] = {}
    for event in (*sorted(trace.before, key=_meaning), *trace.events):
        if event.kind == "alloc":
            numbers[event.block] = len(numbers)
    return _changed(trace, lambda event: event._replace(block=numbers[event.block]))


def _changed(trace: Trace, change: Callable[[Event], Event]) -> Trace:
    before, events = (tuple(map(change, part)) for part in (trace.before, trace.events))
    return replace(trace, before=before, events=events)


def _meaning(event: Event) -> tuple[str, str, int]:
    return event.class_, event.module, event.bytes


def _replacements(trace: Trace) -> list[tuple[int, int]]:
    """Pair each block alive only at the step's end with the block that it replaces.

    What is alive at the end is what was alive at the start, but some of it was allocated again.
    """
    start = {event.block: event for event in trace.before}
    end = dict(start)
    for event in trace.events:
        if event.kind == "alloc":
            end[event.block] = event
        else:
            del end[event.block]
    replaced: defaultdict[tuple[str, str, int], list[int]] = defaultdict(list)
    for block, event in start.items():
        if block not in end:
            replaced[_meaning(event)].append(block)
    new = [event for block, event in end.items() if block not in start]
    return [(event.block, replaced[_meaning(event)].pop(0)) for event in new]


# A model of torch's CUDA caching allocator: one stream, expandable segments, no limit. It follows
# `CUDACachingAllocator.cpp` with `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`, as training
# uses it: the same requests get the same addresses, and the same `max_memory_allocated` and
# `max_memory_reserved` (benchmarks/gpu_steps.py).


_SMALL_REQUEST = MIB
_SMALL_PAGE, _LARGE_PAGE = 2 * MIB, 20 * MIB
# Where the segment of large blocks starts: behind more small ones than any GPU has memory for.
_LARGE_START = _LARGE_PAGE * 2**26


class Segment:
    """The addresses for small or for large requests; `page` is the bytes by which it grows."""

    def __init__(self, start: int, page: int) -> None:
        self.start = self.end = start
        self.page = page
        self.free: list[tuple[int, int]] = []
        """(size, address) of the free blocks, smallest first."""
        self._sizes: dict[int, int] = {}
        """Size of each free block by its address."""
        self._starts: dict[int, int] = {}
        """Address of each free block by its end."""

    def take(self, size: int) -> int:
        """Return the address of `size` bytes: of the best fit, or of new pages at the end."""
        if not self.free or self.free[-1][0] < size:
            missing = size - (self.end - self._starts.get(self.end, self.end))
            new = -(-missing // self.page) * self.page
            self.end += new
            self.give(self.end - new, new)
        found, address = self.free[bisect_left(self.free, (size, 0))]
        self._remove(address)
        if found > size:
            self._add(address + size, found - size)
        return address

    def give(self, address: int, size: int) -> None:
        """Free a block, joined with free neighbours."""
        end = address + size
        if end in self._sizes:
            end += self._remove(end)
        if address in self._starts:
            address = self._starts[address]
            self._remove(address)
        self._add(address, end - address)

    def _add(self, address: int, size: int) -> None:
        insort(self.free, (size, address))
        self._sizes[address] = size
        self._starts[address + size] = address

    def _remove(self, address: int) -> int:
        size = self._sizes.pop(address)
        del self._starts[address + size]
        del self.free[bisect_left(self.free, (size, address))]
        return size


class Block(NamedTuple):
    """A block in use."""

    address: int
    size: int


class Allocator:
    """The allocator; it counts as `torch.cuda.memory_allocated` and `memory_reserved` do."""

    def __init__(self) -> None:
        self.allocated = self.max_allocated = 0
        self.small, self.large = Segment(0, _SMALL_PAGE), Segment(_LARGE_START, _LARGE_PAGE)

    @property
    def reserved(self) -> int:
        """Bytes in pages. None is ever returned, so this is the most that was reserved, too."""
        return sum(segment.end - segment.start for segment in (self.small, self.large))

    def segment(self, size: int) -> Segment:
        """Return the segment of blocks of that many bytes."""
        return self.small if size <= _SMALL_REQUEST else self.large

    def allocate(self, size: int) -> Block:
        """Return a block of at least `size` bytes."""
        size = round_up(max(1, size))
        self.allocated += size
        self.max_allocated = max(self.max_allocated, self.allocated)
        return Block(self.segment(size).take(size), size)

    def release(self, block: Block) -> None:
        """Free a block; its memory stays reserved."""
        self.allocated -= block.size
        self.segment(block.size).give(*block)


@dataclass(frozen=True, slots=True)
class AllocatorReplay:
    """What sampled training steps did to the model of the allocator."""

    images: int
    """Most images of a micro-batch."""
    batches: int
    """Number of micro-batches."""
    allocated_bytes: int
    """Most bytes alive at once, with a convolution's workspace."""
    reserved_bytes: int
    """Most bytes that the allocator held."""


def replay_steps(
    template: Template, steps: Sequence[Sequence[MicroBatch]], workspace_share: float
) -> AllocatorReplay:
    """Replay training steps in the model of the allocator; arguments as for `Template.replay`."""
    allocator = template.replay(steps, workspace_share)
    return AllocatorReplay(
        images=max(one.images for step in steps for one in step),
        batches=sum(len(step) for step in steps),
        allocated_bytes=allocator.max_allocated,
        reserved_bytes=allocator.reserved,
    )
