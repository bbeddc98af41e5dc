"""Which device trains, and how many processes do."""

from __future__ import annotations

import os
from typing import Literal

import torch

from runkey.errors import TrainingError


def choose_device(name: str, local_rank: int = 0) -> tuple[torch.device, str]:
    """The device for `runtime.device`, and why.

    Args:
        name: auto, cpu or cuda.
        local_rank: this process among those of this machine: which GPU is its own.

    Returns:
        The device (a GPU with its index) and a few words on the reason, for the log.

    Raises:
        TrainingError: cuda was asked for and torch sees no GPU, or fewer than processes.
    """
    # The allocator reads this once, when the GPU is first used.  Padded shapes vary: without it, it
    # holds up to 30% more than there are tensors, in pieces of sizes that no longer fit.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if name == "cpu":
        return torch.device("cpu"), "asked for"
    if torch.cuda.is_available():
        if local_rank:
            _check_gpus(local_rank + 1)
            torch.cuda.set_device(local_rank)
        index = torch.cuda.current_device()
        reason = torch.cuda.get_device_name(index)
        return torch.device("cuda", index), reason if name == "auto" else f"asked for: {reason}"
    if name == "auto":
        return torch.device("cpu"), "torch sees no GPU"
    raise TrainingError(
        "params.yaml: runtime.device = cuda, but torch sees no GPU; set it to auto or cpu"
    )


def choose_processes(processes: int | Literal["auto"], device: torch.device, images: int) -> int:
    """The number of processes for `runtime.processes`.

    Args:
        processes: auto, or a number.
        device: where training runs.
        images: of an optimizer step; each process has to have one.

    Raises:
        TrainingError: there are fewer GPUs than that.
    """
    on_gpus = device.type == "cuda"
    if processes == "auto":
        return min(torch.cuda.device_count(), images) if on_gpus else 1
    if on_gpus and processes > 1:
        _check_gpus(processes)
    return processes


def _check_gpus(processes: int) -> None:
    """Each process has a GPU of its own: NCCL joins no two on the same one."""
    if processes > torch.cuda.device_count():
        raise TrainingError(
            f"{processes} processes, but torch sees {torch.cuda.device_count()} GPUs; set"
            " runtime.processes to auto"
        )
