"""Notices when another process of the same training dies, whatever this one is doing."""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

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
