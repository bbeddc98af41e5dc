"""Tensors in numbers, and tensors inside of what modules take and return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorNumbers:
    """What a tensor holds.  Least, greatest and so on are of its finite elements."""

    shape: tuple[int, ...]
    dtype: str
    nan: int
    inf: int
    least: float
    """NaN, like the others, if no element is finite."""
    greatest: float
    mean: float
    greatest_absolute: float

    @property
    def is_finite(self) -> bool:
        """Whether there is neither NaN nor infinity."""
        return not self.nan + self.inf

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape)) or "scalar"
        bad = f"{self.nan} NaN, {self.inf} inf" if not self.is_finite else "finite"
        return (
            f"{self.dtype} [{size}]  {bad}  min {self.least:.4g}  max {self.greatest:.4g}  "
            f"mean {self.mean:.4g}  absmax {self.greatest_absolute:.4g}"
        )


@torch.no_grad()
def numbers_of(tensor: Tensor) -> TensorNumbers:
    """Read a floating tensor; waits for its device."""
    finite = tensor.isfinite()
    values = tensor[finite].double()
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    least = greatest = mean = absolute = float("nan")
    if values.numel():
        least, greatest = float(values.min()), float(values.max())
        mean, absolute = float(values.mean()), max(abs(least), abs(greatest))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorNumbers(tuple(tensor.shape), dtype, nan, inf, least, greatest, mean, absolute)


def floating(value: Any) -> list[tuple[str, Tensor]]:
    """The floating tensors in nested tuples, dicts and dataclasses, with their places in it."""
    return [(place, tensor) for place, tensor in _walk("", value) if tensor.is_floating_point()]


def _walk(place: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
        return
    for name, item in _items(value):
        yield from _walk(f"{place}.{name}" if place else name, item)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(index), item) for index, item in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))


def replaced(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested value with its tensors changed; itself where nothing is."""
    if isinstance(value, Tensor):
        return change(value)
    new = {name: replaced(item, change) for name, item in _items(value)}
    if all(new[name] is item for name, item in _items(value)):
        return value
    if isinstance(value, Mapping):
        return {key: new[str(key)] for key in value}
    if isinstance(value, list | tuple):
        # A named tuple takes its items one by one.
        return (
            type(value)(*new.values()) if hasattr(value, "_fields") else type(value)(new.values())
        )
    return dataclasses.replace(value, **new)
