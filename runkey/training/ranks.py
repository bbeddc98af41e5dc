"""Launch the other ranks of a training on this machine, so that users need not know torchrun.

    with launched_ranks(2, ["-m", "stages.train"]) as monitor:    # in the process of rank 0
        with join_world(device, monitor) as world: ...

Rank 0 is the process that was started first: its signals, messages and exit code are those of the
training. The others get torchrun's variables, from which `read_world` knows them, and end with it.
Nothing here imports torch: a rank that is not 0 makes sure first that it does not outlive rank 0.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import NamedTuple

from runkey.errors import TrainingError
from runkey.processes import without_interrupts
from runkey.training.rank_monitor import RankMonitor, local_peer

_LEADER = "RUNKEY_RANK_0_PID"
"""Environment variable of the ranks that rank 0 launched."""
_LEAVE_SECONDS = 10.0
"""Time for a rank to end by itself when training is over."""


class Place(NamedTuple):
    """Where a process stands among those of a training."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1


def read_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Read torchrun's variables; empty ones count as not set.

    Raises:
        TrainingError: some of them are set and others not, as if left over, or they clash.
    """
    found = {name: environment.get(name, "").strip() for name in _TORCHRUN}
    way_out = "start training with torchrun, or `unset RANK WORLD_SIZE`"
    for name, value in found.items():
        if name != "MASTER_ADDR" and value and not (value.isascii() and value.isdigit()):
            raise TrainingError(f"environment: {name}={value} is no number; {way_out}")
    place = Place(*(int(found[name] or default) for name, default in _DEFAULTS.items()))
    if place.rank >= place.size:
        raise TrainingError(
            f"environment: RANK={place.rank} is not below WORLD_SIZE={place.size}; {way_out}"
        )
    missing = ", ".join(name for name, value in found.items() if not value)
    if place.size > 1 and missing:
        raise TrainingError(f"environment: WORLD_SIZE={place.size} without {missing}; {way_out}")
    return place


_DEFAULTS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
_TORCHRUN = (*_DEFAULTS, "MASTER_ADDR", "MASTER_PORT")


def is_follower() -> bool:
    """Return True if this is a rank other than 0, which decides, logs and writes."""
    return read_place().rank != 0


def launched_by_torchrun() -> bool:
    """Return True if torchrun (or rank 0) has started this process as one of several."""
    return bool(os.environ.get("WORLD_SIZE", "").strip())


def monitor_leader() -> RankMonitor | None:
    """End this process with rank 0, if rank 0 launched it; return None if torchrun did."""
    pid = os.environ.get(_LEADER)
    if pid is None:
        return None
    return RankMonitor(int(os.environ["RANK"]), {0: local_peer(0, int(pid))})


@contextmanager
def launched_ranks(size: int, arguments: Sequence[str]) -> Iterator[RankMonitor | None]:
    """Run `size` - 1 further ranks while the block lasts; yield a monitor for `join_world`.

    The arguments follow the interpreter on their command line. With one rank, or under torchrun,
    which has launched them, this does nothing.
    """
    if size == 1 or launched_by_torchrun():
        yield None
        return
    common = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    leader = {"RANK": "0", "LOCAL_RANK": "0"}
    processes: list[subprocess.Popen[bytes]] = []
    os.environ.update(common | leader)
    try:
        for rank in range(1, size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), _LEADER: str(os.getpid())}
            command, environment = [sys.executable, *arguments], os.environ | own
            with without_interrupts():
                process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
            processes.append(process)
        others = {rank: local_peer(rank, p.pid) for rank, p in enumerate(processes, start=1)}
        with closing(RankMonitor(0, others)) as monitor:
            yield monitor
        with suppress(subprocess.TimeoutExpired):
            for process in processes:  # they end by themselves
                process.wait(_LEAVE_SECONDS)
    finally:
        # They write nothing, so nothing is lost; most often they are gone by now.
        for process in processes:
            process.kill()
            process.wait()
        for name in (*common, *leader):
            os.environ.pop(name, None)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
