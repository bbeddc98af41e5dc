"""Who trains: a process, told apart from every other one that ever was.

On one machine the death of a process is known at once.  Of a process on another machine, or in
another container on this one, nothing is known but that its claim's beat goes on or stops.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from runkey.identity.record import this_host

_PROC = Path("/proc")
_BOOT_ID = _PROC / "sys/kernel/random/boot_id"
_ENDED = frozenset("ZX")
"""States in /proc of a process that has ended: a zombie is one whose parent has not noticed yet."""
_AFTER_NAME_STATE, _AFTER_NAME_START = 0, 19
"""Places of `state` and `starttime` in /proc/PID/stat, counted after the name in brackets."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process that claims a key."""

    host: str
    pid: int
    boot: str
    """The machine since it was started; empty where there is no /proc."""
    namespace: str
    """What `pid` is counted in: containers of one machine count their own."""
    started: int
    """Clock ticks from boot to the start of the process: a pid is given out again, this is not."""
    nonce: str
    """New for every claim; by it a claim whose answer was lost is recognised as one's own."""

    @property
    def label(self) -> str:
        """For people: `host:pid`."""
        return f"{self.host}:{self.pid}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """The owner that `as_dict` gave.

        Raises:
            ValueError: fields are missing or of another type.
        """
        try:
            owner = cls(**stored)
        except TypeError as error:
            raise ValueError(str(error)) from None
        if not isinstance(owner.pid, int) or not isinstance(owner.started, int):
            raise ValueError("pid and started must be whole numbers")
        return owner


def this_process() -> Owner:
    """This process as the owner of one claim."""
    pid, proc_is_ours = os.getpid(), _proc_is_ours()
    stat = _stat(pid) if proc_is_ours else None
    return Owner(
        host=this_host(),
        pid=pid,
        boot=_BOOT_ID.read_text(encoding="ascii").strip() if stat else "",
        namespace=str((_PROC / "self/ns/pid").readlink()) if stat else "",
        started=stat[1] if stat else 0,
        nonce=secrets.token_hex(8),
    )


def is_running(owner: Owner) -> bool | None:
    """Whether the owner's process is there; None: it cannot be seen from here."""
    here = this_process()
    if not here.boot or (here.boot, here.namespace) != (owner.boot, owner.namespace):
        return None
    stat = _stat(owner.pid)
    return stat is not None and stat[0] not in _ENDED and stat[1] == owner.started


def _proc_is_ours() -> bool:
    """Whether /proc counts processes as this one does.

    A pid namespace made without a /proc of its own still sees the outer one, where its pids name
    other processes.
    """
    try:
        return (_PROC / "self").readlink() == Path(str(os.getpid()))
    except OSError:
        return False


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start time of a process; None if there is none."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return fields[_AFTER_NAME_STATE], int(fields[_AFTER_NAME_START])
