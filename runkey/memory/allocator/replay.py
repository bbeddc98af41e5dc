"""Traces through the allocator: what `max_memory_allocated` and `max_memory_reserved` would be.

    replay = Replay(session.setup, session.first, budget=..., expandable=...)
    for trace in traces:                       # of one session, in any order
        replay.step(trace)
    replay.result

Every step leaves what it found (`Session.steady`), so any step can follow any other of its session.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from runkey.memory.allocator.blocks import Block
from runkey.memory.allocator.model import Allocator, OutOfBudgetError
from runkey.memory.trace.events import Event, Trace


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
