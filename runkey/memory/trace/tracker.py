"""What each block of a traced step was for, seen from its end."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from runkey.memory.trace.workspaces import Workspaces
from runkey.model import backbones

# What a traced training step is: allocations and frees of blocks of device memory, in order.


Kind = Literal["alloc", "free"]
Phase = Literal["setup", "forward", "backward", "optimizer"]
"""setup: the model, its average and what lives as long as they do, before the first step."""
BlockClass = Literal[
    "parameter", "buffer", "gradient", "optimizer", "activation", "input", "temporary", "library"
]
"""parameter and buffer: the model's, and its moving average's (module `ema...`).  optimizer:
moments, step counters, the loss scale.  input: a batch as it came and as the model reads it.
activation: kept by the forward pass (or its recomputation) for the backward pass.  library:
workspaces that cuBLAS keeps.  temporary: everything else."""
CLASSES: tuple[BlockClass, ...] = get_args(BlockClass)


class Event(NamedTuple):
    """One allocation or free.  Both events of a block carry the same bytes, class and module."""

    kind: Kind
    block: int
    """Number of the block, unique in a session."""
    bytes: int
    """Bytes asked for, not rounded."""
    class_: BlockClass
    module: str
    """Path of the module that allocated it (`transformer.encoder.layers.0`), or whose backward
    pass did; a parameter's, buffer's, gradient's or moment's own path; "" outside of the model."""
    phase: Phase
    """When the event happened."""


class Mark(NamedTuple):
    """Where a phase begins."""

    start: int
    """Index of its first event; the end of the events if it has none."""
    phase: Phase


@dataclass(frozen=True, slots=True)
class Pass:
    """One micro-batch: what its forward and backward pass allocate follows from these numbers."""

    batch: int
    """Images."""
    height: int
    """Padded, pixels."""
    width: int
    objects: int
    """Boxes of each image."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One optimizer step over a window of micro-batches."""

    passes: tuple[Pass, ...]
    """The window's micro-batches; forward and backward phases alternate over them."""
    before: tuple[Event, ...]
    """Blocks that are alive when the step starts, as allocations."""
    events: tuple[Event, ...]
    marks: tuple[Mark, ...]

    @property
    def batch(self) -> int:
        """Images of the largest micro-batch."""
        return max(one.batch for one in self.passes)

    @property
    def height(self) -> int:
        """Largest padded height, pixels."""
        return max(one.height for one in self.passes)

    @property
    def width(self) -> int:
        """Largest padded width, pixels."""
        return max(one.width for one in self.passes)


@dataclass(frozen=True, slots=True)
class Session:
    """A training from its first allocation to a step like all later ones.

    Replayed in order (`setup`, `first.events`, then `steady.events` as often as one likes) it is
    what an allocator would see of a training on a single shape.
    """

    setup: tuple[Event, ...]
    """Allocations and frees while the model, the average and the optimizer are built."""
    first: Trace
    """The first step: it makes the optimizer's state and the libraries' workspaces."""
    steady: Trace
    """Every later step.  What is alive at its end is what was alive at its start, block by block
    of the same bytes; see `runkey.memory.allocator`."""


# Where a step is: its phase, and the module whose forward or backward pass allocates.


class Scope:
    """The present phase and module path.

    Autograd numbers its nodes in the order of their making.  The numbers at which a module was
    entered and left tell later, in the backward pass, which module made a node.
    """

    def __init__(self) -> None:
        self.phase: Phase = "setup"
        self.path = ""
        self.node = 0
        """Backward: how many nodes have run."""
        self.recomputing = False
        """Backward: inside of a forward pass that is run again."""
        self.on_model: Callable[[], None] = lambda: None
        """Called when a model that is watched starts its forward pass."""
        self._names: dict[int, str] = {}
        self._stack: list[str] = []
        self._numbers: list[int] = [0]
        self._paths: list[str] = [""]

    def name(self, model: nn.Module) -> None:
        """Learn the paths of a model's modules."""
        self._names = {id(module): path for path, module in model.named_modules()}

    def enter(self, module: nn.Module) -> None:
        """A module's forward pass begins."""
        path = self._names.get(id(module), self.path)
        self._stack.append(self.path)
        if not path and self.phase != "backward":
            self.on_model()
        self.recomputing = self.phase == "backward"
        self._move(path)

    def leave(self) -> None:
        """It ends, by an exception or not."""
        if self._stack:
            self._move(self._stack.pop())

    def enter_node(self, number: int) -> None:
        """A node of the backward pass is about to run.

        Args:
            number: its sequence number; that of a parameter's gradient is no module's.
        """
        self.node += 1
        self.recomputing = False
        self._stack.clear()
        self.path = self._paths[bisect_right(self._numbers, number) - 1]

    def start(self, phase: Phase) -> None:
        """Another phase begins, outside of all modules."""
        self.phase, self.path, self.recomputing = phase, "", False
        self._stack.clear()
        self._move("")

    def forget_nodes(self) -> None:
        """A backward pass has ended: no node made before will run."""
        number = torch._C._autograd._get_sequence_nr()
        self._numbers, self._paths = [number], [self.path]

    def _move(self, path: str) -> None:
        self.path = path
        if self.phase == "forward":
            number = torch._C._autograd._get_sequence_nr()
            if number == self._numbers[-1]:
                self._paths[-1] = path
            else:
                self._numbers.append(number)
                self._paths.append(path)


@contextmanager
def watching(scope: Scope) -> Iterator[None]:
    """Tell `scope` of every module that is entered and left.

    A residual block and its convolutions are run by functions (`runkey.model.backbones`), not
    called as modules, so these functions are watched too.
    """

    def before(module: nn.Module, _: Any) -> None:
        scope.enter(module)

    def after(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        scope.leave()

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *rest: Any) -> Any:
            scope.enter(module)
            try:
                return function(module, *rest)
            finally:
                scope.leave()

        return call

    hooks = (
        register_module_forward_pre_hook(before),
        register_module_forward_hook(after, always_call=True),
    )
    originals = {name: getattr(backbones, name) for name in ("residual_block", "conv_norm")}
    for name, function in originals.items():
        setattr(backbones, name, watched(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(backbones, name, function)
        for hook in hooks:
            hook.remove()


# Every storage that operations allocate on a device, and when it goes.


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


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step in a tracker's log."""

    passes: tuple[Pass, ...]
    start: int
    end: int
    """Its part of the log."""
    before: tuple[int, ...]
    """Blocks alive at its start."""
    starts: tuple[tuple[int, Phase], ...]
    """Where in the log its phases begin."""
    inputs: frozenset[int]
    """Blocks allocated before the model ran and alive when it started."""
    gradients: Mapping[str, int]
    """Block of each parameter's gradient at the end."""


def classify(
    tracker: Tracker,
    setup: int,
    steps: Sequence[Step],
    persistent: Mapping[int, tuple[str, str]],
) -> tuple[tuple[Event, ...], list[Trace]]:
    """Events with classes, paths and phases.

    Args:
        tracker: its records and its log.
        setup: length of the log when all was built.
        steps: in their order.
        persistent: class and path of the blocks that outlive steps.
    """
    meanings: list[tuple[BlockClass, str]] = [("temporary", r.module) for r in tracker.records]
    for step in steps:
        _mark_step(tracker, step, meanings)
    for block, (kind, path) in persistent.items():
        meanings[block] = (cast(BlockClass, kind), path)
    setup_events = tuple(_event(tracker, meanings, index, "setup") for index in range(setup))
    return setup_events, [_trace(tracker, step, meanings) for step in steps]


def _mark_step(tracker: Tracker, step: Step, meanings: list[tuple[BlockClass, str]]) -> None:
    """Activations, inputs and gradients of a step."""
    alive: set[int] = set()
    phase_at = dict(step.starts)
    phase: Phase = "forward"
    for index in range(step.start, step.end):
        if index in phase_at:
            phase = phase_at[index]
            if phase == "backward":
                for block in alive:
                    meanings[block] = ("activation", meanings[block][1])
            alive.clear()
        kind, block, _ = tracker.log[index]
        if kind == "alloc":
            alive.add(block)
            if phase == "backward" and _is_recomputed(tracker.records[block]):
                meanings[block] = ("activation", meanings[block][1])
        else:
            alive.discard(block)
    for block in step.inputs:
        meanings[block] = ("input", "")
    for path, block in step.gradients.items():
        meanings[block] = ("gradient", path)


def _is_recomputed(record: Record) -> bool:
    """Allocated by a forward pass that ran again, and kept longer than it."""
    return record.recomputed and record.freed_at_node != record.node


def _trace(tracker: Tracker, step: Step, meanings: list[tuple[BlockClass, str]]) -> Trace:
    before = tuple(
        Event("alloc", block, tracker.records[block].bytes, *meanings[block], "setup")
        for block in step.before
    )
    events: list[Event] = []
    marks: list[Mark] = []
    starts = list(step.starts)
    phase: Phase = "forward"
    for index in range(step.start, step.end):
        while starts and starts[0][0] <= index:
            phase = starts.pop(0)[1]
            marks.append(Mark(index - step.start, phase))
        events.append(_event(tracker, meanings, index, phase))
    marks += [Mark(len(events), phase) for _, phase in starts]
    return Trace(step.passes, before, tuple(events), tuple(marks))


def _event(
    tracker: Tracker, meanings: list[tuple[BlockClass, str]], index: int, phase: Phase
) -> Event:
    kind, block, _ = tracker.log[index]
    return Event(kind, block, tracker.records[block].bytes, *meanings[block], phase)
