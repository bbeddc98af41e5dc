"""Starts the other ranks of a training on this machine, so that nobody has to know torchrun.

    with started(2, ["-m", "stages.train"]):         # in the process that becomes rank 0
        with join_world(device) as world: ...

Rank 0 is the process that was started first: its signals, messages and exit code are those of the
training.  The others get torchrun's variables, by which `read_world` knows them, and end with it.
Nothing here imports torch: a rank that is not 0 first sees to it that it does not outlive rank 0.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# Notices when another process of the same training dies, whatever this one is doing.


_NOTICE_SECONDS = 5.0
"""For a dying process to be gone after its connection broke."""
_END_SECONDS = 10.0
"""For this process to come to where it notices; a GPU that waits for a dead rank never does."""


class Process(NamedTuple):
    """A process, and where its number means something."""

    host: str
    pid: int


class Lost(NamedTuple):
    """A process that ended too early."""

    rank: int
    text: str
    """In words."""


def this_process(pid: int | None = None) -> Process:
    """This one, or another one of this machine."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return Process(f"{boot} {Path('/proc/self/ns/pid').readlink()}", pid or os.getpid())


class Peers:
    """Watches other ranks on this machine from a thread, through the kernel (pidfd).

    When one dies, this process is given some seconds to notice by itself, and is ended if it does
    not.  Ranks on other machines are their launcher's to watch.
    """

    def __init__(self, rank: int, processes: Mapping[int, Process]) -> None:
        """Start watching.

        Args:
            rank: ours.
            processes: by rank; this one is left out.
        """
        self._rank = rank
        self._watched: dict[int, Lost] = {}
        self._lost: Lost | None = None
        self._found, self._stood_down = threading.Event(), threading.Event()
        here = this_process()
        for number, process in processes.items():
            if process != here and process.host == here.host:
                self._watch(number, process.pid)
        self._wake = os.eventfd(0)
        self._thread = threading.Thread(target=self._wait, name="peers", daemon=True)
        self._open = [*self._watched, self._wake]
        self._thread.start()

    def lost(self) -> Lost | None:
        """Which rank died; None if none of this machine did.

        Called by whoever has noticed: this process then ends by itself, and is not ended.
        """
        self._stood_down.set()
        self._found.wait(_NOTICE_SECONDS)
        return self._lost

    def leave(self) -> None:
        """From here on other ranks may end: training is over."""
        self._stood_down.set()

    def close(self) -> None:
        """Stop watching, if that has not been done yet."""
        self._stood_down.set()
        if self._thread.is_alive():
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        while self._open:
            os.close(self._open.pop())

    def _watch(self, number: int, pid: int) -> None:
        lost = Lost(number, f"rank {number} (process {pid}) ended while training")
        try:
            self._watched[os.pidfd_open(pid)] = lost
        except ProcessLookupError:
            self._found_out(lost)

    def _found_out(self, lost: Lost) -> None:
        self._lost = lost
        self._found.set()

    def _wait(self) -> None:
        if not self._lost:
            poll = select.poll()
            for descriptor in (*self._watched, self._wake):
                poll.register(descriptor, select.POLLIN)
            ended = [descriptor for descriptor, _ in poll.poll() if descriptor != self._wake]
            if not ended:
                return
            self._found_out(self._watched[ended[0]])
        if not self._stood_down.wait(_END_SECONDS):
            assert self._lost
            line = f"error: {self._lost.text}, and rank {self._rank} waited for it: ended, too\n"
            sys.stderr.write(line)
            sys.stderr.flush()
            os._exit(1)


@contextmanager
def watched(rank: int, processes: Mapping[int, Process]) -> Iterator[Peers]:
    """Watch other ranks until the block ends; see `Peers`."""
    peers = Peers(rank, processes)
    try:
        yield peers
    finally:
        peers.close()


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
        A watch over them, for `join_world` to take over.
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
