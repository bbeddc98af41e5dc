"""What of a GPU decides about memory: its attention kernels, and what its libraries keep."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from runkey.memory.trace.torch_private import ATTENTION
from runkey.units import KIB, MIB

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


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU and its libraries."""

    capability: tuple[int, int]
    """Compute capability: 7.0 V100, 7.5 T4, 8.0 A100, 8.6 A10, 8.9 L4, 9.0 H100, 10.0 B200."""
    cudnn: int
    """cuDNN's version as torch reports it, such as 91002."""
    multiprocessors: int = 0
    """0: those of a common GPU of this capability."""

    @property
    def has_bf16(self) -> bool:
        """Whether the GPU computes in bf16 (Ampere and later)."""
        return self.capability >= (8, 0)

    @property
    def sms(self) -> int:
        """Number of multiprocessors."""
        return self.multiprocessors or self._common()[0]

    @property
    def threads_per_sm(self) -> int:
        """Threads that a multiprocessor runs at once."""
        return self._common()[1]

    def cublas_workspace(self) -> int:
        """Return the bytes that cuBLAS keeps for each thread that uses it.

        `CUBLAS_WORKSPACE_CONFIG` decides (`runkey.training` sets 8 times 4 MiB); without it torch
        takes 32 MiB on Hopper and later, 8 MiB and 128 KiB before.
        """
        pairs = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
        if pairs:
            return sum(int(size) * KIB * int(count) for size, count in pairs)
        return 32 * MIB if self.capability >= (9, 0) else 8 * MIB + 128 * KIB

    def _common(self) -> tuple[int, int]:
        known = [one for one in _COMMON if one <= self.capability]
        return _COMMON[max(known, default=(6, 0))]


# Attention: the kernel that torch chooses on a GPU, and how it prepares the inputs.


Kernel = Literal["flash", "efficient", "cudnn", "math"]
_FLASH_WIDTH = 256
_FLASH_WIDTH_SMALL_SHARED_MEMORY = 192
_CUDNN_WIDTH = 128


def choose_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, gpu: Gpu
) -> Kernel:
    """Return the kernel that `F.scaled_dot_product_attention` runs on `gpu`.

    Args:
        query: [B, H, T, E].
        key: [B, H, S, E].
        value: [B, H, S, Ev].
        mask: broadcastable to [B, H, T, S], or None.
        dropout: dropout probability.
        gpu: where it would run.
    """
    if _prefers_cudnn(gpu) and _cudnn_can(query, key, value, dropout, gpu):
        return "cudnn"
    if mask is None and _flash_can(query, key, value, dropout, gpu):
        return "flash"
    if _efficient_can(query, key, value, gpu):
        return "efficient"
    return "math"


def attention_on(gpu: Gpu) -> Callable[..., Tensor]:
    """Return an `F.scaled_dot_product_attention` that runs the kernel of `gpu`."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *,
        scale: float | None = None,
    ) -> Tensor:
        inputs = (query, key, value)
        kernel = choose_kernel(*inputs, attn_mask, dropout_p, gpu)
        run = ATTENTION[kernel]
        out: Tensor
        if kernel == "flash":
            width = query.shape[-1]
            padded = [F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x for x in inputs]
            scale = width**-0.5 if scale is None else scale
            out = run(*padded, dropout_p, False, False, scale=scale)[0]
            return out[..., :width] if out.shape[-1] != width else out
        bias = None if attn_mask is None else _additive(attn_mask, query.dtype)
        if kernel == "math":
            out = run(*inputs, bias, dropout_p, False, None, scale=scale)[0]
            return out
        with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        if bias is not None:
            shape = (*query.shape[:3], key.shape[2])
            bias = (_aligned(bias) if kernel == "efficient" else bias).expand(shape)
        flags = (False, False) if kernel == "cudnn" else (False,)
        out = run(*inputs, bias, with_grad, dropout_p, *flags, scale=scale)[0]
        return out

    return attention


def _prefers_cudnn(gpu: Gpu) -> bool:
    """Torch 2.11 with a recent cuDNN, on datacenter Hopper and Blackwell."""
    newer = torch.__version__.split(".")[:2] >= ["2", "11"]
    return newer and gpu.cudnn > 91500 and gpu.capability in ((9, 0), (10, 0), (10, 3))


def _cudnn_can(query: Tensor, key: Tensor, value: Tensor, dropout: float, gpu: Gpu) -> bool:
    widths = (query.shape[-1], value.shape[-1])
    return (
        not torch.are_deterministic_algorithms_enabled()
        and query.dtype in _HALF
        and gpu.has_bf16
        and (dropout * 16).is_integer()
        and not (dropout > 0 and 91100 < gpu.cudnn < 91400)
        and all(width % 8 == 0 and width <= _CUDNN_WIDTH for width in widths)
        and key.shape[2] > 1
        and not (dropout > 0 and query.shape[2] == 1)
    )


def _flash_can(query: Tensor, key: Tensor, value: Tensor, dropout: float, gpu: Gpu) -> bool:
    width = query.shape[-1]
    # GPUs with little shared memory cannot run the backward pass of wide heads.
    narrow = (8, 6) <= gpu.capability <= (8, 9) or gpu.capability >= (12, 0)
    limit = _FLASH_WIDTH_SMALL_SHARED_MEMORY if narrow and query.requires_grad else _FLASH_WIDTH
    return (
        gpu.capability >= (8, 0)
        and query.dtype in _HALF
        and key.shape[-1] == width == value.shape[-1]
        and (width <= limit or (not dropout and 224 < width <= _FLASH_WIDTH))
    )


def _efficient_can(query: Tensor, key: Tensor, value: Tensor, gpu: Gpu) -> bool:
    half = query.dtype in _HALF
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if query.dtype == torch.bfloat16 and not gpu.has_bf16:
        return False
    alignment = 4 if gpu.capability >= (8, 0) else 1
    if gpu.capability >= (8, 0) or (half and gpu.capability >= (7, 0)):
        alignment = max(alignment, 8 if half else 4)
    return (
        query.shape[-1] == key.shape[-1]
        and query.shape[-1] % alignment == 0
        and value.shape[-1] % alignment == 0
    )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a bool mask into numbers to add: 0 where a key is visible, -inf elsewhere."""
    if mask.dtype != torch.bool:
        return mask
    nothing = torch.scalar_tensor(float("-inf"), dtype=dtype, device=mask.device)
    return torch.where(mask, 0.0, nothing)


def _aligned(bias: Tensor) -> Tensor:
    """Lay the rows out with a stride that is a multiple of 8 numbers."""
    columns = bias.shape[-1]
    if columns % 8 == 0:
        return bias
    return F.pad(bias, (0, 8 - columns % 8))[..., :columns]


class Workspaces:
    """What libraries and kernels allocate for themselves; no operation returns it."""

    def __init__(self, gpu: Gpu) -> None:
        """Start as in a new process."""
        self.gpu = gpu
        aten = torch.ops.aten
        self._products = {getattr(aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}
        self._threads: set[bool] = set()

    def restart(self) -> None:
        """Start as in a new process, in which no thread has used cuBLAS."""
        self._threads.clear()

    def kept(self, func: Any, args: tuple[Any, ...], *, backward: bool) -> int:
        """Return the bytes that cuBLAS takes now and keeps: at a thread's first matrix product.

        torch's engine runs the backward pass in a thread of its own.
        """
        if backward in self._threads or func not in self._products:
            return 0
        if args[0].device.type != "cuda":
            return 0
        self._threads.add(backward)
        return self.gpu.cublas_workspace()

    def during(self, func: Any, args: tuple[Any, ...]) -> list[int]:  # noqa: ARG002
        """Return the bytes of blocks that an operation allocates and frees: none are known here.

        benchmarks/gpu_workspaces.py knows those of an H200; the prediction adds a margin instead.
        """
        return []
