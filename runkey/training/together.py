"""What the loop asks for, made the same on all ranks: windows, metrics, checkpoints.

With one process each of these is the thing itself.  With several, rank 0 evaluates and keeps the
checkpoints, and what goes wrong on one rank, or a signal that reaches one, ends all of them at the
same place.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from runkey.data.batch import Window
from runkey.errors import Interrupted, RunkeyError
from runkey.training.checkpoint.content import Checkpoints, Content
from runkey.training.distributed import SharedError, World
from runkey.training.interrupts import Interrupts


def windows_together(
    windows: Iterator[Window], world: World, interrupts: Interrupts
) -> Iterator[Window]:
    """This rank's share of each window, handed out when all ranks have theirs.

    Raises:
        SharedError: a rank has none, for its images cannot be read; on all ranks.
        Interrupted: a signal reached a rank; on all ranks.
    """
    if world.size == 1:
        yield from interrupts.each_at_once(windows)
        return
    while True:
        window, fault = None, ""
        try:
            window = next(windows, None)
        except RunkeyError as error:
            fault = f"rank {world.rank} of {world.size}: {error}"
        told = world.gather((fault, interrupts.signal, window is None))
        _raise_first(world, [fault for fault, _, _ in told], [number for _, number, _ in told])
        if window is None:
            return
        yield window


def metrics_together(
    evaluate: Callable[[], dict[str, float]], world: World, interrupts: Interrupts
) -> dict[str, float]:
    """Rank 0's evaluation, told to all; the others wait for it as long as it takes.

    Raises:
        SharedError: it failed; on all ranks.
        Interrupted: a signal reached rank 0; on all ranks.
    """
    if world.size == 1:
        with interrupts.at_once():
            return evaluate()
    metrics: dict[str, float] = {}
    fault, number = "", None
    if world.is_main:
        try:
            with interrupts.at_once():
                metrics = evaluate()
        except RunkeyError as error:
            fault = str(error)
        except Interrupted as stop:
            number = stop.number
    metrics, fault, number = world.share((metrics, fault, number))
    _raise_first(world, [fault], [number])
    return metrics


class CheckpointsTogether:
    """Rank 0's checkpoints: it alone saves them, all ranks go on from them."""

    def __init__(self, own: Checkpoints | None, world: World) -> None:
        """Take rank 0's; None on the other ranks, or where nothing is saved."""
        self._own = own
        self._world = world

    @property
    def path(self) -> Path | None:
        """See `Checkpoints.path`; None on ranks that write nothing."""
        return self._own.path if self._own else None

    @property
    def newest(self) -> int | None:
        """See `Checkpoints.newest`; None on ranks that save nothing."""
        return self._own.newest if self._own else None

    def due(self, step: int) -> bool:
        """See `Checkpoints.due`."""
        return self._own is not None and self._own.due(step)

    def save(self, content: Content, *, wait: bool = False, anchor: bool = False) -> None:
        """See `Checkpoints.save`."""
        if self._own:
            self._own.save(content, wait=wait, anchor=anchor)

    def load(self) -> Content | None:
        """See `Checkpoints.load`; it travels from rank 0, so no disk has to be shared."""
        return self._world.share(self._own.load() if self._own else None)

    def load_anchor(self, step: int) -> Content | None:
        """See `Checkpoints.load_anchor`."""
        return self._world.share(self._own.load_anchor(step) if self._own else None)


@contextmanager
def ended_together(world: World) -> Iterator[None]:
    """Ranks leave the block at the same time; after that, or an error, each may end by itself."""
    try:
        yield
        world.leave()
        world.gather(None)
    finally:
        world.leave()


def _raise_first(
    world: World, faults: Sequence[str], numbers: Sequence[signal.Signals | None]
) -> None:
    """Raise the same on all ranks.  Those with nothing to save end before the others."""
    for fault in faults:
        if fault:
            world.leave()
            raise SharedError(fault)
    for number in numbers:
        if number is not None:
            world.leave()
            raise Interrupted(number)
