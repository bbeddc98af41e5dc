"""The backward pass, run node by node from Python.

torch's own engine needs a CUDA context and so fails on fake CUDA tensors without a GPU
(pytorch#92627). This one runs the same nodes in the same order, and sums, casts, steals and frees
gradients as that one does on real tensors: gradients are equal bit for bit, lifetimes to the byte
(tests/memory/test_exact.py). It supports no hooks, no double backward and no retained graph.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor

from runkey.memory.trace.torch_private import (
    GraphExecGroup,
    input_metadata,
    reference_counts,
    sequence_number,
)

_LEAF = "torch::autograd::AccumulateGrad"

Slots = list[Tensor | None]


def run_backward(
    root: Tensor, gradient: Tensor | None = None, on_node: Callable[[int], None] = lambda _: None
) -> None:
    """Add the gradients of a scalar to the leaves' `.grad`, and free the graph.

    Args:
        root: a scalar; it and the scalars that it is made from are detached.
        gradient: gradient of the root; None: 1.
        on_node: called with the sequence number of each node before it runs.
    """
    assert root.grad_fn is not None, "the loss does not depend on any parameter"
    with torch.no_grad(), GraphExecGroup():
        BackwardRun(on_node).run(root, torch.ones_like(root) if gradient is None else gradient)


class BackwardRun:
    """One backward pass."""

    def __init__(self, on_node: Callable[[int], None]) -> None:
        """Prepare a pass; `on_node`: see `run_backward`."""
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
        slots: Slots = [None] * len(input_metadata(node))
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
            self._on_node(sequence_number(node))
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
            and _is_dense(gradient)
        )

    def _push(self, node: Any, slots: Slots) -> None:
        priority = float("-inf") if node.name() == _LEAF else -float(sequence_number(node))
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
            slots = self._waiting.pop(key, None)
            if slots is None:
                slots = [None] * len(input_metadata(node))
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
            and _has_layout_of(gradient, variable)
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
        node = following[0] if len(following) == 1 and len(input_metadata(node)) == 1 else None
    for held in gc.get_objects():
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
    return -id(node.variable) if node.name() == _LEAF else sequence_number(node)


def _call(node: Any, slots: Slots, edges: Sequence[tuple[Any, int]]) -> Slots:
    """Run a node; cast its gradients to the shape and dtype that the next nodes expect."""
    result = node(*slots)
    outputs: Slots = list(result) if isinstance(result, tuple) else [result]
    del result
    for index, (following, slot) in enumerate(edges):
        gradient = outputs[index]
        if following is None or gradient is None:
            continue
        expected = input_metadata(following)[slot]
        shape = torch.Size(expected.shape)
        if gradient.shape != shape:
            gradient = gradient.sum_to_size(shape)
        if gradient.dtype != expected.dtype:
            gradient = gradient.to(expected.dtype)
        outputs[index] = gradient
    return outputs


# Of a tensor that nothing else refers to; torch's versions count differently.
_ALONE = reference_counts(torch.empty(1))


def _is_dense(tensor: Tensor) -> bool:
    """Return True if the elements lie without gap or overlap, in any order of dimensions."""
    expected = 1
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    for size, stride in sorted(pairs, key=lambda pair: pair[1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _has_layout_of(gradient: Tensor, variable: Tensor) -> bool:
    """Return True if a gradient has the strides of its variable, which is dense."""
    strides = zip(gradient.shape, gradient.stride(), variable.stride(), strict=True)
    return all(size == 1 or mine == theirs for size, mine, theirs in strides)
