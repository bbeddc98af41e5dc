"""What kernels allocate for themselves while they run: no operation returns it.

Sizes follow torch's sources (2.10, `Reduce.cuh`, `attention_backward.cu`, `flash_api.cpp`) and
equal to the byte what an H200 allocated (benchmarks/gpu_steps.py). Convolutions are cuDNN's, which
decides by heuristics: their entries are the values seen on that H200, exact for no other GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_kernels import AnyGpu

_HALF = (torch.float16, torch.bfloat16)
_WARP = 32
_BLOCK_THREADS = 512
# Numbers that one thread adds up.
_MIN_VALUES, _MAX_VALUES = 16, 256
# The most that cuDNN took on an H200 for the backward pass of a convolution with a 1 x 1 kernel,
# and with a larger one; in float32 and in half precision.
_CUDNN_FULL, _CUDNN_HALF = (17_301_760, 8_651_487), (6_291_728, 2_359_671)

_Sizes = Callable[[tuple[Any, ...], AnyGpu], list[int]]
"""(arguments of an operation, GPU) to bytes of its workspaces."""


class KernelGpu(AnyGpu):
    """A GPU with the workspaces of single kernels, not only those that libraries keep."""

    def workspaces(self, func: Any, args: tuple[Any, ...]) -> list[int]:
        """Return the bytes of an operation's workspaces in the order of allocation."""
        sizes = _KNOWN.get(func)
        if sizes is None or args[0].device.type != "cuda":
            return []
        return sizes(args, self)


def _sum(args: tuple[Any, ...], gpu: AnyGpu) -> list[int]:
    x: Tensor = args[0]
    every = tuple(range(x.ndim))
    reduced = {dim % x.ndim for dim in args[1] or every} if x.ndim else set()
    return reduction(x, reduced, gpu)


def reduction(x: Tensor, reduced: set[int], gpu: AnyGpu) -> list[int]:
    """Return the bytes of a sum's workspaces: partial sums of blocks, and their semaphores.

    Args:
        x: what is summed.
        reduced: the dimensions that are summed over.
        gpu: where the sum runs.

    Returns:
        Empty where one block of threads works on each output.
    """
    inputs = prod(x.shape[dim] for dim in reduced)
    outputs = prod(x.shape[dim] for dim in range(x.ndim) if dim not in reduced)
    wide = [dim for dim in range(x.ndim) if x.shape[dim] > 1]
    if not inputs or not outputs or not wide:
        return []
    fastest = min(wide, key=lambda dim: x.stride(dim))
    along_rows = fastest in reduced
    vector = 1
    if not along_rows and x.stride(fastest) == 1:
        vector = next(n for n in (4, 2, 1) if x.shape[fastest] % n == 0)
    first, second = (inputs, outputs) if along_rows else (outputs // vector, inputs)
    width, height = _block(first, second, _BLOCK_THREADS // vector)
    step_in, step_out = (width, 1) if along_rows else (1, width)
    if -(-inputs // step_in) < min(height * _MIN_VALUES, _MAX_VALUES):
        return []
    values = -(-inputs // (step_in * height))
    grid = -(-outputs // vector // step_out)
    most = gpu.threads_per_sm // (width * height) * gpu.sms
    if values < _MAX_VALUES or grid > most:
        return []
    parts = max(min(-(-most // grid), -(-values // _MIN_VALUES)), -(-values // _MAX_VALUES))
    if parts == 1:
        return []
    size = max(4, x.element_size()) * outputs * parts
    return [size if along_rows else size * width * vector, 4 * grid]


def _block(first: int, second: int, threads: int) -> tuple[int, int]:
    """Width and height of a block of threads."""
    first, second = (_power_below(n) if n < threads else threads for n in (first, second))
    width = min(first, _WARP)
    height = min(second, threads // width)
    return min(first, threads // height), height


def _power_below(value: int) -> int:
    return 1 << (value.bit_length() - 1)


def _efficient(args: tuple[Any, ...], _: AnyGpu) -> list[int]:
    """Gradients of the output and of rows, and a float32 accumulator of the query's gradient."""
    grad, query = args[0], args[1]
    batch, heads, rows, width = query.shape
    full = [] if query.dtype in _HALF else [grad.numel() * 4, batch * heads * rows * 4]
    rows_up, width_up = _up(rows, 64), _up(width, 64)
    accumulator = batch * heads * (4 * rows_up * width_up + 16 * (rows_up // 64))
    return [*full, batch * heads * rows * 4, accumulator]


def _flash(args: tuple[Any, ...], gpu: AnyGpu) -> list[int]:
    """Softmax sums and float32 accumulators of the query's gradient; deterministic: several."""
    query = args[1]
    batch, heads, rows, width = query.shape
    sums = batch * heads * _up(rows, 128) * 4
    copies = 1
    if torch.are_deterministic_algorithms_enabled():
        copies = -(-gpu.sms // (batch * heads))
    return [sums, sums * _up(width, 32) * copies]


def _convolution(args: tuple[Any, ...], _: AnyGpu) -> list[int]:
    """A copy of images with three channels; in half precision padded to 8 for tensor cores."""
    images, kernel = args[0], args[1]
    channels = images.shape[1]
    if channels >= 4:
        return []
    padded = 8 if images.dtype in _HALF else channels
    pixels = images.numel() // channels + kernel.numel() // channels
    return [pixels * padded * images.element_size() + 16]


def _convolution_backward(args: tuple[Any, ...], gpu: AnyGpu) -> list[int]:
    grad, images, kernel, with_bias = args[0], args[1], args[2], args[-1][2]
    if images.shape[1] < 4:
        # Both are copied into another memory format.
        return [(grad.numel() + images.numel()) * images.element_size()]
    seen = _CUDNN_HALF if images.dtype in _HALF else _CUDNN_FULL
    sums = reduction(grad, {0, 2, 3}, gpu) if with_bias else []
    return [seen[kernel.shape[-1] > 1], *sums]


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


_KNOWN: dict[Any, _Sizes] = {
    torch.ops.aten.sum.dim_IntList: _sum,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward.default: _efficient,
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default: _flash,
    torch.ops.aten.convolution.default: _convolution,
    torch.ops.aten.convolution_backward.default: _convolution_backward,
}
"""The kernels of a training step."""
