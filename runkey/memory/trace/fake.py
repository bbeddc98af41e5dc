"""A CUDA device that is not there: everything that a step asks of it is answered as a GPU would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from runkey.data import normalise
from runkey.memory.trace.attention import attend
from runkey.memory.trace.backward import run_backward
from runkey.memory.trace.gpu import Gpu

CUDA = torch.device("cuda", 0)


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Tensors made in this context have shapes, strides and devices, and no memory.

    The one cache of the project that would carry fake tensors out of it, or real ones into it, is
    emptied at both ends.
    """
    normalise.constants.cache_clear()
    try:
        with (
            patch.object(torch.utils, "swap_tensors", _move),
            patch.object(FakeTensor, "__deepcopy__", _copy, create=True),
            FakeTensorMode() as mode,
        ):
            yield mode
    finally:
        normalise.constants.cache_clear()


@contextmanager
def fake_cuda(gpu: Gpu) -> Iterator[None]:
    """Answer what torch's Python code asks about the GPU, and choose the kernels that it would.

    Without this, autocast turns itself off with a warning, attention is materialised, and
    convolutions in bf16 lose the memory format that cuDNN keeps.
    """
    with ExitStack() as stack:
        replaced: list[tuple[Any, str, Callable[..., Any]]] = [
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: gpu.has_bf16),
            (torch.cuda, "get_device_capability", lambda *_: gpu.capability),
            (F, "scaled_dot_product_attention", _attention(gpu)),
            (torch._C, "_conv_determine_backend_memory_format", _convolution_format),
        ]
        for place, name, value in replaced:
            stack.enter_context(patch.object(place, name, value))
        yield


@contextmanager
def own_backward(
    on_node: Callable[[int], None], started: Callable[[], None], ended: Callable[[], None]
) -> Iterator[None]:
    """Let `Tensor.backward` be ours.

    Args:
        on_node: see `run_backward`.
        started: called before a backward pass.
        ended: called after it.
    """

    def backward(tensors: Tensor, gradient: Tensor | None = None, *_: object, **__: object) -> None:
        started()
        run_backward(tensors, gradient, on_node)
        ended()

    with patch.object(torch.autograd, "backward", backward):
        yield


def _convolution_format(images: Tensor, kernel: Tensor, _: Any) -> torch.memory_format:
    """Channels last if either of the two is, as cuDNN computes."""
    formats = (suggest_memory_format(images), suggest_memory_format(kernel))
    last = torch.channels_last
    return last if last in formats else torch.contiguous_format


def _move(old: Any, new: Any) -> None:
    """What a fake module's `to` does to a parameter.

    torch would swap two tensors, which it refuses since the fake mode keeps weak references to
    parameters; a real parameter gets new data, as here.
    """
    old.data = new.data
    old.fake_device = new.fake_device


def _copy(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
    """`copy.deepcopy` of a fake parameter or buffer; torch's looks at its data."""
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = copied
    found: Tensor = memo[id(tensor)]
    return found


def _attention(gpu: Gpu) -> Callable[..., Tensor]:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *,
        scale: float | None = None,
    ) -> Tensor:
        return attend(query, key, value, attn_mask, dropout_p, scale, gpu)

    return attention
