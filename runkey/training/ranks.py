"""Starts the other ranks of a training on this machine, so that nobody has to know torchrun.

    with started(2, ["-m", "stages.train"]):         # in the process that becomes rank 0
        with joined_world(device) as world: ...

Rank 0 is the process that was started first: its signals, messages and exit code are those of the
training.  The others get torchrun's variables, by which `read_world` knows them, and end with it.
Nothing here imports torch: a rank that is not 0 first sees to it that it does not outlive rank 0.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from runkey.training.peers import Peers, this_process, watched

_LEADER = "RUNKEY_RANK_0_PID"
"""Environment variable of the ranks that were started here."""
_LEAVE_SECONDS = 10.0
"""For a rank to end by itself when training is over."""


def is_follower(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several and not the one that decides, logs and writes."""
    return environment.get("RANK", "0") != "0"


def launched_by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether others wait already, or this is one of them."""
    return "WORLD_SIZE" in environment


def watch_leader() -> Peers | None:
    """End with rank 0, if it started this process; None if something else did."""
    pid = os.environ.get(_LEADER)
    if pid is None:
        return None
    return Peers(int(os.environ["RANK"]), {0: this_process(int(pid))})


@contextmanager
def started(size: int, arguments: Sequence[str]) -> Iterator[Peers | None]:
    """Run `size` - 1 further ranks while the block lasts; with one rank this does nothing.

    Args:
        size: processes in all.
        arguments: what follows the interpreter on their command line.

    Yields:
        A watch over them, for `joined_world` to take over.
    """
    if size == 1:
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
            processes.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=os.environ | common | own,
                    stdin=subprocess.DEVNULL,
                )
            )
        pids = {rank: this_process(p.pid) for rank, p in enumerate(processes, start=1)}
        with watched(0, pids) as peers:
            yield peers
        _wait(processes)
    finally:
        # They write nothing, so nothing is lost; most often they are gone by now.
        for process in processes:
            process.kill()
            process.wait()
        for name in (*common, *leader):
            os.environ.pop(name, None)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let them end by themselves."""
    for process in processes:
        try:
            process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            return


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
