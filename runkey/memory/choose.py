"""How much memory there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from runkey.errors import TrainingError
from runkey.memory.memory_model import GIB, MIB

# What training goes by: how an optimizer step is cut into forward passes on this device.


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How an optimizer step is cut."""

    micro_batch: int
    """Images of a forward pass, at most."""
    accumulation: int
    """Forward passes of a step."""
    chosen_by: str
    """Why this one: `up to N fit`, `the checkpoint's` or `training.micro_batch`."""
    limit_pixels: int
    """Padded pixels (images x height x width) of the largest batch that is vouched for."""
    needed_bytes: int
    """Upper bound of what the step takes."""
    room_bytes: int
    """What there is for it, with something to spare."""

    def line(self) -> str:
        """The plan in words."""
        passes = f"{self.accumulation} forward pass{'' if self.accumulation == 1 else 'es'} a step"
        return (
            f"micro-batch {self.micro_batch} ({self.chosen_by}), {passes}: "
            f"{self.needed_bytes / GIB:.2f} of {self.room_bytes / GIB:.2f} GiB at most"
        )


# The largest micro-batch whose upper bound fits, or what would make one fit.


_SPARE_BYTES = 256 * MIB
_SPARE_PART = 0.03

Bound = Callable[[int], int]
"""Images of a forward pass to the bytes that the step takes at most."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a training step may take."""

    bytes: int
    text: str
    """How that comes about, such as `16.00 GiB of memory.budget_gib less 0.48 to spare`."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What parameters and an earlier checkpoint ask for."""

    batch_size: int
    """Images of an optimizer step in this process."""
    micro_batch: int | None = None
    """`training.micro_batch`, if it is a number."""
    kept: int | None = None
    """Micro-batch of the checkpoint that training goes on from."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How an optimizer step is cut."""

    micro_batch: int
    """Images of a forward pass, at most."""
    accumulation: int
    """Forward passes of a step."""
    reason: str


@dataclass(frozen=True, slots=True)
class WayOut:
    """A parameter that would make a step smaller."""

    change: str
    """As params.yaml writes it."""
    bytes: int
    """What one image would take then."""

    def __str__(self) -> str:
        return f"{self.change} ({self.bytes / GIB:.2f} GiB)"


def spare_bytes(budget_bytes: int) -> int:
    """What is left free: max(256 MiB, 3%)."""
    return max(_SPARE_BYTES, round(_SPARE_PART * budget_bytes))


def cut(batch_size: int, micro_batch: int) -> tuple[int, int]:
    """Passes as few as `micro_batch` allows, of sizes as even as can be: (micro-batch, passes)."""
    passes = -(-batch_size // min(micro_batch, batch_size))
    return -(-batch_size // passes), passes


def largest_fitting(bound: Bound, batch_size: int, room_bytes: int) -> int:
    """The most images, up to `batch_size`, whose bound is within the room; 0: not even one."""
    return max((n for n in range(1, batch_size + 1) if bound(n) <= room_bytes), default=0)


def choose(bound: Bound, room: Room, wish: Wish, ways_out: Sequence[WayOut] = ()) -> Choice:
    """The fewest forward passes whose upper bound is within the room.

    Args:
        bound: upper bound on the device at hand.
        room: what there is.
        wish: the batch, and a micro-batch asked for: a number in `training.micro_batch` is obeyed,
            a checkpoint's is kept if it fits.
        ways_out: what could be changed if nothing fits.

    Raises:
        TrainingError: not even one image fits; says what would make it fit.
    """
    if wish.micro_batch is not None:
        return Choice(*cut(wish.batch_size, wish.micro_batch), "training.micro_batch")
    fits = largest_fitting(bound, wish.batch_size, room.bytes)
    if not fits:
        raise TrainingError(_nothing_fits(bound(1), room, ways_out))
    if wish.kept is not None and wish.kept <= fits:
        return Choice(wish.kept, -(-wish.batch_size // wish.kept), "the checkpoint's")
    return Choice(*cut(wish.batch_size, fits), f"up to {fits} fit")


def _nothing_fits(needed: int, room: Room, ways_out: Sequence[WayOut]) -> str:
    """One line: what one image takes, what there is, and the ways out, best those that suffice."""
    helpful = sorted((way for way in ways_out if way.bytes < needed), key=lambda way: way.bytes)
    enough = [str(way) for way in helpful if way.bytes <= room.bytes]
    text = (
        f"memory.budget_gib: a training step of one image takes up to {needed / GIB:.2f} GiB, "
        f"there are {room.bytes / GIB:.2f} GiB ({room.text}); "
    )
    if enough:
        return text + "it would fit with " + ", or with ".join(enough)
    if helpful:
        return text + "no single change makes it fit: " + ", ".join(map(str, helpful))
    return text + "take a smaller model"


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
