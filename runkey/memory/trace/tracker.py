"""Watch a training step: which module runs, which blocks are allocated and freed, what each is."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from runkey.memory.trace.events import BlockClass, Event, Kind, Mark, MicroBatch, Phase, Trace
from runkey.memory.trace.gpu import Workspaces
from runkey.memory.trace.torch_private import (
    TorchDispatchMode,
    next_sequence_number,
    storage_key,
)
from runkey.model import backbones

# Where a step is: its phase, and the module whose forward or backward pass allocates.


class Scope:
    """The current phase and module path.

    Autograd numbers its nodes in the order of creation. In the backward pass, the numbers at which
    a module was entered and left tell which module made a node.
    """

    def __init__(self) -> None:
        self.phase: Phase = "setup"
        self.path = ""
        self.node = 0
        """Backward nodes that have run."""
        self.recomputing = False
        """Whether a checkpointed forward pass is running again, within the backward pass."""
        self.on_model: Callable[[], None] = lambda: None
        """Called when the model starts its forward pass."""
        self._names: dict[int, str] = {}
        self._stack: list[str] = []
        self._numbers: list[int] = [0]
        self._paths: list[str] = [""]

    def name(self, model: nn.Module) -> None:
        """Learn the paths of a model's modules."""
        self._names = {id(module): path for path, module in model.named_modules()}

    def enter(self, module: nn.Module) -> None:
        """Enter a module's forward pass."""
        path = self._names.get(id(module), self.path)
        self._stack.append(self.path)
        if not path and self.phase != "backward":
            self.on_model()
        self.recomputing = self.phase == "backward"
        self._move(path)

    def leave(self) -> None:
        """Leave the module's forward pass, by an exception or not."""
        if self._stack:
            self._move(self._stack.pop())

    def enter_node(self, sequence_number: int) -> None:
        """Enter a backward node; its sequence number tells the module."""
        self.node += 1
        self.recomputing = False
        self._stack.clear()
        self.path = self._paths[bisect_right(self._numbers, sequence_number) - 1]

    def start(self, phase: Phase) -> None:
        """Begin another phase, outside of all modules."""
        self.phase, self.path, self.recomputing = phase, "", False
        self._stack.clear()
        self._move("")

    def forget_nodes(self) -> None:
        """Forget the nodes of a backward pass that has ended."""
        self._numbers, self._paths = [next_sequence_number()], [self.path]

    def _move(self, path: str) -> None:
        self.path = path
        if self.phase == "forward":
            number = next_sequence_number()
            if number == self._numbers[-1]:
                self._paths[-1] = path
            else:
                self._numbers.append(number)
                self._paths.append(path)


@contextmanager
def watching(scope: Scope) -> Iterator[None]:
    """Tell `scope` of every module that is entered and left.

    Residual blocks and their convolutions are run by functions of `runkey.model.backbones`, not
    called as modules, so these functions are wrapped too.
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


# Every storage that operations allocate on a device, and when it is freed.


@dataclass(slots=True)
class BlockRecord:
    """What is known of a block."""

    block: int
    bytes: int
    module: str
    node: int
    recomputed: bool
    """Whether it was allocated while a checkpointed forward pass ran again."""
    freed_at_node: int = -1

    @property
    def outlives_recomputation(self) -> bool:
        """Whether a repeated forward pass allocated the block and the backward pass uses it."""
        return self.recomputed and self.freed_at_node != self.node


class _StorageRef(weakref.ref):  # type: ignore[type-arg]
    """A weak reference to a storage that knows its block."""

    __slots__ = ("block", "key")
    block: int
    key: int


class Tracker(TorchDispatchMode):
    """A log of allocations, while it is entered, and of their frees, at any time."""

    def __init__(self, device_type: str, scope: Scope, workspaces: Workspaces | None) -> None:
        """Watch tensors on a type of device.

        Args:
            device_type: such as "cuda".
            scope: the current phase and module.
            workspaces: what libraries and kernels allocate for themselves; None: not logged.
        """
        super().__init__()
        self.records: list[BlockRecord] = []
        """By number of block."""
        self.log: list[tuple[Kind, int]] = []
        """Events and their blocks."""
        self.alive: dict[int, BlockRecord] = {}
        """By number of block, in the order of allocation."""
        self.library: list[int] = []
        """Blocks that libraries keep."""
        self.outside: set[int] = set()
        """Keys of storages on the device that are not the step's own: a batch on a CPU."""
        self._device_type = device_type
        self._scope = scope
        self._workspaces = workspaces
        self._refs: dict[int, _StorageRef] = {}
        self._watching = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and log the storages of its results."""
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
            self._log_workspaces(self._workspaces, func, args)
        return out

    def blocks_of(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, int]]:
        """Yield name and block of the tensors that lie on the device."""
        for name, tensor in tensors:
            ref = self._refs.get(storage_key(tensor))
            if ref is not None:
                yield name, ref.block

    def forget_libraries(self) -> None:
        """Let the libraries allocate their workspaces again."""
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
        key, storage = storage_key(tensor), tensor.untyped_storage()
        size = storage.nbytes()
        if key in self.outside:
            return
        ref = self._refs.get(key)
        if ref is not None:
            if self.records[ref.block].bytes == size:
                return
            self._free(ref)  # It was resized.
        if size:
            ref = _StorageRef(storage, self._free)
            ref.block, ref.key = self._allocate(size).block, key
            self._refs[key] = ref

    def _allocate(self, size: int) -> BlockRecord:
        scope = self._scope
        record = BlockRecord(len(self.records), size, scope.path, scope.node, scope.recomputing)
        self.records.append(record)
        self.alive[record.block] = record
        self.log.append(("alloc", record.block))
        return record

    def _log_workspaces(self, workspaces: Workspaces, func: Any, args: Any) -> None:
        """Log what the kernel allocated while it ran, and what its library keeps from now on."""
        kept = workspaces.kept(func, args, backward=self._scope.phase == "backward")
        if kept:
            self.library.append(self._allocate(kept).block)
        taken = [self._allocate(size) for size in workspaces.during(func, args)]
        for record in taken:
            del self.alive[record.block]
            record.freed_at_node = record.node
            self.log.append(("free", record.block))

    def _free(self, ref: _StorageRef) -> None:
        if not self._watching or ref.block not in self.alive:
            return
        record = self.alive.pop(ref.block)
        record.freed_at_node = self._scope.node
        if self._refs.get(ref.key) is ref:
            del self._refs[ref.key]
        self.log.append(("free", ref.block))


# What each block was for, known at the end.


@dataclass(frozen=True, slots=True)
class StepLog:
    """One optimizer step in a tracker's log."""

    micro_batches: tuple[MicroBatch, ...]
    start: int
    end: int
    """Its part of the log."""
    before: tuple[int, ...]
    """Blocks alive at its start."""
    phases: tuple[tuple[int, Phase], ...]
    """Where in the log its phases begin."""
    inputs: frozenset[int]
    """Blocks allocated before the model ran and alive when it started."""
    gradients: Mapping[str, int]
    """Block of each parameter's gradient at the end."""


Meaning = tuple[BlockClass, str]
"""A block's class and module path."""


def classify(
    tracker: Tracker, setup: int, steps: Sequence[StepLog], persistent: Mapping[int, Meaning]
) -> tuple[tuple[Event, ...], list[Trace]]:
    """Give the logged blocks their classes and module paths.

    Args:
        tracker: its records and its log.
        setup: length of the log before the first step.
        steps: in their order.
        persistent: meaning of the blocks that outlive steps.

    Returns:
        The events before the first step, and a trace of each step.
    """
    meanings: list[Meaning] = [("temporary", record.module) for record in tracker.records]
    for step in steps:
        _classify_step(tracker, step, meanings)
    for block, meaning in persistent.items():
        meanings[block] = meaning
    setup_events = tuple(_event(tracker, meanings, index, "setup") for index in range(setup))
    return setup_events, [_trace(tracker, step, meanings) for step in steps]


def _classify_step(tracker: Tracker, step: StepLog, meanings: list[Meaning]) -> None:
    """Find the activations, inputs and gradients of a step."""
    alive: set[int] = set()
    phase_at = dict(step.phases)
    phase: Phase = "forward"
    for index in range(step.start, step.end):
        if index in phase_at:
            phase = phase_at[index]
            if phase == "backward":
                for block in alive:
                    meanings[block] = ("activation", meanings[block][1])
            alive.clear()
        kind, block = tracker.log[index]
        if kind == "alloc":
            alive.add(block)
            if phase == "backward" and tracker.records[block].outlives_recomputation:
                meanings[block] = ("activation", meanings[block][1])
        else:
            alive.discard(block)
    for block in step.inputs:
        meanings[block] = ("input", "")
    for path, block in step.gradients.items():
        meanings[block] = ("gradient", path)


def _trace(tracker: Tracker, step: StepLog, meanings: list[Meaning]) -> Trace:
    before = tuple(
        Event("alloc", block, tracker.records[block].bytes, *meanings[block], "setup")
        for block in step.before
    )
    events: list[Event] = []
    marks: list[Mark] = []
    starts = list(step.phases)
    phase: Phase = "forward"
    for index in range(step.start, step.end):
        while starts and starts[0][0] <= index:
            phase = starts.pop(0)[1]
            marks.append(Mark(index - step.start, phase))
        events.append(_event(tracker, meanings, index, phase))
    marks += [Mark(len(events), phase) for _, phase in starts]
    return Trace(step.micro_batches, before, tuple(events), tuple(marks))


def _event(tracker: Tracker, meanings: list[Meaning], index: int, phase: Phase) -> Event:
    kind, block = tracker.log[index]
    return Event(kind, block, tracker.records[block].bytes, *meanings[block], phase)
