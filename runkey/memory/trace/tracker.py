"""Every storage that operations allocate on a device, and when it goes.

Works for real and for fake tensors, and with any engine for the backward pass: it sees what
operations return (a kernel's own workspace it does not see).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runkey.memory.trace.events import Kind, Phase
from runkey.memory.trace.scope import Scope


@dataclass(slots=True)
class Record:
    """A block's life, as far as it is known."""

    block: int
    bytes: int
    module: str
    phase: Phase
    node: int
    recomputed: bool
    """Allocated while a checkpointed forward pass ran again."""
    freed_at_node: int = -1


class _Life(weakref.ref):  # type: ignore[type-arg]
    """A reference to a storage that knows its block."""

    __slots__ = ("block", "key")
    block: int
    key: int


class Tracker(TorchDispatchMode):
    """While it is entered, and later too for frees, it writes down allocations and frees."""

    def __init__(self, device_type: str, scope: Scope) -> None:
        super().__init__()
        self.records: list[Record] = []
        """By number of block."""
        self.log: list[tuple[Kind, int, Phase]] = []
        """What happened to which block."""
        self.alive: dict[int, Record] = {}
        """By number of block, in the order of allocation."""
        self._device_type = device_type
        self._scope = scope
        self._lives: dict[int, _Life] = {}
        self._watching = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._look(out)
        elif isinstance(out, (tuple, list)):
            for one in out:
                if isinstance(one, Tensor):
                    self._look(one)
                elif isinstance(one, (tuple, list)):
                    for inner in one:
                        if isinstance(inner, Tensor):
                            self._look(inner)
        return out

    def block_of(self, tensor: Tensor) -> int | None:
        """Number of the block that a tensor lies in; None if it is none of the device's."""
        life = self._lives.get(tensor.untyped_storage()._cdata)
        return None if life is None else life.block

    def blocks_of(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, int]]:
        """(name, number) of those tensors that lie on the device."""
        for name, tensor in tensors:
            block = self.block_of(tensor)
            if block is not None:
                yield name, block

    def stop(self) -> None:
        """Ignore frees from now on."""
        self._watching = False

    def _look(self, tensor: Tensor) -> None:
        if tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        life = self._lives.get(key)
        if life is not None:
            if self.records[life.block].bytes == size:
                return
            self._free(life)  # It was resized.
        if size:
            self._allocate(storage, key, size)

    def _allocate(self, storage: torch.UntypedStorage, key: int, size: int) -> None:
        scope = self._scope
        record = Record(
            len(self.records), size, scope.path, scope.phase, scope.node, scope.recomputing
        )
        life = _Life(storage, self._free)
        life.block, life.key = record.block, key
        self._lives[key] = life
        self.records.append(record)
        self.alive[record.block] = record
        self.log.append(("alloc", record.block, scope.phase))

    def _free(self, life: _Life) -> None:
        if not self._watching or life.block not in self.alive:
            return
        record = self.alive.pop(life.block)
        record.freed_at_node = self._scope.node
        if self._lives.get(life.key) is life:
            del self._lives[life.key]
        self.log.append(("free", life.block, self._scope.phase))
