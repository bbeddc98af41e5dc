"""Copies of tensors in host memory that is used again and again.

Fresh memory costs five times the copy itself (page faults; on a GPU, page-locking), so each dtype
has one flat buffer, and every tensor its place in it.  Saved, such a buffer is one record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_ALIGNED = 16
"""Elements: every tensor begins at a multiple, as vector instructions like it."""


class HostCopy:
    """Takes copies of nested dicts and lists of tensors; each copy overwrites the one before."""

    def __init__(self) -> None:
        """Hold no memory yet."""
        self._shapes: list[tuple[torch.Size, tuple[int, ...], torch.dtype]] = []
        self._places: list[Tensor] = []
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def take(self, tree: Any) -> Any:
        """The same dicts and lists, with each tensor replaced by its copy on the host.

        On a GPU the copying is only queued behind the work there; `wait` before reading.
        """
        tensors = [tensor.detach() for tensor in _tensors(tree)]
        shapes = [(tensor.size(), tensor.stride(), tensor.dtype) for tensor in tensors]
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if shapes != self._shapes:
            self._allocate(tensors, pinned=on_gpu)
            self._shapes = shapes
        self._events = (_event(), _event()) if on_gpu else None
        if self._events:
            self._events[0].record()  # type: ignore[no-untyped-call]
        for place, tensor in zip(self._places, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        if self._events:
            self._events[1].record()  # type: ignore[no-untyped-call]
        places = iter(self._places)
        return _rebuilt(tree, lambda _: next(places))

    def wait(self) -> float:
        """Return when the last copy is whole; for any thread.

        Returns:
            Seconds that the GPU copied and did nothing else; 0 without one.
        """
        if self._events is None:
            return 0.0
        begun, ended = self._events
        ended.synchronize()
        milliseconds: float = begun.elapsed_time(ended)  # type: ignore[no-untyped-call]
        return milliseconds / 1000

    def _allocate(self, tensors: list[Tensor], *, pinned: bool) -> None:
        ends: dict[torch.dtype, int] = {}
        starts = []
        for tensor in tensors:
            start = ends.get(tensor.dtype, 0)
            starts.append(start)
            ends[tensor.dtype] = start + -(-tensor.numel() // _ALIGNED) * _ALIGNED
        # Zeros, for what lies between tensors is written too.
        self._buffers = {dtype: _zeros(end, dtype, pinned) for dtype, end in ends.items()}
        self._places = [
            torch.as_strided(
                self._buffers[tensor.dtype],
                tensor.size(),
                # Its own strides (channels last) if they leave no gaps.
                torch.empty_like(tensor, device="meta").stride(),
                start,
            )
            for start, tensor in zip(starts, tensors, strict=True)
        ]


def _zeros(length: int, dtype: torch.dtype, pinned: bool) -> Tensor:
    if pinned:
        # Hosts limit what can be page-locked.  Ordinary memory only makes the copy slower.
        with suppress(RuntimeError):
            return torch.zeros(length, dtype=dtype, pin_memory=True)
    return torch.zeros(length, dtype=dtype)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def is_finite(tree: Any) -> bool:
    """Whether tensors on the host, in nested dicts and lists, hold neither NaN nor infinity."""
    # The largest absolute value is NaN if one of them is.  No temporary, unlike isfinite.
    largest = [
        torch.linalg.vector_norm(tensor, float("inf"))
        for tensor in _tensors(tree)
        if tensor.is_floating_point() and tensor.numel()
    ]
    return all(value.isfinite() for value in largest)


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _rebuilt(tree, note)
    return found


def _rebuilt(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested dicts, lists and tuples, with each tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _rebuilt(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_rebuilt(value, change) for value in tree)
    return tree
