"""The backward pass, node by node from Python.

torch's own engine asks a CUDA context for its streams and so fails on fake CUDA tensors where
there is no GPU.  This one runs the same nodes in the same order, sums, casts, steals and frees as
that one does on real tensors: gradients are the same bit for bit, lifetimes the same to the byte
(tests/memory).  It has no hooks, no double backward, no retained graph.
"""

from __future__ import annotations

import gc
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import GraphExecGroup

# What of a GPU decides about memory: which kernels run, and what they take for themselves.


KIB, MIB = 2**10, 2**20

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
    """Version of cuDNN as torch tells it, such as 91002."""
    multiprocessors: int = 0
    """0: as many as a common GPU of its capability has."""

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bf16 (Ampere and later)."""
        return self.capability >= (8, 0)

    @property
    def sms(self) -> int:
        """Multiprocessors."""
        return self.multiprocessors or self._common()[0]

    @property
    def threads_per_sm(self) -> int:
        """Threads that a multiprocessor runs at once."""
        return self._common()[1]

    def cublas_workspace(self) -> int:
        """Bytes that cuBLAS keeps for each thread that uses it.

        `CUBLAS_WORKSPACE_CONFIG` decides (`runkey.training.device.set_up` sets 8 times 4 MiB);
        without it torch takes 32 MiB on Hopper and later, 8 MiB and 128 KiB before.
        """
        chosen = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
        pairs = re.findall(r":(\d+):(\d+)", chosen)
        if pairs:
            return sum(int(size) * KIB * int(count) for size, count in pairs)
        return 32 * MIB if self.capability >= (9, 0) else 8 * MIB + 128 * KIB

    def _common(self) -> tuple[int, int]:
        known = [one for one in _COMMON if one <= self.capability]
        return _COMMON[max(known, default=(6, 0))]


def present_gpu() -> Gpu:
    """The GPU that torch would use; torch must see one."""
    properties = torch.cuda.get_device_properties(0)
    return Gpu(
        (properties.major, properties.minor),
        torch.backends.cudnn.version() or 0,  # type: ignore[no-untyped-call]
        properties.multi_processor_count,
    )


# Which attention kernel a GPU would run, and how torch prepares its inputs.


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


_LEAF = "torch::autograd::AccumulateGrad"

Slots = list[Tensor | None]


def run_backward(
    root: Tensor, gradient: Tensor | None = None, on_node: Callable[[int], None] = lambda _: None
) -> None:
    """Add the gradients of a scalar to the leaves' `.grad`, and free the graph.

    Args:
        root: a scalar; it and the scalars that it is made from are detached.
        gradient: of the root; None: 1.
        on_node: called with the sequence number of each node before it runs.
    """
    assert root.grad_fn is not None, "the loss does not depend on any parameter"
    with torch.no_grad(), GraphExecGroup():
        # Alive until the end, as torch keeps it.
        seed = torch.ones_like(root) if gradient is None else gradient
        run = _Run(on_node)
        run.begin(root, seed)
        run.finish()


class _Run:
    """One backward pass."""

    def __init__(self, on_node: Callable[[int], None]) -> None:
        self.on_node = on_node
        self.awaited: Counter[int] = Counter()
        self.waiting: dict[int, Slots] = {}
        # Highest number first, leaves before all; among leaves, the one that was ready first.
        self.ready: list[tuple[float, int, Any, Slots]] = []
        self.pushed = 0
        # In how many slots a gradient stands: what torch's engine has as a count of references.
        self.held: Counter[int] = Counter()

    def begin(self, root: Tensor, seed: Tensor) -> None:
        node: Any = root.grad_fn
        slots: Slots = [None] * len(node._input_metadata)
        slots[root.output_nr] = seed
        self.held[id(seed)] += 2  # Its slot's reference, and the caller's.
        self.awaited = _dependencies(node)
        self._push(node, slots)
        _cut_off(root)

    def finish(self) -> None:
        while self.ready:
            _, _, node, slots = heappop(self.ready)
            if node.name() == _LEAF:
                self._accumulate(node.variable, slots)
                continue
            self.on_node(node._sequence_nr())
            edges = node.next_functions
            outputs = _call(node, slots, edges)
            self._release(slots)
            # The last reference: with the node go the tensors that it has saved.
            del node
            self._hand_on(edges, outputs)

    def _push(self, node: Any, slots: Slots) -> None:
        priority = float("-inf") if node.name() == _LEAF else -float(node._sequence_nr())
        heappush(self.ready, (priority, self.pushed, node, slots))
        self.pushed += 1

    def _release(self, slots: Slots) -> None:
        for gradient in slots:
            if gradient is not None:
                self.held[id(gradient)] -= 1
                if not self.held[id(gradient)]:
                    del self.held[id(gradient)]
        slots.clear()

    def _hand_on(self, edges: Sequence[tuple[Any, int]], outputs: Slots) -> None:
        """Put a node's gradients into the slots of the nodes that they are for.

        One that is added to another is alive until all are handed on.
        """
        added = []
        for gradient in outputs:
            if gradient is not None:
                self.held[id(gradient)] += 1
        for index, (node, number) in enumerate(edges):
            gradient, outputs[index] = outputs[index], None
            if node is None:
                if gradient is not None:
                    self._release([gradient])
                continue
            key = _key(node)
            slots = self.waiting.pop(key, None)
            if slots is None:
                slots = [None] * len(node._input_metadata)
            if gradient is not None:
                if slots[number] is not None:
                    added.append(gradient)
                slots[number] = self._sum(slots[number], gradient)
            del gradient
            self.awaited[key] -= 1
            if self.awaited[key]:
                self.waiting[key] = slots
            else:
                self._push(node, slots)

    def _sum(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Of two gradients of one tensor: into the first if nothing else needs it."""
        if old is None:
            return new
        if self._is_sole(old):
            self._release([new])
            return old.add_(new)
        total = old + new
        self._release([old, new])
        self.held[id(total)] += 1
        return total

    def _is_sole(self, gradient: Tensor) -> bool:
        return (
            self.held[id(gradient)] == 1 and _references(gradient) == _ALONE and _is_dense(gradient)
        )

    def _accumulate(self, variable: Tensor, slots: Slots) -> None:
        """Add to a leaf's gradient, or make it the leaf's gradient if it can be had."""
        (gradient,) = slots
        if gradient is None:
            return
        if variable.grad is not None:
            variable.grad.add_(gradient)
        elif (
            self.held[id(gradient)] == 1
            and _references(gradient)[0] == _ALONE[0]
            and _has_layout_of(gradient, variable)
        ):
            variable.grad = gradient.detach()
        else:
            variable.grad = _copy_in_layout_of(gradient, variable)
        self._release(slots)


def _cut_off(root: Tensor) -> None:
    """Detach the root, and what else Python holds of the scalars it was made from.

    A graph lives as long as a tensor made by it; torch frees what its nodes have saved all the
    same, which cannot be done from here.
    """
    chain, node = [], root.grad_fn
    while node is not None:
        chain.append(node)
        following = [one for one, _ in node.next_functions if one is not None]
        node = following[0] if len(following) == 1 and len(node._input_metadata) == 1 else None
    for held in gc.get_objects():
        if issubclass(type(held), Tensor) and held.grad_fn in chain:
            held.detach_()


def _dependencies(root: Any) -> Counter[int]:
    """How many gradients each node waits for; no node is kept alive."""
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
    """A number of the node's own: Python's objects for nodes come and go."""
    number: int = node._sequence_nr()
    if node.name() == _LEAF:
        return -id(node.variable)
    return number


def _call(node: Any, slots: Slots, edges: Sequence[tuple[Any, int]]) -> Slots:
    """The gradients that a node gives, in the shape and dtype that the next nodes expect."""
    result = node(*slots)
    outputs: Slots = list(result) if isinstance(result, tuple) else [result]
    del result
    for index, (following, number) in enumerate(edges):
        gradient = outputs[index]
        if following is None or gradient is None:
            continue
        expected = following._input_metadata[number]
        shape = torch.Size(expected.shape)
        if gradient.shape != shape:
            gradient = gradient.sum_to_size(shape)
        if gradient.dtype != expected.dtype:
            gradient = gradient.to(expected.dtype)
        outputs[index] = gradient
    return outputs


def _references(tensor: Tensor) -> tuple[int, int]:
    """References, from C++, to a tensor that Python has, and to its storage."""
    storage = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return tensor._use_count(), storage  # type: ignore[attr-defined]


# Of a tensor that nothing else refers to; torch's versions count differently.
_ALONE = _references(torch.empty(1))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements lie without gap or overlap, in any order of dimensions."""
    expected = 1
    for size, stride in sorted(
        ((size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)),
        key=lambda pair: pair[1],
    ):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _has_layout_of(gradient: Tensor, variable: Tensor) -> bool:
    """Whether a gradient lies in memory as its variable does (contiguous if that has gaps)."""
    if not _is_dense(variable):
        return gradient.is_contiguous()
    return all(
        size == 1 or mine == theirs
        for size, mine, theirs in zip(
            gradient.shape, gradient.stride(), variable.stride(), strict=True
        )
    )


def _copy_in_layout_of(gradient: Tensor, variable: Tensor) -> Tensor:
    if not _is_dense(variable):
        return gradient.clone(memory_format=torch.contiguous_format)
    copy = torch.empty_strided(
        variable.shape, variable.stride(), dtype=variable.dtype, device=variable.device
    )
    return copy.copy_(gradient)
