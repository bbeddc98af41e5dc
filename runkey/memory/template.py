"""A traced training step as a template: the same events for any window, with the bytes to match."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from runkey.memory.laws import Laws, find_laws
from runkey.memory.line import MIB
from runkey.memory.timeline import ROUND_BYTES, rounded
from runkey.memory.trace.events import Event, Pass, Trace

_CONVOLUTIONS = ("backbone.", "input_proj")
"""Modules whose operations may take a workspace worth speaking of."""
_LEAST_WORKSPACE = MIB


Move = tuple[bool, int, int]
"""For an allocator: whether it is an allocation, number of the block, bytes."""


class Template:
    """A step over a window of two micro-batches, of which the second stands for all later ones.

    Blocks are numbered from 0: those that are alive at its start first.
    """

    def __init__(self, trace: Trace, laws: Laws) -> None:
        """Made by `make_template`."""
        self._trace = trace
        self._laws = laws
        self._numbers = _numbers(trace)
        self._before = [self._numbers[event.block] for event in trace.before]
        kinds = [(self._numbers[event.block], event.class_) for event in trace.before]
        self._late = [block for block, kind in kinds if kind == "optimizer"]
        # Gradients are there from the first step's backward pass on.
        self._early = [block for block, kind in kinds if kind not in ("optimizer", "gradient")]
        self._heirs = _heirs(trace, self._numbers)
        every = [self._compact(event) for event in trace.events]
        self._blocks = np.array([block for _, block, _ in every])
        self._signs = np.array([1 if is_allocation else -1 for is_allocation, _, _ in every])
        self._works = np.array([works for _, _, works in every])
        first, later, last = _ranges(trace)
        self._first, self._later, self._last = (every[part] for part in (first, later, last))

    @property
    def loose_blocks(self) -> int:
        """Blocks whose bytes are bounded, not known, away from the traced batches."""
        return self._laws.loose

    def gradient_bytes(self) -> int:
        """Bytes of all gradients."""
        made = [e for e in self._trace.events if e.class_ == "gradient" and e.kind == "alloc"]
        return sum(rounded(event.bytes) for event in made)

    def peak(self, one: Pass, workspace_share: float = 0.0) -> int:
        """Most bytes alive in a step over two such micro-batches, a convolution's workspace too."""
        sizes = -(-self._laws.bytes(one) // ROUND_BYTES) * ROUND_BYTES
        alive = sizes[self._before].sum() + (sizes[self._blocks] * self._signs).cumsum()
        return int((alive + workspace_share * sizes[self._blocks] * self._works).max(initial=0))

    def at(self, one: Pass) -> Trace:
        """The trace of a window of two such micro-batches."""
        sizes = self._laws.bytes(one).tolist()

        def resized(event: Event) -> Event:
            return event._replace(bytes=sizes[self._numbers[event.block]])

        return Trace(
            passes=(one, one),
            before=tuple(map(resized, self._trace.before)),
            events=tuple(map(resized, self._trace.events)),
            marks=self._trace.marks,
        )

    def moves(self, windows: Sequence[Sequence[Pass]], workspace_share: float) -> Iterator[Move]:
        """What an allocator sees of training steps.

        Args:
            windows: the micro-batches of each step.
            workspace_share: bytes of a workspace that a convolution takes while it runs, as a part
                of its result.
        """
        sizes = {one: self._laws.bytes(one).tolist() for window in windows for one in window}
        new = itertools.count()
        constant = sizes[windows[0][0]]
        live = {block: (next(new), constant[block]) for block in self._early}
        yield from ((True, *block) for block in live.values())
        late = self._late
        for window in windows:
            parts = [(self._first, window[0]), *((self._later, one) for one in window[1:])]
            for events, one in [*parts, (self._last, window[0])]:
                bytes_of = sizes[one]
                if events is self._last:
                    # The first step makes the optimizer's state, among what it has left over.
                    made = {block: (next(new), constant[block]) for block in late}
                    yield from ((True, *block) for block in made.values())
                    live |= made
                    late = []
                for is_allocation, block, works in events:
                    # What a pass left behind is replaced when the pass comes again, and what a pass
                    # would have made that was left out cannot be freed.
                    old = live.pop(block, None)
                    if is_allocation:
                        live[block] = number, size = next(new), bytes_of[block]
                        yield True, number, size
                        workspace = round(workspace_share * size) if works else 0
                        if workspace >= _LEAST_WORKSPACE:
                            number = next(new)
                            yield True, number, workspace
                            yield False, number, workspace
                    if old is not None:
                        yield False, *old
            for heir, block in self._heirs:
                if heir in live:
                    old = live.pop(block, None)
                    live[block] = live.pop(heir)
                    if old is not None:
                        yield False, *old

    def _compact(self, event: Event) -> tuple[bool, int, bool]:
        is_allocation = event.kind == "alloc"
        works = is_allocation and event.module.startswith(_CONVOLUTIONS)
        return is_allocation, self._numbers[event.block], works


def make_template(traces: Sequence[Trace], stride: int) -> Template:
    """A template from traces of the same step over windows of two equal micro-batches.

    Args:
        traces: the first two differ in the images alone, the third in the shape too.
        stride: pixels from token to token.

    Raises:
        ValueError: the traces differ in more than bytes.
    """
    numbers = [_numbers(trace) for trace in traces]
    kinds = [_structure(t, n) for t, n in zip(traces, numbers, strict=True)]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError("the traced steps allocate different blocks")
    sizes = np.array([_sizes(t, n) for t, n in zip(traces, numbers, strict=True)])
    return Template(traces[0], find_laws(sizes, [t.passes[0] for t in traces], stride))


def _numbers(trace: Trace) -> dict[int, int]:
    """Numbers from 0 for blocks: those alive at the start by what they are, others in order."""
    numbers: dict[int, int] = {}
    for event in (*_sorted(trace.before), *trace.events):
        if event.kind == "alloc":
            numbers[event.block] = len(numbers)
    return numbers


def _sorted(before: Sequence[Event]) -> list[Event]:
    """In an order that does not depend on the step before."""
    return sorted(before, key=lambda event: (event.class_, event.module, event.bytes))


def _structure(trace: Trace, numbers: dict[int, int]) -> list[tuple[object, ...]]:
    """Everything about the events but bytes."""
    events = (*_sorted(trace.before), *trace.events)
    every = [(e.kind, numbers[e.block], e.class_, e.module) for e in events]
    return [*every, *trace.marks]


def _sizes(trace: Trace, numbers: dict[int, int]) -> list[int]:
    """Bytes of each block."""
    sizes = [0] * len(numbers)
    for event in (*trace.before, *trace.events):
        sizes[numbers[event.block]] = event.bytes
    return sizes


def _ranges(trace: Trace) -> tuple[slice, slice, slice]:
    """Events of the first micro-batch, of the second, and of the update."""
    forwards = [mark.start for mark in trace.marks if mark.phase == "forward"]
    last = [mark.start for mark in trace.marks if mark.phase == "optimizer"][-1]
    return slice(0, forwards[1]), slice(forwards[1], last), slice(last, len(trace.events))


def _heirs(trace: Trace, numbers: dict[int, int]) -> list[tuple[int, int]]:
    """Pairs: a block alive at the step's end, and the one that stands there at its start.

    What is alive at the end is what was alive at the start, but for having been made anew.
    """
    start = {numbers[event.block]: event for event in trace.before}
    end = dict(start)
    for event in trace.events:
        if event.kind == "alloc":
            end[numbers[event.block]] = event
        else:
            del end[numbers[event.block]]
    waiting: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for block, event in start.items():
        if block not in end:
            waiting[event.class_, event.module, event.bytes].append(block)
    return [
        (block, waiting[event.class_, event.module, event.bytes].pop(0))
        for block, event in end.items()
        if block not in start
    ]
