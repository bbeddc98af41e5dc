"""Processes of this machine, told apart from every other one that ever was."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_BOOT_ID = _PROC / "sys/kernel/random/boot_id"
_ENDED = frozenset("ZX")
"""States in /proc of an ended process: the parent of a zombie has not noticed yet."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process."""

    pid: int
    boot: str
    """Id of the machine's boot; empty where there is no /proc."""
    namespace: str
    """PID namespace that `pid` is counted in: each container of a machine has its own."""
    started: int
    """Clock ticks from boot to the start of the process: pids are reused, this is not."""

    def is_beside(self, other: Process) -> bool:
        """Return True if both count pids alike, so that one can see the other."""
        here = (self.boot, self.namespace)
        return bool(self.boot) and here == (other.boot, other.namespace)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Start processes, in the block, that ignore Ctrl-C: this one ends them, and says so once.

    They may handle it later on. Call it from the main thread.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def this_process(pid: int | None = None) -> Process:
    """Return this process, or another one of this machine."""
    pid = pid or os.getpid()
    try:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
        namespace = str((_PROC / "self/ns/pid").readlink())
    except OSError:
        boot = namespace = ""
    stat = _stat(pid) if _proc_is_ours() else None
    return Process(pid=pid, boot=boot, namespace=namespace, started=stat[1] if stat else 0)


def is_running(process: Process) -> bool | None:
    """Return whether a process is there; None: it cannot be seen from here."""
    if not _proc_is_ours() or not this_process().is_beside(process):
        return None
    stat = _stat(process.pid)
    return stat is not None and stat[0] not in _ENDED and stat[1] == process.started


def _proc_is_ours() -> bool:
    """Return True if /proc counts processes as this one does.

    A PID namespace without a /proc of its own sees the outer one, where its pids are others.
    """
    try:
        return (_PROC / "self").readlink() == Path(str(os.getpid()))
    except OSError:
        return False


def _stat(pid: int) -> tuple[str, int] | None:
    """Return state and start time of a process; None if there is none."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return fields[0], int(fields[19])  # `state` and `starttime` in proc(5)
