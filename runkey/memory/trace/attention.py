"""Which attention kernel a GPU would run, and how torch prepares its inputs.

torch chooses by asking the device, which a fake one cannot answer; it would fall back to
materialised attention and predict up to twice the memory.  The conditions below are those of
torch 2.10 and 2.11 for CUDA (`sdp_utils`), as far as this project's inputs can meet them: four
dimensions, nothing causal, no nested tensors, equal numbers of heads.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from runkey.memory.trace.gpu import Gpu

Kernel = Literal["flash", "efficient", "cudnn", "math"]
_HALF = (torch.float16, torch.bfloat16)
_FLASH_WIDTH = 256
_FLASH_WIDTH_SMALL_SHARED_MEMORY = 192
_CUDNN_WIDTH = 128


def choose_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, gpu: Gpu
) -> Kernel:
    """The kernel of `F.scaled_dot_product_attention`.

    Args:
        query: [B, H, T, E].
        key: [B, H, S, E].
        value: [B, H, S, Ev].
        mask: broadcastable to [B, H, T, S], or None.
        dropout: chance.
        gpu: where it would run.
    """
    if _prefers_cudnn(gpu) and _cudnn_can(query, key, value, dropout, gpu):
        return "cudnn"
    if mask is None and _flash_can(query, key, value, dropout, gpu):
        return "flash"
    if _efficient_can(query, key, value, gpu):
        return "efficient"
    return "math"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    gpu: Gpu,
) -> Tensor:
    """`F.scaled_dot_product_attention` as `gpu` would run it, with its derivative."""
    kernel = choose_kernel(query, key, value, mask, dropout, gpu)
    aten = torch.ops.aten
    bias = None if mask is None else _additive(mask, query.dtype)
    if kernel == "math":
        out: Tensor = aten._scaled_dot_product_attention_math(
            query, key, value, bias, dropout, False, None, scale=scale
        )[0]
        return out
    if kernel == "flash":
        width = query.shape[-1]
        padded = [
            F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x for x in (query, key, value)
        ]
        scale = width**-0.5 if scale is None else scale
        out = aten._scaled_dot_product_flash_attention(*padded, dropout, False, False, scale=scale)[
            0
        ]
        return out[..., :width] if out.shape[-1] != width else out
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if bias is not None:
        shape = (*query.shape[:3], key.shape[2])
        bias = (_aligned(bias) if kernel == "efficient" else bias).expand(shape)
    if kernel == "cudnn":
        out = aten._scaled_dot_product_cudnn_attention(
            query, key, value, bias, keep, dropout, False, False, scale=scale
        )[0]
        return out
    out = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, keep, dropout, False, scale=scale
    )[0]
    return out


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
    """A bool mask as numbers to add: 0 where a key may be seen, minus infinity elsewhere."""
    if mask.dtype != torch.bool:
        return mask
    nothing = torch.scalar_tensor(float("-inf"), dtype=dtype, device=mask.device)
    return torch.where(mask, 0.0, nothing)


def _aligned(bias: Tensor) -> Tensor:
    """Rows of a multiple of 8 or 16 numbers, of which the last ones are not seen."""
    columns = bias.shape[-1]
    if columns % 8 == 0:
        return bias
    return F.pad(bias, (0, 8 - columns % 8))[..., :columns]
