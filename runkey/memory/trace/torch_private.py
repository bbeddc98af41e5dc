"""The private parts of torch that the memory prediction relies on.

No other file of `runkey.memory` uses a private name of torch (tests/memory/test_torch_private.py).
`PARTS` lists the names and what each is for; importing this module with a torch that lacks one
raises an ImportError that names it. What they do and how to repair them: docs/memory-internals.md.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = {
    "torch._subclasses.fake_tensor.FakeTensorMode": "tensors with shapes and devices, no memory",
    "torch._subclasses.fake_tensor.FakeTensor": "copies of fake parameters",
    "torch.utils._python_dispatch.TorchDispatchMode": "seeing every operation's results",
    "torch.utils.swap_tensors": "module.to() on fake parameters",
    "torch.utils.checkpoint.GraphExecGroup": "checkpointing under our backward pass",
    "torch.cuda.amp.common.amp_definitely_not_available": "autocast without a GPU",
    "torch._prims_common.suggest_memory_format": "the memory format that cuDNN keeps",
    "torch._C._conv_determine_backend_memory_format": "the memory format that cuDNN keeps",
    "torch._C._autograd._get_sequence_nr": "finding the module of a backward node",
    "torch._C._storage_Use_Count": "whether a gradient is summed in place or stolen",
    "torch.Tensor._use_count": "whether a gradient is summed in place or stolen",
    "torch.UntypedStorage._cdata": "telling storages apart",
    "torch.ops.aten._scaled_dot_product_attention_math": "attention as on a GPU",
    "torch.ops.aten._scaled_dot_product_flash_attention": "attention as on a GPU",
    "torch.ops.aten._scaled_dot_product_efficient_attention": "attention as on a GPU",
    "node._sequence_nr": "the order of the backward pass",
    "node._input_metadata": "shapes and dtypes of gradients",
}
"""Dotted name to what it is for; `node.` stands for a node of the autograd graph."""


def missing_parts(parts: Mapping[str, str] = PARTS) -> list[str]:
    """Return the private parts that the installed torch lacks, each with what it is for."""
    return [f"{name} ({purpose})" for name, purpose in parts.items() if not _exists(name)]


def _exists(name: str) -> bool:
    first, _, attribute = name.partition(".")
    try:
        if first == "node":
            getattr(torch.ones(1, requires_grad=True).exp().grad_fn, attribute)
        else:
            pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


_missing = missing_parts()
if _missing:
    raise ImportError(
        f"torch {torch.__version__} lacks {', '.join(_missing)}; the memory prediction needs it: "
        "install the locked torch, or see docs/memory-internals.md"
    )

from torch._prims_common import suggest_memory_format  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.checkpoint import GraphExecGroup  # noqa: E402

from runkey.data import normalise  # noqa: E402

__all__ = ["GraphExecGroup", "TorchDispatchMode"]

CUDA = torch.device("cuda", 0)
ATTENTION = {
    "math": torch.ops.aten._scaled_dot_product_attention_math,
    "flash": torch.ops.aten._scaled_dot_product_flash_attention,
    "efficient": torch.ops.aten._scaled_dot_product_efficient_attention,
}
"""Attention kernels; each returns a tuple whose first tensor is the result."""


# Fake tensors, on a CUDA device that is not there.


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Give tensors made in this context shapes, strides and devices, but no memory.

    The image normalisation's cache is cleared at both ends, so that no fake tensor leaves the
    context and no real one enters it.
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
def fake_cuda(
    capability: tuple[int, int], *, has_bf16: bool, attention: Callable[..., Tensor]
) -> Iterator[None]:
    """Answer what torch's Python code asks about the GPU, and replace its choice of kernels.

    Without this, autocast turns itself off with a warning, attention is materialised, and
    convolutions in bf16 lose the memory format that cuDNN keeps. `attention` stands for
    `F.scaled_dot_product_attention`.
    """
    with (
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: has_bf16),
        patch.object(torch.cuda, "get_device_capability", lambda *_: capability),
        patch.object(F, "scaled_dot_product_attention", attention),
        patch.object(torch._C, "_conv_determine_backend_memory_format", _convolution_format),
    ):
        yield


@contextmanager
def replaced_backward(run: Callable[[Tensor, Tensor | None], None]) -> Iterator[None]:
    """Let `Tensor.backward` call `run` with the root and its gradient."""

    def backward(tensors: Tensor, gradient: Tensor | None = None, *_: object, **__: object) -> None:
        run(tensors, gradient)

    with patch.object(torch.autograd, "backward", backward):
        yield


def _convolution_format(images: Tensor, kernel: Tensor, _: Any) -> torch.memory_format:
    """Return channels_last if either tensor has it, as cuDNN computes."""
    formats = (suggest_memory_format(images), suggest_memory_format(kernel))
    last = torch.channels_last
    return last if last in formats else torch.contiguous_format


def _move(old: Any, new: Any) -> None:
    """Give a fake parameter new data, as `module.to` does with a real one.

    torch would swap the two tensors, which fails because the fake mode holds weak references.
    """
    old.data = new.data
    old.fake_device = new.fake_device


def _copy(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
    """Deep-copy a fake parameter or buffer; torch's own function reads its data."""
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = copied
    found: Tensor = memo[id(tensor)]
    return found


# Autograd nodes, reference counts, storages.


def next_sequence_number() -> int:
    """Return the number that the next autograd node will get."""
    return torch._C._autograd._get_sequence_nr()


def sequence_number(node: Any) -> int:
    """Return the number of an autograd node; later nodes have larger ones."""
    number: int = node._sequence_nr()
    return number


def input_metadata(node: Any) -> Any:
    """Return shape and dtype of each gradient that an autograd node takes."""
    return node._input_metadata


def reference_counts(tensor: Tensor) -> tuple[int, int]:
    """Return how often C++ refers to a tensor, and to its storage."""
    storage = torch._C._storage_Use_Count(storage_key(tensor))
    return tensor._use_count(), storage  # type: ignore[attr-defined]


def storage_key(tensor: Tensor) -> int:
    """Return a number that identifies a tensor's storage while it lives."""
    key: int = tensor.untyped_storage()._cdata
    return key
