"""What of a GPU decides about memory: its attention kernels, and what it allocates beside tensors.

The rules are those of an Ampere GPU, for which memory.json is made; benchmarks/gpu_kernels.py has
those of others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from runkey.memory.trace.torch_private import ATTENTION
from runkey.units import MIB

Kernel = Literal["flash", "efficient", "math"]
_HALF = (torch.float16, torch.bfloat16)
_FLASH_WIDTH = 256


@dataclass(frozen=True)
class Gpu:
    """A GPU."""

    capability: tuple[int, int] = (8, 0)
    """Compute capability: 7.0 V100, 7.5 T4, 8.0 A100, 8.6 A10, 8.9 L4, 9.0 H100, 10.0 B200."""

    @property
    def has_bf16(self) -> bool:
        """Whether the GPU computes in bf16 (Ampere and later)."""
        return self.capability >= (8, 0)

    @property
    def context_bytes(self) -> int:
        """Most bytes that a process takes outside the allocator.

        That is the CUDA context, handles of cuBLAS and cuDNN, and kernels, which are loaded when
        they are first used. Hopper: 707 to 723 MiB measured over 70 trainings
        (benchmarks/results/gpu/gpu_memory.json), NVIDIA H200, driver 580.159.04, torch
        2.11.0+cu130. Others: not measured; maskrcnn-benchmark#182 reports up to 1 GB.
        """
        return 800 * MIB if self.capability[0] == 9 else 1024 * MIB

    def workspaces(self, func: Any, args: tuple[Any, ...]) -> list[int]:  # noqa: ARG002
        """Return the bytes of blocks that an operation allocates and frees: none are known here.

        benchmarks/gpu_workspaces.py knows those of an H200; the prediction adds a margin instead.
        """
        return []

    def kernel(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,  # noqa: ARG002 - decides on other GPUs
    ) -> Kernel:
        """Return the kernel that `F.scaled_dot_product_attention` runs.

        Shapes: query [B, H, T, E], key [B, H, S, E], value [B, H, S, Ev].
        """
        half = query.dtype in _HALF
        widths = {query.shape[-1], key.shape[-1], value.shape[-1]}
        if mask is None and half and len(widths) == 1 and max(widths) <= _FLASH_WIDTH:
            return "flash"
        if query.shape[-1] != key.shape[-1] or not (half or query.dtype == torch.float32):
            return "math"
        aligned = all(width % (8 if half else 4) == 0 for width in widths)
        return "efficient" if aligned else "math"

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *,
        scale: float | None = None,
    ) -> Tensor:
        """Run `F.scaled_dot_product_attention` by this GPU's kernel, its inputs prepared alike."""
        inputs = (query, key, value)
        kernel = self.kernel(*inputs, attn_mask, dropout_p)
        run = ATTENTION[kernel]
        out: Tensor
        if kernel == "flash":
            width = query.shape[-1]
            padded = [F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x for x in inputs]
            scale = width**-0.5 if scale is None else scale
            out = run(*padded, dropout_p, False, False, scale=scale)[0]
            return out[..., :width] if out.shape[-1] != width else out
        bias = None if attn_mask is None else additive(attn_mask, query.dtype)
        if kernel == "math":
            out = run(*inputs, bias, dropout_p, False, None, scale=scale)[0]
            return out
        if bias is not None:
            columns = bias.shape[-1]
            if columns % 8:  # rows must start at multiples of 8 numbers
                bias = F.pad(bias, (0, 8 - columns % 8))[..., :columns]
            bias = bias.expand(*query.shape[:3], key.shape[2])
        with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        out = run(*inputs, bias, with_grad, dropout_p, False, scale=scale)[0]
        return out


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a bool mask into numbers to add: 0 where a key is visible, -inf elsewhere."""
    if mask.dtype != torch.bool:
        return mask
    nothing = torch.scalar_tensor(float("-inf"), dtype=dtype, device=mask.device)
    return torch.where(mask, 0.0, nothing)
