"""Place trainings on devices by their predicted memory.

    placed = place(waiting, free)          # what can start now, and where
    check_fits(requests, capacities)       # a training that fits on no device is refused

A request is the most bytes that a training takes on a device of its own: the upper bound of the
micro-batch that it chooses there.  So several trainings share a device as long as their bounds add
up to no more than it has, each chooses the micro-batch that it would choose alone, and its results
do not depend on its neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from runkey.errors import RunkeyError
from runkey.units import GIB, counted


@dataclass(frozen=True, slots=True)
class Request:
    """A training that waits for a device."""

    name: str
    bytes: int
    """Most memory that it takes."""
    way_out: str = ""
    """Changes of its parameters that make it smaller, for the error."""


def room_bytes(total: int) -> int:
    """Return the bytes of a device that requests may add up to: all but what a step spares."""
    from runkey.memory.measure import spare_bytes  # it imports torch: seconds

    return max(0, total - spare_bytes(total))


def request_bytes(
    bound: Callable[[int], int], batch_size: int, room: int, outside_bytes: int = 0
) -> int:
    """Return what a training takes on an empty device: the bound of the micro-batch it chooses.

    Args:
        bound: images of a micro-batch to the most bytes of its step.
        batch_size: images of an optimizer step.
        room: bytes of the device that requests may add up to (`room_bytes`).
        outside_bytes: what the process takes beside tensors; a GPU's context.
    """
    from runkey.memory.choose import largest_fitting

    return bound(largest_fitting(bound, batch_size, room - outside_bytes) or 1) + outside_bytes


def place(
    waiting: Iterable[Request], free: Mapping[str, int], running: Mapping[str, int] | None = None
) -> list[tuple[Request, str]]:
    """Choose which requests start now, and on which device.

    The largest come first, each on the device with the fewest trainings that has room for it, and
    of these on the one with the least room, so that room for other large ones stays. Smaller ones
    fill what is left.

    Args:
        waiting: requests in any order; those that find no room are left out of the result.
        free: room of each device in bytes: its `room_bytes` less the requests that run there.
        running: trainings that run on each device; none where it is left out.

    Returns:
        Requests and the names of their devices, in the order in which they start.
    """
    room, count = dict(free), Counter(running or {})
    placed = []
    for request in sorted(waiting, key=lambda one: (-one.bytes, one.name)):
        if fitting := [name for name in room if room[name] >= request.bytes]:
            device = min(fitting, key=lambda name: (count[name], room[name], name))
            room[device] -= request.bytes
            count[device] += 1
            placed.append((request, device))
    return placed


def check_fits(requests: Sequence[Request], room: Mapping[str, int]) -> None:
    """Refuse requests that no device holds, even when it is empty.

    Raises:
        RunkeyError: names each of them, its bytes and what would make it fit.
    """
    largest = max(room.values(), default=0)
    too_large = [one for one in requests if one.bytes > largest]
    if too_large:
        first = max(too_large, key=lambda one: one.bytes)
        others = len(too_large) - 1
        more = f" (and {counted(others, 'other')})" if others else ""
        raise RunkeyError(
            f"{first.name}{more}: a training step takes up to {first.bytes / GIB:.2f} GiB, the"
            f" largest device has room for {largest / GIB:.2f};"
            f" {first.way_out or 'use a larger one'}"
        )
