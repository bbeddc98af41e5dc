"""Record training steps on fake tensors, allocation by allocation.

    with recorder(factory, BatchFields(num_classes, colour), gpu) as recording:
        for micro_batches in global_batches:
            recording.step(micro_batches)
        setup, traces = recording.traces()

The floors above, which know training, pass a `StepFactory`. The step itself is not changed: modules
are watched by hooks, operations by a dispatch mode.
"""

from __future__ import annotations

import os
import re
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from runkey.data.dataset import Batch, GlobalBatch
from runkey.memory.trace import torch_private
from runkey.memory.trace.backward import run_backward
from runkey.memory.trace.events import BlockClass, Event, Kind, Mark, MicroBatch, Phase, Trace
from runkey.memory.trace.gpu import Gpu
from runkey.memory.trace.torch_private import (
    TorchDispatchMode,
    next_sequence_number,
    storage_key,
)
from runkey.model import backbones
from runkey.model.criterion import Criterion
from runkey.model.matcher import Matcher
from runkey.units import KIB


@dataclass(frozen=True, slots=True)
class BuiltStep:
    """A training step, and what it trains."""

    step: Callable[[GlobalBatch], object]
    """Runs a whole optimizer step over a global batch, the moving average's update included."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: nn.Module | None
    """The moving average's module."""


StepFactory = Callable[[torch.device], BuiltStep]
"""Builds everything that trains on a device; its criterion is `with_fixed_matches`."""


class FixedMatcher(Matcher):
    """A matcher that reads no value, as fake tensors have none.

    Any assignment costs the same memory: its sizes follow from the numbers of boxes.
    """

    def read(self, cost: Tensor) -> npt.NDArray[np.floating]:
        """Take every cost for 0."""
        return np.zeros(cost.shape)


def with_fixed_matches(criterion: Criterion) -> Criterion:
    """Return the same criterion with a `FixedMatcher`."""
    matcher = criterion.matcher
    return replace(
        criterion,
        matcher=FixedMatcher(matcher.class_cost, matcher.classification, matcher.l1, matcher.giou),
    )


@dataclass(frozen=True, slots=True)
class BatchFields:
    """What a synthetic batch needs to know beside its sizes."""

    num_classes: int
    colour: int | None
    """Colour factors of an image (2, or 3 with saturation); None: colours are not changed."""


def synthetic_batch(sizes: MicroBatch, fields: BatchFields) -> Batch:
    """Make a batch on the CPU, of real or of fake tensors.

    The last image is smaller, as in a real batch that pads.
    """
    boxes = sizes.images * sizes.objects
    valid = torch.tensor([[sizes.height, sizes.width]] * sizes.images)
    if sizes.images > 1:
        valid[-1, 0] = max(1, sizes.height * 3 // 4)
    images = torch.zeros(sizes.images, sizes.height, sizes.width, 3, dtype=torch.uint8)
    colour = None if fields.colour is None else torch.ones(sizes.images, fields.colour)
    return Batch(
        images=images.permute(0, 3, 1, 2),
        sizes=valid,
        boxes_cxcywh=torch.linspace(0.2, 0.6, boxes * 4).view(boxes, 4),
        labels=torch.arange(boxes) % fields.num_classes,
        counts=(sizes.objects,) * sizes.images,
        image_ids=tuple(range(sizes.images)),
        original_sizes=valid,
        colour=colour,
    )


# Where a step is, every storage that its operations allocate on a device, and when it is freed.


@dataclass(slots=True)
class BlockRecord:
    """What is known of a block."""

    block: int
    bytes: int
    class_: BlockClass
    module: str
    node: int | None
    """Number of the backward node that ran a checkpointed forward pass again to make the block."""


class _StorageRef(weakref.ref):  # type: ignore[type-arg]
    """A weak reference to a storage that knows its block."""

    __slots__ = ("key", "record")
    key: int
    record: BlockRecord


_PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}


def _cublas_bytes() -> int:
    """Return what cuBLAS keeps for each thread that uses it (`runkey.training`: 8 times 4 MiB)."""
    pairs = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    return sum(int(size) * KIB * int(count) for size, count in pairs)


class Tracker(TorchDispatchMode):
    """A log of allocations, while it is entered, and of their frees, at any time.

    It knows the phase, and the module whose forward or backward pass allocates. Autograd numbers
    its nodes in the order of creation. In the backward pass, the numbers at which a module was
    entered and left tell which module made a node.
    """

    def __init__(self, device_type: str, gpu: Gpu | None, on_model: Callable[[], None]) -> None:
        """Watch tensors on a type of device.

        Args:
            device_type: such as "cuda".
            gpu: knows what kernels allocate for themselves, which no operation returns; None: this
                and what cuBLAS keeps are not logged.
            on_model: called when the model starts its forward pass.
        """
        super().__init__()
        self.phase: Phase = "setup"
        self.records: list[BlockRecord] = []
        """By number of block."""
        self.log: list[tuple[Kind, BlockRecord]] = []
        self.alive: dict[int, BlockRecord] = {}
        """By number of block, in the order of allocation."""
        self.library: list[BlockRecord] = []
        """What libraries keep."""
        self.outside: set[int] = set()
        """Keys of storages on the device that are not the step's own: a batch on a CPU."""
        self._device_type = device_type
        self._gpu = gpu
        self._cublas_threads: set[bool] = set()
        self._on_model = on_model
        self._refs: dict[int, _StorageRef] = {}
        self._stopped = False
        self._path = ""
        self._node = 0
        """Backward nodes that have run."""
        self._recomputing = False
        """Whether a checkpointed forward pass is running again, within the backward pass."""
        self._names: dict[int, str] = {}
        self._stack: list[str] = []
        self._numbers: list[int] = [0]
        self._paths: list[str] = [""]

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Log what operations allocate, by module of the model.

        Residual blocks and their convolutions are run by functions of `runkey.model.backbones`, not
        called as modules, so these functions are wrapped too.
        """
        self._names = {id(module): path for path, module in model.named_modules()}

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(module: nn.Module, *rest: Any) -> Any:
                self._enter(module)
                try:
                    return function(module, *rest)
                finally:
                    self._leave()

            return call

        with (
            register_module_forward_pre_hook(lambda module, _: self._enter(module)),
            register_module_forward_hook(lambda *_: self._leave(), always_call=True),
            patch.object(backbones, "residual_block", watched(backbones.residual_block)),
            patch.object(backbones, "conv_norm", watched(backbones.conv_norm)),
            self,
        ):
            yield

    def start(self, phase: Phase) -> None:
        """Begin another phase, outside of all modules."""
        self.phase, self._recomputing = phase, False
        self._stack.clear()
        self._move("")

    def enter_node(self, sequence_number: int) -> None:
        """Enter a backward node; its sequence number tells the module."""
        self._node += 1
        self._recomputing = False
        self._stack.clear()
        self._path = self._paths[bisect_right(self._numbers, sequence_number) - 1]

    def forget_nodes(self) -> None:
        """Forget the nodes of a backward pass that has ended."""
        self._numbers, self._paths = [next_sequence_number()], [self._path]

    def records_of(
        self, tensors: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, BlockRecord]]:
        """Yield name and block of the tensors that lie on the device."""
        for name, tensor in tensors:
            ref = self._refs.get(storage_key(tensor))
            if ref is not None:
                yield name, ref.record

    def alive_since(self, block: int) -> Iterator[BlockRecord]:
        """Yield the blocks that are alive, from a number on."""
        for number in reversed(self.alive):
            if number < block:
                return
            yield self.alive[number]

    def stop(self) -> None:
        """Ignore frees from now on."""
        self._stopped = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and log the storages of its results."""
        out = func(*args, **(kwargs or {}))
        self._look(out)
        if self._gpu is not None:
            self._log_workspaces(self._gpu, func, args)
        return out

    def _enter(self, module: nn.Module) -> None:
        path = self._names.get(id(module), self._path)
        self._stack.append(self._path)
        if not path and self.phase != "backward":
            self._on_model()
        self._recomputing = self.phase == "backward"
        self._move(path)

    def _leave(self) -> None:
        if self._stack:
            self._move(self._stack.pop())

    def _move(self, path: str) -> None:
        self._path = path
        if self.phase == "forward":
            number = next_sequence_number()
            if number == self._numbers[-1]:
                self._paths[-1] = path
            else:
                self._numbers.append(number)
                self._paths.append(path)

    def _look(self, out: Any) -> None:
        if isinstance(out, (tuple, list)):
            for one in out:
                self._look(one)
        if not isinstance(out, Tensor) or out.device.type != self._device_type:
            return
        key, storage = storage_key(out), out.untyped_storage()
        size = storage.nbytes()
        if key in self.outside:
            return
        ref = self._refs.get(key)
        if ref is not None:
            if ref.record.bytes == size:
                return
            self._free(ref)  # It was resized.
        if size:
            ref = self._refs[key] = _StorageRef(storage, self._free)
            ref.key, ref.record = key, self._allocate(size)

    def _allocate(self, size: int) -> BlockRecord:
        block, again = len(self.records), self._recomputing
        class_: BlockClass = "activation" if again else "temporary"
        record = BlockRecord(block, size, class_, self._path, self._node if again else None)
        self.records.append(record)
        self.alive[block] = record
        self.log.append(("alloc", record))
        return record

    def _log_workspaces(self, gpu: Gpu, func: Any, args: Any) -> None:
        """Log what the kernel allocated while it ran, and what cuBLAS keeps from now on.

        cuBLAS takes it at a thread's first matrix product; torch's engine runs the backward pass
        in a thread of its own.
        """
        thread = self.phase == "backward"
        if thread not in self._cublas_threads and func in _PRODUCTS:
            size = _cublas_bytes() if args[0].device.type == "cuda" else 0
            if size:
                self._cublas_threads.add(thread)
                self.library.append(self._allocate(size))
        for record in [self._allocate(size) for size in gpu.workspaces(func, args)]:
            self._end(record)

    def _free(self, ref: _StorageRef) -> None:
        if self._stopped or ref.record.block not in self.alive:
            return
        if self._refs.get(ref.key) is ref:
            del self._refs[ref.key]
        self._end(ref.record)

    def _end(self, record: BlockRecord) -> None:
        del self.alive[record.block]
        if record.class_ == "activation" and record.node == self._node:
            record.class_ = "temporary"  # the backward node that made it has not kept it
        self.log.append(("free", record))


# Steps of a training.


@dataclass(frozen=True, slots=True)
class _StepLog:
    """One optimizer step in a tracker's log."""

    micro_batches: tuple[MicroBatch, ...]
    before: tuple[BlockRecord, ...]
    start: int
    end: int
    """Its part of the log."""
    phases: tuple[tuple[int, Phase], ...]
    """Where in the log its phases begin."""


class Recorder:
    """Steps of one training, recorded one after the other."""

    def __init__(
        self,
        factory: StepFactory,
        device: torch.device,
        fields: BatchFields,
        gpu: Gpu | None = None,
    ) -> None:
        """Build what trains, within the contexts that `recorder` enters; `gpu`: see `Tracker`."""
        self.fields = fields
        self.tracker = Tracker(device.type, gpu, self._model_entered)
        self._steps: list[_StepLog] = []
        self._phases: list[tuple[int, Phase]] = []
        self._first_block = 0
        """Of the phase."""
        with self.tracker:
            self.built = factory(device)
        self._setup = len(self.tracker.log)

    def step(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Run one optimizer step over micro-batches of these sizes."""
        batches = tuple(synthetic_batch(one, self.fields) for one in micro_batches)
        tracker = self.tracker
        tracker.outside = {storage_key(x) for x in _tensors(batches)}
        before, start = tuple(tracker.alive.values()), len(tracker.log)
        self._phases = []
        self._start("forward")
        with tracker.watching(self.built.model):
            self.built.step(batches)
        gradients = ((n, p.grad) for n, p in self.built.model.named_parameters())
        present = ((name, gradient) for name, gradient in gradients if gradient is not None)
        for name, record in tracker.records_of(present):
            record.class_, record.module = "gradient", name
        end, phases = len(tracker.log), tuple(self._phases)
        self._steps.append(_StepLog(tuple(micro_batches), before, start, end, phases))

    def traces(self) -> tuple[tuple[Event, ...], list[Trace]]:
        """Return the events before the first step and each step's trace; ends the recording."""
        self.tracker.stop()
        self._classify_persistent()
        log = self.tracker.log
        setup = tuple(_event(kind, record, "setup") for kind, record in log[: self._setup])
        return setup, [self._trace(step) for step in self._steps]

    def backward_started(self) -> None:
        """Begin the backward phase; what the forward pass has kept are activations."""
        for record in self.tracker.alive_since(self._first_block):
            if record.class_ == "temporary":
                record.class_ = "activation"
        self._start("backward")

    def backward_ended(self) -> None:
        """Begin the optimizer's phase; if another forward pass follows, `_model_entered` knows."""
        self.tracker.forget_nodes()
        self._start("optimizer")

    def _start(self, phase: Phase) -> None:
        self.tracker.start(phase)
        self._phases.append((len(self.tracker.log), phase))
        self._first_block = len(self.tracker.records)

    def _model_entered(self) -> None:
        """Take what was allocated since the last phase began, and is alive, for the input."""
        start, phase = self._phases[-1]
        if phase == "optimizer":
            self._phases[-1] = (start, "forward")
            self.tracker.start("forward")
        for record in self.tracker.alive_since(self._first_block):
            record.class_, record.module = "input", ""

    def _classify_persistent(self) -> None:
        """Give the blocks of parameters, buffers and moments their classes and paths."""

        def classify(class_: BlockClass, tensors: Iterable[tuple[str, Tensor]]) -> None:
            for path, record in self.tracker.records_of(tensors):
                record.class_, record.module = class_, path

        for record in self.tracker.library:
            record.class_, record.module = "library", ""
        names: dict[Tensor, str] = {}
        for prefix, module in (("", self.built.model), ("ema.", self.built.average)):
            if module is not None:
                parameters = [(prefix + name, x) for name, x in module.named_parameters()]
                names |= {parameter: path for path, parameter in parameters}
                classify("parameter", parameters)
                classify("buffer", ((prefix + name, x) for name, x in module.named_buffers()))
        for trained, state in self.built.optimizer.state.items():
            tensors = ((names[trained], x) for x in state.values() if isinstance(x, Tensor))
            classify("optimizer", tensors)

    def _trace(self, step: _StepLog) -> Trace:
        events: list[Event] = []
        for (start, phase), (end, _) in pairwise([*step.phases, (step.end, "setup")]):
            part = self.tracker.log[start:end]
            events += [_event(kind, record, phase) for kind, record in part]
        return Trace(
            step.micro_batches,
            tuple(_event("alloc", record, "setup") for record in step.before),
            tuple(events),
            tuple(Mark(index - step.start, phase) for index, phase in step.phases),
        )


def _event(kind: Kind, record: BlockRecord, phase: Phase) -> Event:
    return Event(kind, record.block, record.bytes, record.class_, record.module, phase)


def _tensors(batches: GlobalBatch) -> Iterator[Tensor]:
    for batch in batches:
        every = (batch.images, batch.sizes, batch.boxes_cxcywh, batch.labels, batch.colour)
        yield from (one for one in every if one is not None)


@contextmanager
def python_backward(recording: Recorder) -> Iterator[None]:
    """Let `Tensor.backward` run our backward pass, and tell the recorder of it."""

    def run(root: Tensor, gradient: Tensor | None) -> None:
        recording.backward_started()
        run_backward(root, gradient, recording.tracker.enter_node)
        recording.backward_ended()

    with torch_private.replaced_backward(run):
        yield


@contextmanager
def recorder(factory: StepFactory, fields: BatchFields, gpu: Gpu) -> Iterator[Recorder]:
    """Build what trains on a fake GPU, ready to record steps."""
    with (
        torch_private.fake_tensors(),
        torch_private.fake_cuda(gpu.capability, has_bf16=gpu.has_bf16, attention=gpu.attention),
    ):
        recording = Recorder(factory, torch_private.CUDA, fields, gpu)
        with python_backward(recording):
            yield recording
