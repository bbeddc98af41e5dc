"""Replay a recorded training in the model of the allocator: what torch's counters would show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from runkey.memory.template import Allocator, Block
from runkey.memory.trace.events import Event, Trace


@dataclass(frozen=True, slots=True)
class Peaks:
    """`max_memory_allocated` and `max_memory_reserved`, bytes."""

    allocated: int
    reserved: int


def replay_training(setup: Iterable[Event], first: Trace, steps: Sequence[Trace]) -> Peaks:
    """Replay a training from its start.

    Args:
        setup: events while the model is built.
        first: the first step, which allocates the optimizer's state.
        steps: later steps. Each frees what it found and leaves the same (`carried`); the first of
            them must follow `first` in its recording.
    """
    allocator = Allocator()
    blocks: dict[int, Block] = {}
    _run(allocator, blocks, (*setup, *first.events))
    for trace in steps:
        _run(allocator, blocks, trace.events)
        for old, new in carried(trace):
            blocks[old] = blocks.pop(new)
    return Peaks(allocator.max_allocated, allocator.reserved)


def carried(trace: Trace) -> list[tuple[int, int]]:
    """Pair each block of `before` that the step frees with the block that replaces it."""
    before = {event.block: event for event in trace.before}
    gone: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    new: dict[int, Event] = {}
    for event in trace.events:
        meaning = (event.class_, event.module, event.bytes)
        if event.kind == "alloc":
            new[event.block] = event
        elif event.block in before:
            gone[meaning].append(event.block)
        else:
            del new[event.block]
    pairs = [(gone[e.class_, e.module, e.bytes].pop(0), e.block) for e in new.values()]
    assert not any(gone.values()), "the step does not leave what it found"
    return pairs


def _run(allocator: Allocator, blocks: dict[int, Block], events: Iterable[Event]) -> None:
    for event in events:
        if event.kind == "alloc":
            blocks[event.block] = allocator.allocate(event.bytes)
        else:
            allocator.release(blocks.pop(event.block))
