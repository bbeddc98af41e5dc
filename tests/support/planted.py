"""Modules that make numbers wrong, planted in a real model."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

How = Literal["forward", "backward"]


class Planted(nn.Module):
    """A module, and behind it an operation that goes wrong in one forward pass of many.

    The passes are counted in a buffer, which checkpoints hold: a replay goes wrong in the same one.
    """

    count: Tensor

    def __init__(self, inner: nn.Module, how: How, passes: set[int]) -> None:
        """Args: inner: the module.  how: which pass goes wrong.  passes: in training, from 1."""
        super().__init__()
        self.inner, self.how, self.passes = inner, how, passes
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, *args: Any) -> Any:
        out = self.inner(*args)
        if not self.training:
            return out
        self.count += 1
        if int(self.count) not in self.passes:
            return out
        # 0 / 0, or the gradient of a square root at 0.
        zero = (out - out).abs()
        return out + (zero / zero if self.how == "forward" else zero.sqrt())


def plant(model: nn.Module, name: str, how: How, passes: set[int]) -> str:
    """Put a `Planted` in the place of the module of that name; the name of what goes wrong."""
    parent, _, own = name.rpartition(".")
    holder = model.get_submodule(parent)
    planted = Planted(model.get_submodule(name), how, passes)
    if isinstance(holder, nn.ModuleList | nn.Sequential):
        holder[int(own)] = planted
    else:
        setattr(holder, own, planted)
    return name
