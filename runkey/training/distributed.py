"""Signals, and collective communication between the processes (ranks) of one training.

Environment variables set by torchrun, or by `runkey.training.ranks`, say which rank this process
is; without them there is one process, and everything here does nothing, on the same code path.

Two process groups connect the ranks. The hosts' group carries small Python objects (counts of
boxes, signals, metrics) and waits as long as it takes: rank 0 evaluates and writes while the others
wait. The devices' group carries sums of tensors. Beside them `runkey.training.rank_monitor` watches
the other ranks, and disconnects the hosts' group when one is lost: gloo would wait for it for ever.

torch's DistributedDataParallel is not used. A rank whose memory runs out in the last backward pass
leaves the others in the middle of an exchange, which its reducer cannot recover from; and it needs
a forward pass on ranks that have no image of a small last batch. Here, too, gradients are sent in
buckets while the last backward pass goes on (`runkey.training.optimizer.GradientExchange`), but a
rank always sends all of them, zeros if it has to. Then each reports whether its part counts; if one
does not, all ranks discard the sums and compute the global batch again.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from runkey.data.dataset import GlobalBatch
from runkey.errors import Interrupted, RunkeyError, StoppedError, TrainingError
from runkey.processes import this_process
from runkey.training.device import check_gpus
from runkey.training.rank_monitor import (
    WAKE,
    Peer,
    RankMonitor,
    address_towards,
    connect_ranks,
    interface_of,
)
from runkey.training.ranks import launched_by_torchrun, read_place
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
        self._held = self._gives_up = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Handle signals from here on, if this is the main thread: others cannot."""
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGTERM, signal.SIGINT)
            self._before = {number: signal.signal(number, self._handle) for number in signals}
            self._before[WAKE] = signal.signal(WAKE, self._give_up)
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
        """Let a signal, or the loss of another rank, end this block, inside `held`."""
        self._held = False
        self.check()
        self._gives_up = True
        try:
            yield
        finally:
            self._gives_up, self._held = False, True

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.signal is not None:
            raise Interrupted(self.signal)

    def _give_up(self, *_: object) -> None:
        if self._gives_up:  # what all ranks exchange afterwards names the rank
            raise LostRankError("another rank is lost")

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


class SharedFaultError(SharedError):
    """One that would come again elsewhere, such as an image that cannot be read."""

    exit_code = RunkeyError.exit_code


class LostRankError(StoppedError):
    """Another rank has ended, is suspended, or cannot be reached."""

    def __init__(self, text: str, rank: int | None = None) -> None:
        super().__init__(text)
        self.rank = rank
        """Which one, if that is known."""


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
        fault, code, number = "", 0, None
        try:
            mine = work()
        except RunkeyError as error:
            fault = f"rank {self.rank} of {self.size}: {error}" if named else str(error)
            code = error.exit_code
        except Interrupted as stop:
            number = stop.number
        everyone = self.gather((mine, fault, code, number))
        results, faults, codes, numbers = zip(*everyone, strict=True)
        if any(faults) or any(numbers):
            self.shutdown()
        for fault, code in zip(faults, codes, strict=True):
            if fault:
                raise (SharedError if code == SharedError.exit_code else SharedFaultError)(fault)
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

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        """Start what `all_reduce` does, on several ranks; return a function that waits for it.

        All ranks start the same sums in the same order. The tensor must not be used before.
        """
        group = self.device_group if tensor.is_cuda else None
        with self._naming_lost_ranks():
            work = dist.all_reduce(tensor, group=group, async_op=True)

        def wait() -> None:
            with self._naming_lost_ranks():
                work.wait()

        return wait

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
    grace = _GPU_SECONDS if device.type == "cuda" else _STEP_SECONDS
    with closing(_Start(world, grace).wait(monitor)) as everyone:
        group = dist.new_group(backend="nccl") if device.type == "cuda" else None
        level = logger.level
        if not world.is_main:
            logger.setLevel(logging.CRITICAL + 1)
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


_GPU_SECONDS = 10.0
"""Time for a process to end when a rank is lost: what a GPU waits for cannot be interrupted."""
_STEP_SECONDS = 600.0
"""The same on a CPU, where all waiting is: a step may take long, and rank 0 saves a checkpoint."""
_UNRESOLVED_SECONDS = 30.0
"""A name that cannot be resolved for so long is an error: DNS may learn it late."""
_SAY_SECONDS = 20.0
"""Time after which a rank says what it waits for."""
_START_SECONDS = 600.0
"""Time for all ranks to come when rank 0 is there: a cluster may start them one by one."""
_GROUP_SECONDS = 60.0
"""Time to connect ranks that are all there."""


class _Start(threading.Thread):
    """Connects this rank to the others, in a thread: torch waits without looking at signals.

    Followers wait for rank 0 as long as it takes, since it may wait for another training of the
    same key.
    """

    def __init__(self, world: World, grace: float) -> None:
        super().__init__(name="rank start", daemon=True)
        self._world, self._grace = world, grace
        self._host, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._doing = f"rank 0 at {self._host}:{self._port}"
        self._end: float | None = None
        self._monitor: RankMonitor | None = None
        self._error: Exception | None = None

    def wait(self, before: RankMonitor | None) -> RankMonitor:
        """Return the monitor of all ranks when they are connected.

        Args:
            before: a monitor of the ranks that are known so far.

        Raises:
            TrainingError: the name of rank 0's machine cannot be resolved.
            StoppedError: a rank does not come or cannot be reached.
            LostRankError: a rank was lost meanwhile.
        """
        self.start()
        say_at = time.monotonic() + _SAY_SECONDS
        while self.is_alive():
            self.join(0.1)
            now = time.monotonic()
            where = f"rank {self._world.rank} on {socket.gethostname()}"
            if now > say_at:
                say_at = float("inf")
                sys.stderr.write(f"{where} still waits for {self._doing} (Ctrl-C ends it)\n")
            if self._end and now > self._end:
                raise StoppedError(
                    f"{where} waited too long for {self._doing}; start all ranks, with the same"
                    " MASTER_ADDR and MASTER_PORT"
                )
            for monitor in (before, self._monitor):
                if lost := monitor.found() if monitor else None:
                    raise LostRankError(f"{lost.text}; training ends on all ranks", lost.rank)
        if self._error:
            raise self._error
        assert self._monitor
        return self._monitor

    def run(self) -> None:
        """Connect; called by the thread."""
        try:
            self._connect()
        except Exception as error:  # noqa: BLE001  raised in the main thread
            self._error = error

    def _connect(self) -> None:
        rank, size = self._world.rank, self._world.size
        alone = os.environ.get("LOCAL_WORLD_SIZE", "").strip() == str(size)
        address = self._own_address(alone=alone)
        if interface := interface_of(address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            if not address.startswith("127."):
                os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
        store = self._open_store()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family, backlog=size) as listener:
            mine = Peer(
                rank=rank,
                process=this_process(),
                host=socket.gethostname(),
                address=address,
                port=listener.getsockname()[1],
            )
            store.set(str(rank), json.dumps([secrets.token_hex(16), mine.as_dict()]))
            cards = self._cards(store)
            peers = {number: Peer.from_dict(card) for number, (_, card) in cards.items()}
            self._end = time.monotonic() + _GROUP_SECONDS
            self._doing = "connections to the other ranks"
            token = cards[0][0]
            links = connect_ranks(rank, peers, listener, token, _GROUP_SECONDS / 2)
        self._monitor = RankMonitor(rank, peers, links, grace=self._grace)
        self._doing = "gloo's connections (GLOO_SOCKET_IFNAME names its network interface)"
        before = _connections()
        with _without_stdout():
            dist.init_process_group(
                "gloo",
                store=PrefixStore("gloo", store),
                rank=rank,
                world_size=size,
                timeout=_AS_LONG_AS_IT_TAKES,
            )
        opened = _connections().items() - before.items()
        self._monitor.disconnect = lambda: _shut(dict(opened))

    def _own_address(self, *, alone: bool) -> str:
        """Return this machine's address for the other ranks; wait until rank 0's has a name."""
        end = time.monotonic() + _UNRESOLVED_SECONDS
        while True:
            try:
                return address_towards(self._host, self._port, alone=alone)
            except OSError as error:
                if time.monotonic() > end:
                    raise TrainingError(
                        f"environment: MASTER_ADDR={self._host} cannot be resolved or reached from"
                        f" {socket.gethostname()} ({error.strerror}); set it to an address of"
                        " rank 0's machine"
                    ) from None
            time.sleep(0.5)

    def _open_store(self) -> Store:
        """Return the store where ranks find each other: rank 0's, or that of torchrun's agent."""
        is_host = self._world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while not is_host:  # torch would log each try
            with suppress(OSError), socket.create_connection((self._host, self._port), timeout=5):
                break
            time.sleep(0.2)
        store = TCPStore(
            self._host, self._port, is_master=is_host, wait_for_workers=False, multi_tenant=True
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"runkey/{attempt}", store)

    def _cards(self, store: Store) -> dict[int, tuple[str, dict[str, Any]]]:
        """Return how each rank introduced itself; wait until all have."""
        missing = list(range(self._world.size))
        while missing:
            if self._end is None and (self._world.is_main or missing[0] != 0):
                self._end = time.monotonic() + _START_SECONDS
            names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            self._doing = (
                f"{'rank' if len(missing) == 1 else 'ranks'} {names} of {self._world.size}"
            )
            time.sleep(0.05)
            missing = [rank for rank in missing if not store.check([str(rank)])]
        return {rank: json.loads(store.get(str(rank))) for rank in range(self._world.size)}


def _connections() -> dict[int, tuple[Any, Any]]:
    """Return both addresses of each TCP connection that this process has, by descriptor."""
    found = {}
    for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        with suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as copy:
                if copy.type == socket.SOCK_STREAM and copy.family != socket.AF_UNIX:
                    found[descriptor] = (copy.getsockname(), copy.getpeername())
    return found


def _shut(connections: Mapping[int, tuple[Any, Any]]) -> None:
    """Shut connections down that are still the same; what waits for them fails at once."""
    for descriptor, addresses in _connections().items():
        if connections.get(descriptor) == addresses:
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as copy:
                copy.shutdown(socket.SHUT_RDWR)


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
