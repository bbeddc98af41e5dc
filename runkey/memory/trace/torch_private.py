"""The private parts of torch that the memory prediction relies on, and a backward pass by them.

No other file of `runkey.memory` uses a private name of torch (tests/memory/test_torch_private.py).
`PARTS` lists the names and what each is for; importing this module with a torch that lacks one
raises an ImportError that names it. What they do and how to repair them: docs/memory-internals.md.
"""

from __future__ import annotations

import gc
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush
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
    "torch._prims_common.is_non_overlapping_and_dense": "whether a gradient is summed in place",
    "torch._prims_common.check_significant_strides": "whether a gradient is stolen",
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

from torch._prims_common import (  # noqa: E402
    check_significant_strides,
    is_non_overlapping_and_dense,
    suggest_memory_format,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.checkpoint import GraphExecGroup  # noqa: E402

from runkey.data.dataset import colour_constants  # noqa: E402

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
    """Give tensors made in this context shapes, strides and devices, but no memory."""
    # Cleared at both ends, so that no fake tensor leaves the context and no real one enters it.
    colour_constants.cache_clear()
    try:
        with (
            patch.object(torch.utils, "swap_tensors", _move),
            patch.object(FakeTensor, "__deepcopy__", _copy, create=True),
            FakeTensorMode() as mode,
        ):
            yield mode
    finally:
        colour_constants.cache_clear()


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
    """Give a fake parameter new data; torch would swap tensors, which weak references forbid."""
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
    """Return the number that the next autograd node will get; later nodes have larger ones."""
    return torch._C._autograd._get_sequence_nr()


def reference_counts(tensor: Tensor) -> tuple[int, int]:
    """Return how often C++ refers to a tensor, and to its storage."""
    storage = torch._C._storage_Use_Count(storage_key(tensor))
    return tensor._use_count(), storage  # type: ignore[attr-defined]


def storage_key(tensor: Tensor) -> int:
    """Return a number that identifies a tensor's storage while it lives."""
    key: int = tensor.untyped_storage()._cdata
    return key


# The backward pass, run node by node from Python. torch's own engine needs a CUDA context and so
# fails on fake CUDA tensors without a GPU (pytorch#92627). This one runs the same nodes in the same
# order, and sums, casts, steals and frees gradients as that one does on real tensors: gradients are
# equal bit for bit, lifetimes to the byte (tests/memory/test_exact.py). It supports no hooks, no
# double backward and no retained graph.


_LEAF = "torch::autograd::AccumulateGrad"
# Of a tensor that nothing else refers to; torch's versions count differently.
_ALONE = reference_counts(torch.empty(1))

Slots = list[Tensor | None]


def run_backward(
    root: Tensor, gradient: Tensor | None = None, on_node: Callable[[int], None] = lambda _: None
) -> None:
    """Add the gradients of a scalar to the leaves' `.grad`, and free the graph.

    The root and the scalars that it is made from are detached; its own gradient is 1 by default.
    `on_node` is called with the sequence number of each node before it runs.
    """
    assert root.grad_fn is not None, "the loss does not depend on any parameter"
    with torch.no_grad(), GraphExecGroup():
        BackwardRun(on_node).run(root, torch.ones_like(root) if gradient is None else gradient)


class BackwardRun:
    """One backward pass."""

    def __init__(self, on_node: Callable[[int], None]) -> None:
        self._on_node = on_node
        self._awaited: Counter[int] = Counter()
        self._waiting: dict[int, Slots] = {}
        # Highest sequence number first, leaves before all; among leaves, first come first served.
        self._ready: list[tuple[float, int, Any, Slots]] = []
        self._pushed = 0
        # In how many slots a gradient stands; torch's engine counts references instead.
        self._slots_of: Counter[int] = Counter()

    def run(self, root: Tensor, seed: Tensor) -> None:
        """Detach the root and run every node; `seed`, the root's gradient, lives until the end."""
        node: Any = root.grad_fn
        slots: Slots = [None] * len(node._input_metadata)
        slots[root.output_nr] = seed
        self._slots_of[id(seed)] += 2  # Its slot's reference, and ours.
        self._awaited = _count_dependencies(node)
        self._push(node, slots)
        # Only the heap refers to them from here on.
        del node, slots
        _detach_chain(root)
        while self._ready:
            _, _, node, slots = heappop(self._ready)
            if node.name() == _LEAF:
                self._accumulate(node.variable, slots)
                continue
            self._on_node(node._sequence_nr())
            edges = node.next_functions
            outputs = _call(node, slots, edges)
            self._release(slots)
            # The last reference: the tensors that the node has saved are freed with it.
            del node
            self._hand_on(edges, outputs)

    def is_sole(self, gradient: Tensor) -> bool:
        """Return True if nothing else refers to a gradient, so that it may be summed in place."""
        return (
            self._slots_of[id(gradient)] == 1
            and reference_counts(gradient) == _ALONE
            and is_non_overlapping_and_dense(gradient)
        )

    def _push(self, node: Any, slots: Slots) -> None:
        priority = float("-inf") if node.name() == _LEAF else -float(node._sequence_nr())
        heappush(self._ready, (priority, self._pushed, node, slots))
        self._pushed += 1

    def _release(self, slots: Slots) -> None:
        for gradient in slots:
            if gradient is not None:
                self._slots_of[id(gradient)] -= 1
                if not self._slots_of[id(gradient)]:
                    del self._slots_of[id(gradient)]
        slots.clear()

    def _hand_on(self, edges: Sequence[tuple[Any, int]], outputs: Slots) -> None:
        """Put a node's gradients into the slots of the nodes that they are for.

        A gradient that is added to another one lives until all are handed on.
        """
        added = []
        for gradient in outputs:
            if gradient is not None:
                self._slots_of[id(gradient)] += 1
        for index, (node, slot) in enumerate(edges):
            gradient, outputs[index] = outputs[index], None
            if node is None:
                if gradient is not None:
                    self._release([gradient])
                continue
            key = _key(node)
            slots = self._waiting.pop(key, None) or [None] * len(node._input_metadata)
            if gradient is not None:
                if slots[slot] is not None:
                    added.append(gradient)
                slots[slot] = self._sum(slots[slot], gradient)
            del gradient
            self._awaited[key] -= 1
            if self._awaited[key]:
                self._waiting[key] = slots
            else:
                self._push(node, slots)

    def _sum(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Add two gradients of one tensor; in place if nothing else needs the first."""
        if old is None:
            return new
        if self.is_sole(old):
            self._release([new])
            return old.add_(new)
        total = old + new
        self._release([old, new])
        self._slots_of[id(total)] += 1
        return total

    def _accumulate(self, variable: Tensor, slots: Slots) -> None:
        """Add to a leaf's gradient, or steal the new gradient if nothing else needs it."""
        (gradient,) = slots
        if gradient is None:
            return
        if variable.grad is not None:
            variable.grad.add_(gradient)
        elif (
            self._slots_of[id(gradient)] == 1
            and reference_counts(gradient)[0] == _ALONE[0]
            and check_significant_strides(gradient, variable, only_cuda=False)[0]
        ):
            variable.grad = gradient.detach()
        else:
            variable.grad = torch.empty_like(variable).copy_(gradient)
        self._release(slots)


def _detach_chain(root: Tensor) -> None:
    """Detach the root and whatever else Python holds of the scalars it was made from.

    A graph lives as long as a tensor made by it. torch frees what its nodes have saved all the
    same; from Python that needs the tensors detached.
    """
    chain, node = [], root.grad_fn
    while node is not None:
        chain.append(node)
        following = [one for one, _ in node.next_functions if one is not None]
        node = following[0] if len(following) == 1 and len(node._input_metadata) == 1 else None
    # While nothing is collected (`record.recorder`), all new objects are in the first generation.
    for held in gc.get_objects(None if gc.isenabled() else 0):
        if issubclass(type(held), Tensor) and held.grad_fn in chain:
            held.detach_()


def _count_dependencies(root: Any) -> Counter[int]:
    """Count the gradients that each node waits for; keeps no node alive."""
    count: Counter[int] = Counter()
    seen, stack = {_key(root)}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            key = _key(node)
            count[key] += 1
            if key not in seen:
                seen.add(key)
                stack.append(node)
    return count


def _key(node: Any) -> int:
    """Identify a node; Python's objects for nodes come and go."""
    return -id(node.variable) if node.name() == _LEAF else node._sequence_nr()


def _call(node: Any, slots: Slots, edges: Sequence[tuple[Any, int]]) -> Slots:
    """Run a node; cast its gradients to the shape and dtype that the next nodes expect."""
    result = node(*slots)
    outputs: Slots = list(result) if isinstance(result, tuple) else [result]
    del result
    for index, (following, slot) in enumerate(edges):
        gradient = outputs[index]
        if following is None or gradient is None:
            continue
        expected = following._input_metadata[slot]
        shape = torch.Size(expected.shape)
        if gradient.shape != shape:
            gradient = gradient.sum_to_size(shape)
        if gradient.dtype != expected.dtype:
            gradient = gradient.to(expected.dtype)
        outputs[index] = gradient
    return outputs
