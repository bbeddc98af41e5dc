"""How much memory there is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from runkey.memory.choose import GIB

_PROC = Path("/proc/meminfo")
# A container's limit and use, with cgroups version 2 and version 1.
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def budget_bytes(budget_gib: float | Literal["device"], device: torch.device) -> int:
    """The budget of `memory.budget_gib` in bytes; device: all that is there or free on it.

    Args:
        budget_gib: GiB, or device.
        device: where training runs.  GPU: its whole memory, since measured peaks count what
            others have taken of it.  CPU: what is available now, within a container's limit.
    """
    if budget_gib != "device":
        return round(budget_gib * GIB)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return available_bytes(_PROC, _CGROUPS)


def available_bytes(meminfo: Path, cgroups: tuple[tuple[Path, Path], ...]) -> int:
    """Main memory that a new process can have.

    Args:
        meminfo: the kernel's table; its `MemAvailable` counts caches that it would give up.
        cgroups: files with a limit and with the present use; missing ones set no limit.
    """
    lines = meminfo.read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, used in cgroups:
        text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
        if text != "max":
            available = min(available, int(text) - int(used.read_text(encoding="ascii")))
    return available
