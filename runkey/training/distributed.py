"""The processes (ranks) of one training: which one this is, and what they tell each other.

torchrun, or `runkey.training.ranks`, tells each process by environment variables; without them
there is one process, for which everything here does nothing, on the same path.

Two groups join the ranks.  One, on the hosts, carries small Python objects (counts of boxes, the
wish to stop, metrics) and waits as long as it takes: rank 0 evaluates and writes while the others
wait.  The other, of the devices, carries sums of tensors.

torch's DistributedDataParallel is not used.  It adds gradients up during the last backward pass, so
a rank whose memory runs out there leaves the others in half of an exchange, from which its reducer
has no way back; and it wants a forward pass of ranks that have no image of a small last window.
Here each rank accumulates its share by itself, can discard it and try again in smaller pieces, and
all gradients travel in one sum when every rank has said that its share is there
(`runkey.training.optimizer`).  What that costs is the overlap of one exchange with one backward
pass.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from runkey.data.dataset import GlobalBatch
from runkey.errors import Interrupted, RunkeyError, StoppedError, TrainingError
from runkey.training.checkpoint.file import Checkpoints, Content
from runkey.training.interrupts import Interrupts
from runkey.training.ranks import Peers, this_process, watched

# What the loop asks for, made the same on all ranks: windows, metrics, checkpoints.


def synchronised_batches(
    windows: Iterator[GlobalBatch], world: World, interrupts: Interrupts
) -> Iterator[GlobalBatch]:
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


def broadcast_metrics(
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


class SharedCheckpoints:
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
def ending_together(world: World) -> Iterator[None]:
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


# Evaluations, or waiting for another training of the same key, take any time; ranks that die are
# noticed without this.
_AS_LONG_AS_IT_TAKES = timedelta(days=365)


class SharedError(StoppedError):
    """What went wrong on one rank, raised on all of them at the same place: rank 0 says it."""


class LostRankError(StoppedError):
    """Another rank has ended."""

    def __init__(self, text: str, rank: int | None = None) -> None:
        """Args: text: the line for the user.  rank: the one that ended, if that is known."""
        super().__init__(text)
        self.rank = rank


@dataclass(frozen=True, slots=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    """0..size-1; rank 0 prints, logs and writes."""
    local_rank: int = 0
    """Index among this machine's processes: the GPU to use."""
    size: int = 1
    """Number of processes."""
    device_group: dist.ProcessGroup | None = None
    """What joins the GPUs; None: the hosts' group does all."""
    peers: Peers | None = None
    """Notices when another process dies."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, logs and writes."""
        return self.rank == 0

    def gather[T](self, mine: T) -> list[T]:
        """What each rank gives, by rank; every rank calls this at the same place.

        Raises:
            LostRankError: another rank has ended.
        """
        if self.size == 1:
            return [mine]
        everyone: list[T] = [mine] * self.size
        with self._explained():
            dist.all_gather_object(everyone, mine)
        return everyone

    def share[T](self, value: T) -> T:
        """Rank 0's value; what the others give is not looked at.

        Raises:
            LostRankError: another rank has ended.
        """
        if self.size == 1:
            return value
        box = [value]
        with self._explained():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, wish: bool) -> bool:
        """Whether a rank wants it; every rank calls this at the same place."""
        return any(self.gather(wish))

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum over ranks, the same bits on each; on a GPU without waiting.

        Raises:
            LostRankError: another rank has ended.
        """
        if self.size > 1:
            with self._explained():
                dist.all_reduce(tensor, group=self.device_group if tensor.is_cuda else None)

    def leave(self) -> None:
        """From here on other ranks may end: all have come to the same end."""
        if self.peers:
            self.peers.leave()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Tell a broken connection as what it means."""
        try:
            yield
        except RuntimeError as error:
            lost = self.peers.lost() if self.peers else None
            what = lost.text if lost else f"rank {self.rank} lost its connection ({error})"
            raise LostRankError(
                f"{what}; training ends on all ranks", lost.rank if lost else None
            ) from error


def read_world(environment: Mapping[str, str] = os.environ) -> World:
    """The world that torchrun's variables describe; one process without them.

    Raises:
        TrainingError: the variables contradict each other.
    """
    world = World(
        rank=int(environment.get("RANK", "0")),
        local_rank=int(environment.get("LOCAL_RANK", "0")),
        size=int(environment.get("WORLD_SIZE", "1")),
    )
    if not 0 <= world.rank < world.size:
        raise TrainingError(
            f"environment: RANK={world.rank} is not below WORLD_SIZE={world.size}; "
            "start training with torchrun, or unset both"
        )
    return world


@contextmanager
def join_world(device: torch.device, watch: Peers | None = None) -> Iterator[World]:
    """Join the other processes, if there are any, until the block ends.

    Args:
        device: this rank's; GPUs are joined by NCCL, CPUs by gloo.
        watch: over ranks that are known before; ends when all watch each other.

    Raises:
        LostRankError: another rank has ended.
    """
    world = read_world()
    if world.size == 1:
        yield world
        return
    with _without_stdout():
        dist.init_process_group(
            "gloo", rank=world.rank, world_size=world.size, timeout=_AS_LONG_AS_IT_TAKES
        )
    group = dist.new_group(backend="nccl") if device.type == "cuda" else None
    processes = dict(enumerate(world.gather(this_process())))
    with watched(world.rank, processes) as peers:
        if watch:
            watch.close()
        try:
            yield World(world.rank, world.local_rank, world.size, group, peers)
        except BaseException:
            if group is not None:
                group.abort()  # what waits for a dead rank never ends by itself
            raise
        finally:
            peers.leave()
            dist.destroy_process_group()


@contextmanager
def _without_stdout() -> Iterator[None]:
    """Gloo prints a line for each rank that it has connected, and no setting stops it."""
    sys.stdout.flush()
    kept = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)
