"""How much memory a training step may take on a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from runkey.units import GIB, MIB

_SPARE_BYTES = 256 * MIB
_SPARE_PART = 0.03
_MEMINFO = Path("/proc/meminfo")
# A container's limit and use, with cgroups version 2 and version 1.
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The bytes that a training step may take."""

    bytes: int
    text: str
    """How it is made up, such as `16.00 GiB memory.budget_gib less 0.48 to spare`."""


def spare_bytes(budget_bytes: int) -> int:
    """Return what is left free of a budget: max(256 MiB, 3%)."""
    return max(_SPARE_BYTES, round(_SPARE_PART * budget_bytes))


def memory_budget(
    budget_gib: float | Literal["device"], device: torch.device, outside_bytes: int
) -> MemoryBudget:
    """Return what tensors may take on a device.

    Args:
        budget_gib: `memory.budget_gib`: GiB for the process, or "device" for all that is free.
        device: where training runs; this process has nothing on it yet.
        outside_bytes: what the process takes beside tensors. GPU: the CUDA context and the
            libraries' kernels, a part of which is already missing from the free memory. CPU: 0,
            since the whole process is measured there.
    """
    if budget_gib != "device":
        return _less_spare(round(budget_gib * GIB), outside_bytes, "memory.budget_gib")
    if device.type == "cpu":
        return _less_spare(available_bytes(_MEMINFO, _CGROUPS), outside_bytes, "available")
    free, total = torch.cuda.mem_get_info(device)
    taken = min(outside_bytes, total - free)  # our context, or at least that much of others
    name = torch.cuda.get_device_name(device)
    return _less_spare(free + taken, outside_bytes, f"free on {name}")


def _less_spare(budget: int, outside: int, what: str) -> MemoryBudget:
    spare = spare_bytes(budget)
    beside = f", {outside / GIB:.2f} for the CUDA context" if outside else ""
    text = f"{budget / GIB:.2f} GiB {what} less {spare / GIB:.2f} to spare{beside}"
    return MemoryBudget(budget - spare - outside, text)


def available_bytes(meminfo: Path, cgroups: tuple[tuple[Path, Path], ...]) -> int:
    """Return the main memory that a new process can have.

    Args:
        meminfo: the kernel's table; its `MemAvailable` counts caches that it would give up.
        cgroups: files with a limit and with the current use; missing ones set no limit.
    """
    lines = meminfo.read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, used in cgroups:
        text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
        if text != "max":
            available = min(available, int(text) - int(used.read_text(encoding="ascii")))
    return available
