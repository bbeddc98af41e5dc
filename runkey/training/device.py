"""Which device trains."""

from __future__ import annotations

import os

import torch

from runkey.errors import TrainingError


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device for `runtime.device`, and why.

    Args:
        name: auto, cpu or cuda.

    Returns:
        The device (a GPU with its index) and a few words on the reason, for the log.

    Raises:
        TrainingError: cuda was asked for and torch sees no GPU.
    """
    # The allocator reads this once, when the GPU is first used.  Padded shapes vary: without it, it
    # holds up to 30% more than there are tensors, in pieces of sizes that no longer fit.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if name == "cpu":
        return torch.device("cpu"), "asked for"
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        reason = torch.cuda.get_device_name(index)
        return torch.device("cuda", index), reason if name == "auto" else f"asked for: {reason}"
    if name == "auto":
        return torch.device("cpu"), "torch sees no GPU"
    raise TrainingError(
        "params.yaml: runtime.device = cuda, but torch sees no GPU; set it to auto or cpu"
    )
