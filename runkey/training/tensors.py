"""Many tensors at once: inside nested values, in one flat tensor, and checked for NaN."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class FlatLayout:
    """Places for tensors of one dtype in one flat tensor, each in its shape and memory format.

    One flat tensor is copied, summed over ranks or compared in a few kernels, a hundred small
    tensors are not. Values and the order of arithmetic on each tensor stay as they are.
    """

    def __init__(self, tensors: Sequence[Tensor], alignment: int = 1) -> None:
        """Plan the places; each tensor begins at a multiple of `alignment` elements."""
        self._places: list[tuple[torch.Size, tuple[int, ...], int]] = []
        self.size = 0
        """Elements of the flat tensor."""
        for tensor in tensors:
            # The strides of a copy without gaps, channels last where the tensor is.
            stride = torch.empty_like(tensor, device="meta").stride()
            self._places.append((tensor.shape, stride, self.size))
            self.size += -(-tensor.numel() // alignment) * alignment

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return a view of `flat` [size] for each tensor, in their order."""
        return [flat.as_strided(shape, stride, start) for shape, stride, start in self._places]


def flat_groups(
    tensors: Iterable[Tensor], alignment: int = 1
) -> list[tuple[list[Tensor], FlatLayout]]:
    """Group tensors by dtype, in the order in which the dtypes appear, and plan their places."""
    groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype].append(tensor)
    return [(group, FlatLayout(group, alignment)) for group in groups.values()]


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return True if no floating tensor, all on one device, holds NaN or infinity; waits for it."""
    floating = [t for t in tensors if t.is_floating_point() and t.numel()]
    if not floating:
        return True
    # The largest absolute value cannot overflow, as a sum of squares can, and needs no copy.
    largest = torch.stack([n.double() for n in torch._foreach_norm(floating, float("inf"))])
    return bool(largest.isfinite().all())


def named_tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts, lists, tuples and dataclasses, with dotted places."""
    if isinstance(value, Tensor):
        yield place, value
        return
    for name, item in _items(value):
        yield from named_tensors(item, f"{place}.{name}" if place else name)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Copy nested dicts, lists, tuples and dataclasses, with their tensors changed, in order.

    What is not nested stays itself, and so do dataclasses without tensors.
    """
    if isinstance(value, Tensor):
        return change(value)
    before = [item for _, item in _items(value)]
    after = [map_tensors(item, change) for item in before]
    if isinstance(value, Mapping):
        return dict(zip(value, after, strict=True))
    if isinstance(value, list | tuple):
        # A named tuple takes its items one by one.
        return type(value)(*after) if hasattr(value, "_fields") else type(value)(after)
    if all(new is old for new, old in zip(after, before, strict=True)):
        return value
    names = [f.name for f in dataclasses.fields(value)]
    return dataclasses.replace(value, **dict(zip(names, after, strict=True)))


def _items(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [(str(index), item) for index, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return []


def host_weights(module: nn.Module) -> dict[str, Tensor]:
    """Copy a module's state dict to the host, as plain contiguous tensors."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in module.state_dict().items()
    }
