"""Automatic mixed precision: which dtype the forward pass computes in, and why.

Boxes, costs and losses stay in fp32 whatever is chosen here; the model and the criterion see to
that.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.amp.grad_scaler import GradScaler


def choose_precision(precision: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The autocast dtype for `training.precision`, and why.

    Args:
        precision: auto, off, bf16 or fp16.
        device: where training runs.

    Returns:
        A dtype, or None for fp32 throughout, and a few words on the reason, for the log.
    """
    match precision:
        case "off":
            return None, "asked for"
        case "bf16":
            return torch.bfloat16, "asked for" + _bf16_warning(device)
        case "fp16":
            return torch.float16, "asked for; losses are scaled"
        case "auto":
            return _automatic(device)
    raise ValueError(f"precision {precision!r}")


def _automatic(device: torch.device) -> tuple[torch.dtype | None, str]:
    if device.type != "cuda":
        # Measured: a training step in bf16 takes 1.1 to 2 times as long on a CPU without AMX.
        return None, "auto: mixed precision does not pay on a CPU"
    if _has_bf16(device):
        return torch.bfloat16, "auto: the GPU has bf16"
    return None, "auto: the GPU has no bf16, and fp16 is only used when asked for"


def _bf16_warning(device: torch.device) -> str:
    if device.type == "cuda":
        return "" if _has_bf16(device) else ", though the GPU only emulates it: slow"
    return ", though it is slower than fp32 on a CPU without AMX"


def _has_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 8  # Ampere was the first


@dataclass(frozen=True)
class Precision:
    """How one training computes: the autocast context, and the loss scaler that fp16 needs."""

    device: torch.device
    dtype: torch.dtype | None
    scaler: GradScaler | None
    """fp16 only: its smallest gradients would be zero without a factor on the loss."""

    def autocast(self) -> AbstractContextManager[object]:
        """The context of the forward pass."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def build_precision(dtype: torch.dtype | None, device: torch.device) -> Precision:
    """Autocast and, for fp16, a loss scaler on `device`."""
    scaler = GradScaler(device.type) if dtype is torch.float16 else None
    return Precision(device, dtype, scaler)
