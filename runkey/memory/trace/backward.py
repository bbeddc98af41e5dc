"""The backward pass, node by node from Python.

torch's own engine asks a CUDA context for its streams and so fails on fake CUDA tensors where
there is no GPU.  This one runs the same nodes in the same order, sums, casts, steals and frees as
that one does on real tensors: gradients are the same bit for bit, lifetimes the same to the byte
(tests/memory).  It has no hooks, no double backward, no retained graph.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import GraphExecGroup

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
