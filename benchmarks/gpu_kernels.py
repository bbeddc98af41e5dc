"""GPUs of any generation: their multiprocessors, and the attention kernels that torch chooses.

`runkey.memory.trace.gpu` has the rules of Ampere, for which memory.json is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runkey.memory.trace.gpu import Gpu, Kernel, additive

_HALF = (torch.float16, torch.bfloat16)
# Multiprocessors of a common GPU, and threads of each, by compute capability.
_COMMON = {
    (6, 0): (56, 2048),  # P100
    (6, 1): (20, 2048),  # GTX 1080
    (7, 0): (80, 2048),  # V100
    (7, 5): (40, 1024),  # T4
    (8, 0): (108, 2048),  # A100
    (8, 6): (72, 1536),  # A10
    (8, 9): (128, 1536),  # RTX 4090; L4 has 58
    (9, 0): (132, 2048),  # H100, H200
    (10, 0): (148, 2048),  # B200
    (12, 0): (170, 1536),  # RTX 5090
}
_FLASH_WIDTH = 256
_FLASH_WIDTH_SMALL_SHARED_MEMORY = 192
_CUDNN_WIDTH = 128


@dataclass(frozen=True)
class AnyGpu(Gpu):
    """A GPU of any generation and its libraries."""

    cudnn: int = 0
    """cuDNN's version as torch reports it, such as 91002."""
    multiprocessors: int = 0
    """0: those of a common GPU of this capability."""

    @property
    def sms(self) -> int:
        """Number of multiprocessors."""
        return self.multiprocessors or self._common()[0]

    @property
    def threads_per_sm(self) -> int:
        """Threads that a multiprocessor runs at once."""
        return self._common()[1]

    def _common(self) -> tuple[int, int]:
        known = [one for one in _COMMON if one <= self.capability]
        return _COMMON[max(known, default=(6, 0))]

    def kernel(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
    ) -> Kernel:
        """Return the kernel that torch runs where it does not prefer cuDNN's."""
        if mask is None and self._flash_can(query, key, value, dropout):
            return "flash"
        return "efficient" if self._efficient_can(query, key, value) else "math"

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
        """Run cuDNN's attention where torch prefers it."""
        if not (self._prefers_cudnn() and self._cudnn_can(query, key, value, dropout_p)):
            return super().attention(query, key, value, attn_mask, dropout_p, scale=scale)
        inputs = (query, key, value)
        bias = None if attn_mask is None else additive(attn_mask, query.dtype)
        if bias is not None:
            bias = bias.expand(*query.shape[:3], key.shape[2])
        with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        run: Any = torch.ops.aten._scaled_dot_product_cudnn_attention
        out: Tensor = run(*inputs, bias, with_grad, dropout_p, False, False, scale=scale)[0]
        return out

    def _prefers_cudnn(self) -> bool:
        """Torch 2.11 with a recent cuDNN, on datacenter Hopper and Blackwell."""
        newer = [int(part) for part in torch.__version__.split(".")[:2]] >= [2, 11]
        return newer and self.cudnn > 91500 and self.capability in ((9, 0), (10, 0), (10, 3))

    def _cudnn_can(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
        widths = (query.shape[-1], value.shape[-1])
        return (
            not torch.are_deterministic_algorithms_enabled()
            and query.dtype in _HALF
            and self.has_bf16
            and (dropout * 16).is_integer()
            and not (dropout > 0 and 91100 < self.cudnn < 91400)
            and all(width % 8 == 0 and width <= _CUDNN_WIDTH for width in widths)
            and key.shape[2] > 1
            and not (dropout > 0 and query.shape[2] == 1)
        )

    def _flash_can(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
        width = query.shape[-1]
        # GPUs with little shared memory cannot run the backward pass of wide heads.
        narrow = (8, 6) <= self.capability <= (8, 9) or self.capability >= (12, 0)
        small = narrow and query.requires_grad
        limit = _FLASH_WIDTH_SMALL_SHARED_MEMORY if small else _FLASH_WIDTH
        return (
            self.capability >= (8, 0)
            and query.dtype in _HALF
            and key.shape[-1] == width == value.shape[-1]
            and (width <= limit or (not dropout and 224 < width <= _FLASH_WIDTH))
        )

    def _efficient_can(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        half = query.dtype in _HALF
        if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return False
        if query.dtype == torch.bfloat16 and not self.has_bf16:
            return False
        alignment = 4 if self.capability >= (8, 0) else 1
        if self.capability >= (8, 0) or (half and self.capability >= (7, 0)):
            alignment = max(alignment, 8 if half else 4)
        return (
            query.shape[-1] == key.shape[-1]
            and query.shape[-1] % alignment == 0
            and value.shape[-1] % alignment == 0
        )
