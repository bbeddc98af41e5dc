"""The processes of one training: which one this is, how many there are.

torchrun tells each process by environment variables; without them there is one process, on the
same path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from runkey.errors import TrainingError


@dataclass(frozen=True, slots=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    """0..size-1; rank 0 prints, logs and writes."""
    local_rank: int = 0
    """Index among this machine's processes: the GPU to use."""
    size: int = 1
    """Number of processes."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, logs and writes."""
        return self.rank == 0


def read_world(environment: Mapping[str, str] = os.environ) -> World:
    """The world that torchrun's variables describe; one process without them.

    Raises:
        TrainingError: the variables contradict each other.
    """
    world = World(
        rank=int(environment.get("RANK", "0")),
        local_rank=int(environment.get("LOCAL_RANK", "0")),
        size=int(environment.get("WORLD_SIZE", "1")),
    )
    if not 0 <= world.rank < world.size:
        raise TrainingError(
            f"environment: RANK={world.rank} is not below WORLD_SIZE={world.size}; "
            "start training with torchrun, or unset both"
        )
    return world


@contextmanager
def joined_world(device: torch.device) -> Iterator[World]:
    """Join the other processes, if there are any, and leave them at the end.

    Args:
        device: a GPU is joined by NCCL, a CPU by gloo.
    """
    world = read_world()
    if world.size == 1:
        yield world
        return
    if device.type == "cuda":
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", rank=world.rank, world_size=world.size
    )
    try:
        yield world
    finally:
        dist.destroy_process_group()
