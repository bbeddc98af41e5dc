"""The gradients of a step: cleared, and added up over the ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from runkey.training.distributed import World


class Gradients:
    """The `.grad` of the trained parameters."""

    def __init__(self, parameters: Iterable[Tensor], world: World) -> None:
        """Take note of the parameters; all ranks have the same ones in the same order."""
        self._parameters = list(parameters)
        self._world = world

    def clear(self) -> None:
        """Let go of all gradients and their memory."""
        for parameter in self._parameters:
            parameter.grad = None

    def add_up(self) -> None:
        """Make each gradient the sum over ranks, the same bits on all of them.

        They travel in one piece, into which they are copied once a step: by then the activations
        are gone, so the copy does not add to the step's peak of memory.  A rank without a gradient
        (no image of this window was its) adds zero.
        """
        if self._world.size == 1:
            return
        for dtype in sorted({p.dtype for p in self._parameters}, key=str):
            self._add_up([p for p in self._parameters if p.dtype == dtype])

    def _add_up(self, parameters: list[Tensor]) -> None:
        total = sum(p.numel() for p in parameters)
        flat = torch.zeros(total, dtype=parameters[0].dtype, device=parameters[0].device)
        # A dense parameter's own strides (channels last): the optimizer reads both in one order.
        starts = [0]
        for parameter in parameters:
            starts.append(starts[-1] + parameter.numel())
        views = [
            flat.as_strided(p.shape, p.stride(), start)
            for p, start in zip(parameters, starts, strict=False)
        ]
        ours = [(v, p.grad) for v, p in zip(views, parameters, strict=True) if p.grad is not None]
        if ours:
            torch._foreach_copy_([v for v, _ in ours], [g for _, g in ours])
        for parameter, view in zip(parameters, views, strict=True):
            parameter.grad = view
        self._world.add_up(flat)
