"""How much memory there is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from runkey.memory.choose import Room, spare_bytes
from runkey.memory.line import GIB

_PROC = Path("/proc/meminfo")
# A container's limit and use, with cgroups version 2 and version 1.
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def room_on(
    budget_gib: float | Literal["device"], device: torch.device, outside_bytes: int
) -> Room:
    """What tensors may take on a device.

    Args:
        budget_gib: `memory.budget_gib`: GiB for the process, or device, for all that is free.
        device: where training runs; nothing of ours is on it yet.
        outside_bytes: what the process takes beside tensors.  GPU: the context and the libraries'
            kernels, of which free memory lacks a part already.  CPU: nothing, since what is
            measured there is the whole process.
    """
    if budget_gib != "device":
        budget = round(budget_gib * GIB)
        return _room(budget, outside_bytes, "memory.budget_gib")
    if device.type == "cpu":
        return _room(available_bytes(_PROC, _CGROUPS), outside_bytes, "available")
    free, total = torch.cuda.mem_get_info(device)
    taken = min(outside_bytes, total - free)  # our context, or at least that much of others
    return _room(free + taken, outside_bytes, f"free on {torch.cuda.get_device_name(device)}")


def _room(budget: int, outside: int, what: str) -> Room:
    spare = spare_bytes(budget)
    beside = f", {outside / GIB:.2f} for the CUDA context" if outside else ""
    text = f"{budget / GIB:.2f} GiB {what} less {spare / GIB:.2f} to spare{beside}"
    return Room(budget - spare - outside, text)


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
