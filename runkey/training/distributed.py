"""Signals, and collective communication between the processes (ranks) of one training.

Environment variables set by torchrun, or by `runkey.training.ranks`, say which rank this process
is; without them there is one process, and everything here does nothing, on the same code path.

Two process groups connect the ranks. The hosts' group carries small Python objects (counts of
boxes, signals, metrics) and waits as long as it takes: rank 0 evaluates and writes while the others
wait. The devices' group carries sums of tensors.

torch's DistributedDataParallel is not used. It sums gradients during the last backward pass, so a
rank whose memory runs out there leaves the others in the middle of an exchange, which its reducer
cannot recover from; and it needs a forward pass on ranks that have no image of a small last batch.
Here each rank accumulates its share alone, can discard it and try again in smaller micro-batches,
and one all-reduce sums all gradients when every rank has reported success
(`runkey.training.optimizer`). The cost is that this exchange does not overlap with a backward pass.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor

from runkey.data.dataset import GlobalBatch
from runkey.errors import Interrupted, RunkeyError, StoppedError
from runkey.processes import this_process
from runkey.training.device import check_gpus
from runkey.training.ranks import RankMonitor, launched_by_torchrun, read_place
from runkey.units import counted

logger = logging.getLogger("runkey")

# Evaluations, or waiting for another training of the same key, take any time; the monitor notices
# ranks that die.
_AS_LONG_AS_IT_TAKES = timedelta(days=365)


class Interrupts:
    """SIGTERM and SIGINT during training: a step is never interrupted half-way.

        with Interrupts() as interrupts:      # signals raise `Interrupted` at once ...
            with interrupts.held():           # ... but in this block only
                step()
                interrupts.check()            # ... where it is checked for
                with interrupts.at_once():    # ... or in a part that may be given up half-way
                    evaluate()

    Without a `with` block around it, no signal is handled. A second one ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The one that has come; None: none."""
        self._held = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Handle signals from here on, if this is the main thread: others cannot."""
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGTERM, signal.SIGINT)
            self._before = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers from before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Only remember a signal until the block ends or calls `check`."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.check()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end this block, inside `held`."""
        self._held = False
        self.check()
        try:
            yield
        finally:
            self._held = True

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.signal is not None:
            raise Interrupted(self.signal)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signal = signal.Signals(number)
        # Not print: it may be what was interrupted.
        line = f"{self.signal.name}: stopping as soon as nothing is lost; again ends it at once\n"
        os.write(2, line.encode())
        if not self._held:
            self.check()


class SharedError(StoppedError):
    """An error of one rank, raised on all of them at the same place; rank 0 reports it."""


class LostRankError(StoppedError):
    """Another rank has ended."""

    def __init__(self, text: str, rank: int | None = None) -> None:
        super().__init__(text)
        self.rank = rank
        """The one that ended, if that is known."""


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of a training, as seen by one of them.

    What they exchange raises LostRankError if another rank has ended.
    """

    rank: int = 0
    """0..size-1; rank 0 logs and writes."""
    local_rank: int = 0
    """Index among this machine's processes: the GPU to use."""
    size: int = 1
    """Number of processes."""
    device_group: dist.ProcessGroup | None = None
    """Connects the GPUs; None: the hosts' group does everything."""
    monitor: RankMonitor | None = None
    """Notices when another process dies."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs and writes."""
        return self.rank == 0

    def gather[T](self, mine: T) -> list[T]:
        """Return what each rank gives, by rank; every rank calls this at the same place."""
        if self.size == 1:
            return [mine]
        everyone: list[T] = [mine] * self.size
        with self._naming_lost_ranks():
            dist.all_gather_object(everyone, mine)
        return everyone

    def together[T](self, work: Callable[[], T], *, named: bool = True) -> list[T]:
        """Do each rank's part of some work; return what it gave, by rank, when all have done it.

        Raises, on all ranks:
            SharedError: one of them failed, which the text tells if it is to be `named`.
            Interrupted: a signal reached one of them.
        """
        if self.size == 1:
            return [work()]
        mine: Any = None
        fault, number = "", None
        try:
            mine = work()
        except RunkeyError as error:
            fault = f"rank {self.rank} of {self.size}: {error}" if named else str(error)
        except Interrupted as stop:
            number = stop.number
        results, faults, numbers = zip(*self.gather((mine, fault, number)), strict=True)
        if any(faults) or any(numbers):
            self.shutdown()
        for fault in filter(None, faults):
            raise SharedError(fault)
        for number in filter(None, numbers):
            raise Interrupted(number)
        return list(results)

    def broadcast[T](self, value: T) -> T:
        """Return rank 0's value; what the others give is ignored."""
        if self.size == 1:
            return value
        box = [value]
        with self._naming_lost_ranks():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum over ranks, the same bits on each; a GPU need not wait."""
        if self.size > 1:
            with self._naming_lost_ranks():
                dist.all_reduce(tensor, group=self.device_group if tensor.is_cuda else None)

    def shutdown(self) -> None:
        """Allow other ranks to end: all have reached the same end."""
        if self.monitor:
            self.monitor.stand_down()

    @contextmanager
    def _naming_lost_ranks(self) -> Iterator[None]:
        """Turn a broken connection into the name of the rank that ended."""
        try:
            yield
        except RuntimeError as error:
            lost = self.monitor.lost() if self.monitor else None
            what = lost.text if lost else f"rank {self.rank} lost its connection ({error})"
            raise LostRankError(
                f"{what}; training ends on all ranks", lost.rank if lost else None
            ) from error


def read_world(environment: Mapping[str, str] = os.environ) -> World:
    """Read the world of torchrun's variables, if they are set; TrainingError if they clash."""
    return World(*read_place(environment))


@contextmanager
def join_world(device: torch.device, monitor: RankMonitor | None = None) -> Iterator[World]:
    """Connect to the other processes, if there are any, until the block ends.

    NCCL connects GPUs, gloo CPUs. Only rank 0 logs: the others' messages are dropped meanwhile. A
    monitor of ranks that are known before is closed when all monitor each other.
    """
    world = read_world()
    if world.size == 1:
        yield world
        return
    if world.is_main and monitor is None:
        logger.info(
            f"waiting at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} for the other"
            f" {counted(world.size - 1, 'process')} that WORLD_SIZE={world.size} names (if it is"
            " left over: Ctrl-C, `unset RANK WORLD_SIZE`)"
        )
    with _without_stdout(), _ended_by_signals():
        dist.init_process_group(
            "gloo", rank=world.rank, world_size=world.size, timeout=_AS_LONG_AS_IT_TAKES
        )
    group = dist.new_group(backend="nccl") if device.type == "cuda" else None
    processes = dict(enumerate(world.gather(this_process())))
    level = logger.level
    if not world.is_main:
        logger.setLevel(logging.CRITICAL + 1)
    with closing(RankMonitor(world.rank, processes)) as everyone:
        if monitor:
            monitor.close()
        try:
            yield World(world.rank, world.local_rank, world.size, group, everyone)
        except BaseException:
            if group is not None:
                group.abort()  # what waits for a dead rank never ends by itself
            raise
        finally:
            everyone.stand_down()
            dist.destroy_process_group()
            logger.setLevel(level)


def count_ranks(processes: int | Literal["auto"], device: torch.device, images: int) -> int:
    """Return how many processes train together: torchrun's number, else `runtime.processes`.

    auto: one per GPU, and at most one per image of an optimizer step. Raises TrainingError if there
    are fewer GPUs than that.
    """
    on_gpus = device.type == "cuda"
    if launched_by_torchrun():
        return read_world().size
    if processes == "auto":
        return min(torch.cuda.device_count(), images) if on_gpus else 1
    if on_gpus and processes > 1:
        check_gpus(processes)
    return processes


@contextmanager
def _without_stdout() -> Iterator[None]:
    """Silence gloo, which prints a line for each rank it connects and has no setting for it."""
    sys.stdout.flush()
    saved = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nothing)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let a signal end this process at once: torch waits without looking at Python's handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def synchronised_batches(
    batches: Iterator[GlobalBatch], world: World, interrupts: Interrupts
) -> Iterator[GlobalBatch]:
    """Yield this rank's share of each global batch, once all ranks have theirs.

    Raises on all ranks what reading them raises, or a signal; see `World.together`.
    """
    batch: GlobalBatch | None = None

    def fetch() -> None:
        nonlocal batch
        with interrupts.at_once():  # a signal ends the wait for a batch
            batch = next(batches, None)

    while True:
        world.together(fetch)
        if batch is None:
            return
        yield batch


def broadcast_metrics(
    evaluate: Callable[[], dict[str, float]], world: World, interrupts: Interrupts
) -> dict[str, float]:
    """Evaluate on rank 0 and broadcast the metrics; the others wait as long as it takes.

    Raises on all ranks what the evaluation raises, or a signal; see `World.together`.
    """

    def work() -> dict[str, float]:
        if not world.is_main:
            return {}
        with interrupts.at_once():
            return evaluate()

    return world.together(work, named=False)[0]
