"""Notices when another process of the same training dies, whatever this one is doing."""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Sequence
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


def this_process() -> Process:
    """This one."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return Process(f"{boot} {Path('/proc/self/ns/pid').readlink()}", os.getpid())


class Peers:
    """Watches the other ranks on this machine from a thread, through the kernel (pidfd).

    When one dies, this process is given some seconds to notice by itself, and is ended if it does
    not.  Ranks on other machines are their launcher's to watch.
    """

    def __init__(self, rank: int, processes: Sequence[Process]) -> None:
        """Start watching.

        Args:
            rank: ours.
            processes: all ranks', by rank.
        """
        mine = processes[rank]
        self._rank = rank
        self._names: dict[int, str] = {}
        self._gone: str | None = None
        self._found, self._stood_down = threading.Event(), threading.Event()
        for number, process in enumerate(processes):
            if number != rank and process.host == mine.host:
                self._watch(number, process.pid)
        self._wake = os.eventfd(0)
        self._thread = threading.Thread(target=self._wait, name="peers", daemon=True)
        self._thread.start()

    def lost(self) -> str | None:
        """Which rank died, in words; None if none of this machine did.

        Called by whoever has noticed: this process then ends by itself, and is not ended.
        """
        self._stood_down.set()
        self._found.wait(_NOTICE_SECONDS)
        return self._gone

    def leave(self) -> None:
        """From here on other ranks may end: training is over."""
        self._stood_down.set()

    def close(self) -> None:
        """Stop watching."""
        self._stood_down.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for descriptor in (*self._names, self._wake):
            os.close(descriptor)

    def _watch(self, number: int, pid: int) -> None:
        name = f"rank {number} (process {pid}) ended while training"
        try:
            self._names[os.pidfd_open(pid)] = name
        except ProcessLookupError:
            self._gone = name
            self._found.set()

    def _wait(self) -> None:
        poll = select.poll()
        for descriptor in (*self._names, self._wake):
            poll.register(descriptor, select.POLLIN)
        ended = [descriptor for descriptor, _ in poll.poll() if descriptor != self._wake]
        if not ended:
            return
        self._gone = self._names[ended[0]]
        self._found.set()
        if not self._stood_down.wait(_END_SECONDS):
            line = f"error: {self._gone}, and rank {self._rank} waited for it; it is ended, too"
            print(line, file=sys.stderr, flush=True)  # noqa: T201  nobody else can say it
            os._exit(1)
