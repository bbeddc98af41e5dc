"""What each block of a traced step was for, seen from its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from runkey.memory.trace.events import BlockClass, Event, Mark, Pass, Phase, Trace
from runkey.memory.trace.tracker import Record, Tracker


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step in a tracker's log."""

    passes: tuple[Pass, ...]
    start: int
    end: int
    """Its part of the log."""
    before: tuple[int, ...]
    """Blocks alive at its start."""
    starts: tuple[tuple[int, Phase], ...]
    """Where in the log its phases begin."""
    inputs: frozenset[int]
    """Blocks allocated before the model ran and alive when it started."""
    gradients: Mapping[str, int]
    """Block of each parameter's gradient at the end."""


def classify(
    tracker: Tracker,
    setup: int,
    steps: Sequence[Step],
    persistent: Mapping[int, tuple[str, str]],
) -> tuple[tuple[Event, ...], list[Trace]]:
    """Events with classes, paths and phases.

    Args:
        tracker: its records and its log.
        setup: length of the log when all was built.
        steps: in their order.
        persistent: class and path of the blocks that outlive steps.
    """
    meanings: list[tuple[BlockClass, str]] = [("temporary", r.module) for r in tracker.records]
    for step in steps:
        _mark_step(tracker, step, meanings)
    for block, (kind, path) in persistent.items():
        meanings[block] = (cast(BlockClass, kind), path)
    setup_events = tuple(_event(tracker, meanings, index, "setup") for index in range(setup))
    return setup_events, [_trace(tracker, step, meanings) for step in steps]


def _mark_step(tracker: Tracker, step: Step, meanings: list[tuple[BlockClass, str]]) -> None:
    """Activations, inputs and gradients of a step."""
    alive: set[int] = set()
    phase_at = dict(step.starts)
    phase: Phase = "forward"
    for index in range(step.start, step.end):
        if index in phase_at:
            phase = phase_at[index]
            if phase == "backward":
                for block in alive:
                    meanings[block] = ("activation", meanings[block][1])
            alive.clear()
        kind, block, _ = tracker.log[index]
        if kind == "alloc":
            alive.add(block)
            if phase == "backward" and _is_recomputed(tracker.records[block]):
                meanings[block] = ("activation", meanings[block][1])
        else:
            alive.discard(block)
    for block in step.inputs:
        meanings[block] = ("input", "")
    for path, block in step.gradients.items():
        meanings[block] = ("gradient", path)


def _is_recomputed(record: Record) -> bool:
    """Allocated by a forward pass that ran again, and kept longer than it."""
    return record.recomputed and record.freed_at_node != record.node


def _trace(tracker: Tracker, step: Step, meanings: list[tuple[BlockClass, str]]) -> Trace:
    before = tuple(
        Event("alloc", block, tracker.records[block].bytes, *meanings[block], "setup")
        for block in step.before
    )
    events: list[Event] = []
    marks: list[Mark] = []
    starts = list(step.starts)
    phase: Phase = "forward"
    for index in range(step.start, step.end):
        while starts and starts[0][0] <= index:
            phase = starts.pop(0)[1]
            marks.append(Mark(index - step.start, phase))
        events.append(_event(tracker, meanings, index, phase))
    marks += [Mark(len(events), phase) for _, phase in starts]
    return Trace(step.passes, before, tuple(events), tuple(marks))


def _event(
    tracker: Tracker, meanings: list[tuple[BlockClass, str]], index: int, phase: Phase
) -> Event:
    kind, block, _ = tracker.log[index]
    return Event(kind, block, tracker.records[block].bytes, *meanings[block], phase)
