"""Every storage that operations allocate on a device, and when it goes.

Works for real and for fake tensors, and with any engine for the backward pass: it sees what
operations return.  What kernels take for themselves has to be said by `Workspaces`.
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
from runkey.memory.trace.workspaces import Workspaces


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

    def __init__(
        self, device_type: str, scope: Scope, workspaces: Workspaces | None = None
    ) -> None:
        """A tracker.

        Args:
            device_type: what to look at.
            scope: where the step is.
            workspaces: of its kernels.
        """
        super().__init__()
        self.records: list[Record] = []
        """By number of block."""
        self.log: list[tuple[Kind, int, Phase]] = []
        """What happened to which block."""
        self.alive: dict[int, Record] = {}
        """By number of block, in the order of allocation."""
        self._device_type = device_type
        self._scope = scope
        self._workspaces = workspaces
        self._lives: dict[int, _Life] = {}
        self._watching = True
        self.library: list[int] = []
        """Blocks that libraries keep."""
        self.outside: set[int] = set()
        """Storages (`_cdata`) on the device that are not the step's own: a batch on a CPU."""

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
        if self._workspaces is not None:
            self._add_workspaces(func, args)
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

    def forget_libraries(self) -> None:
        """Let the libraries take their workspaces anew."""
        for block in self.library:
            self.alive.pop(block, None)
        if self._workspaces is not None:
            self._workspaces.restart()

    def stop(self) -> None:
        """Ignore frees from now on."""
        self._watching = False

    def _look(self, tensor: Tensor) -> None:
        if tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.outside:
            return
        life = self._lives.get(key)
        if life is not None:
            if self.records[life.block].bytes == size:
                return
            self._free(life)  # It was resized.
        if size:
            self._allocate(storage, key, size)

    def _allocate(self, storage: torch.UntypedStorage, key: int, size: int) -> None:
        life = _Life(storage, self._free)
        life.block, life.key = self._record(size).block, key
        self._lives[key] = life

    def _record(self, size: int) -> Record:
        scope = self._scope
        record = Record(
            len(self.records), size, scope.path, scope.phase, scope.node, scope.recomputing
        )
        self.records.append(record)
        self.alive[record.block] = record
        self.log.append(("alloc", record.block, scope.phase))
        return record

    def _add_workspaces(self, func: Any, args: Any) -> None:
        """What the kernel took while it ran, and what its library keeps from now on."""
        assert self._workspaces is not None
        phase = self._scope.phase
        kept = self._workspaces.cublas(func, args, backward=phase == "backward")
        if kept:
            self.library.append(self._record(kept).block)
        taken = [self._record(size) for size in self._workspaces.of(func, args)]
        for record in taken:
            del self.alive[record.block]
            record.freed_at_node = record.node
            self.log.append(("free", record.block, phase))

    def _free(self, life: _Life) -> None:
        if not self._watching or life.block not in self.alive:
            return
        record = self.alive.pop(life.block)
        record.freed_at_node = self._scope.node
        if self._lives.get(life.key) is life:
            del self._lives[life.key]
        self.log.append(("free", life.block, self._scope.phase))
