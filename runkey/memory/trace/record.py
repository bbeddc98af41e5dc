"""Record training steps on fake tensors, allocation by allocation.

    with recorder(factory, BatchFields(num_classes, colour), gpu) as recording:
        for micro_batches in global_batches:
            trace = recording.step(micro_batches)

The floors above, which know training, pass a `StepFactory`. The step itself is not changed: modules
are watched by hooks, operations by a dispatch mode.
"""

from __future__ import annotations

import gc
import os
import re
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from runkey.data.dataset import Batch, GlobalBatch
from runkey.memory.trace import torch_private
from runkey.memory.trace.events import BlockClass, Event, Kind, Mark, MicroBatch, Phase, Trace
from runkey.memory.trace.gpu import Gpu
from runkey.memory.trace.torch_private import TorchDispatchMode, next_sequence_number, storage_key
from runkey.model.backbones import layers
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
"""Builds everything that trains on a device."""


@contextmanager
def fixed_matches() -> Iterator[None]:
    """Let the matcher read no value, as fake tensors have none; it takes every cost for 0.

    Any assignment costs the same memory: its sizes follow from the numbers of boxes.
    """
    with patch.object(Matcher, "read", lambda _, cost: np.zeros(cost.shape)):
        yield


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


@dataclass(slots=True)
class BlockRecord:
    """What is known of a block."""

    block: int
    bytes: int
    class_: BlockClass
    module: str
    node: int | None
    """Number of the backward node that ran a checkpointed forward pass again to make the block."""


_PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}


def _cublas_bytes() -> int:
    """Return what cuBLAS keeps for each thread that uses it (`runkey.training`: 8 times 4 MiB)."""
    pairs = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    return sum(int(size) * KIB * int(count) for size, count in pairs)


class Recorder(TorchDispatchMode):
    """Steps of one training, recorded one after the other.

    While it is entered, it logs every storage that operations allocate on the device; when the
    storage is freed, it logs that at any time. It knows the module whose forward or backward pass
    allocates: autograd numbers its nodes in the order of creation, and the numbers at which a
    module was entered and left tell which module made a node.
    """

    def __init__(
        self,
        factory: StepFactory,
        device: torch.device,
        fields: BatchFields,
        gpu: Gpu | None = None,
    ) -> None:
        """Build what trains on a device, within the contexts that `recorder` enters.

        `gpu` knows what kernels allocate for themselves, which no operation returns; None: this and
        what cuBLAS keeps are not logged.
        """
        super().__init__()
        self.fields = fields
        self._device_type, self._gpu = device.type, gpu
        self._log: list[tuple[Kind, BlockRecord]] = []
        """Of the step."""
        self._marks: list[Mark] = [Mark(0, "setup")]
        """Where in the log the phases of the step begin."""
        self._blocks = self._first_block = 0
        """Number of the next block, and of the first one of the phase."""
        self._alive: dict[int, BlockRecord] = {}
        """By number of block, in the order of allocation."""
        self._records: dict[int, BlockRecord] = {}
        """By key of the storage."""
        self._outside: set[int] = set()
        """Keys of storages on the device that are not the step's own: a batch on a CPU."""
        self._cublas_threads: set[bool] = set()
        self._node = 0
        """Backward nodes that have run."""
        self._recomputing = False
        """Whether a checkpointed forward pass is running again, within the backward pass."""
        self._names: dict[int, str] = {}
        """Path of each module of the model, by id."""
        self._path, self._stack = "", list[str]()
        self._numbers, self._paths = [0], [""]
        with self:
            self.built = factory(device)
        self._classify()
        self.setup = tuple(_event(*entry) for entry in self._log)
        """The events before the first step."""

    def step(self, micro_batches: Sequence[MicroBatch]) -> Trace:
        """Run one optimizer step over micro-batches of these sizes."""
        batches = tuple(synthetic_batch(one, self.fields) for one in micro_batches)
        self._outside = {storage_key(x) for x in _tensors(batches)}
        gc.collect(1)  # what the step before left
        before = tuple(self._alive.values())
        self._log, self._marks = [], []
        self._start("forward")
        with self.watching():
            self.built.step(batches)
        self._classify()
        return Trace(
            tuple(micro_batches),
            tuple(_event("alloc", record) for record in before),
            tuple(_event(*entry) for entry in self._log),
            tuple(self._marks),
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Log what operations allocate, by module of the model; matches are fixed.

        Residual blocks and their convolutions are run by functions of `backbones.layers`, not
        called as modules, so these functions are wrapped too.
        """
        self._names = {id(module): path for path, module in self.built.model.named_modules()}

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(module: nn.Module, *rest: Any) -> Any:
                self._enter(module)
                try:
                    return function(module, *rest)
                finally:
                    self._leave()

            return call

        with (
            nn.modules.module.register_module_forward_pre_hook(
                lambda module, _: self._enter(module)
            ),
            nn.modules.module.register_module_forward_hook(
                lambda *_: self._leave(), always_call=True
            ),
            patch.object(layers, "residual_block", watched(layers.residual_block)),
            patch.object(layers, "conv_norm", watched(layers.conv_norm)),
            fixed_matches(),
            self,
        ):
            yield

    # Phases and modules.

    def backward(self, root: Tensor, gradient: Tensor | None = None) -> None:
        """Stand for `Tensor.backward`: run our backward pass."""
        self.backward_started()
        torch_private.run_backward(root, gradient, self._enter_node)
        self.backward_ended()

    def backward_started(self) -> None:
        """Begin the backward phase; what the forward pass has kept are activations."""
        for record in self._new_blocks():
            record.class_ = "activation"
        self._start("backward")

    def _enter_node(self, sequence_number: int) -> None:
        """Enter a backward node; its sequence number tells the module."""
        self._node += 1
        self._recomputing = False
        self._stack.clear()
        self._path = self._paths[bisect_right(self._numbers, sequence_number) - 1]

    def backward_ended(self) -> None:
        """Begin the optimizer's phase; if another forward pass follows, `_model_entered` knows."""
        self._numbers, self._paths = [next_sequence_number()], [self._path]
        self._start("optimizer")

    @property
    def _phase(self) -> Phase:
        return self._marks[-1].phase

    def _start(self, phase: Phase) -> None:
        self._marks.append(Mark(len(self._log), phase))
        self._first_block = self._blocks
        self._leave_all()

    def _leave_all(self) -> None:
        self._recomputing = False
        self._stack.clear()
        self._move("")

    def _model_entered(self) -> None:
        """Take what was allocated since the last phase began, and is alive, for the input."""
        if self._phase == "optimizer":
            self._marks[-1] = self._marks[-1]._replace(phase="forward")
            self._leave_all()
        for record in self._new_blocks():
            record.class_, record.module = "input", ""

    def _new_blocks(self) -> Iterator[BlockRecord]:
        """Yield the blocks of the phase that are alive and whose class is not known yet."""
        for number in reversed(self._alive):
            if number < self._first_block:
                return
            if self._alive[number].class_ == "temporary":
                yield self._alive[number]

    def _enter(self, module: nn.Module) -> None:
        path = self._names.get(id(module), self._path)
        self._stack.append(self._path)
        if not path and self._phase != "backward":
            self._model_entered()
        self._recomputing = self._phase == "backward"
        self._move(path)

    def _leave(self) -> None:
        if self._stack:
            self._move(self._stack.pop())

    def _move(self, path: str) -> None:
        self._path = path
        if self._phase == "forward":
            number = next_sequence_number()
            if number == self._numbers[-1]:
                self._paths[-1] = path
            else:
                self._numbers.append(number)
                self._paths.append(path)

    # Allocations and frees.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and log the storages of its results."""
        out = func(*args, **(kwargs or {}))
        self._look(out)
        if self._gpu is not None:
            self._log_workspaces(self._gpu, func, args)
        return out

    def _look(self, out: Any) -> None:
        if isinstance(out, (tuple, list)):
            for one in out:
                self._look(one)
        if not isinstance(out, Tensor) or out.device.type != self._device_type:
            return
        key, storage = storage_key(out), out.untyped_storage()
        size = storage.nbytes()
        if key in self._outside:
            return
        record = self._records.get(key)
        if record is not None:
            if record.bytes == size:
                return
            self._free(key, record)  # It was resized.
        if size:
            record = self._records[key] = self._allocate(size)
            weakref.finalize(storage, self._free, key, record).atexit = False

    def _allocate(self, size: int) -> BlockRecord:
        block, again = self._blocks, self._recomputing
        class_: BlockClass = "activation" if again else "temporary"
        record = BlockRecord(block, size, class_, self._path, self._node if again else None)
        self._blocks += 1
        self._alive[block] = record
        self._log.append(("alloc", record))
        return record

    def _log_workspaces(self, gpu: Gpu, func: Any, args: Any) -> None:
        """Log what the kernel allocated while it ran, and what cuBLAS keeps from now on.

        cuBLAS takes it at a thread's first matrix product; torch's engine runs the backward pass
        in a thread of its own.
        """
        thread = self._phase == "backward"
        if thread not in self._cublas_threads and func in _PRODUCTS:
            size = _cublas_bytes() if args[0].device.type == "cuda" else 0
            if size:
                self._cublas_threads.add(thread)
                record = self._allocate(size)
                record.class_, record.module = "library", ""
        for record in [self._allocate(size) for size in gpu.workspaces(func, args)]:
            self._end(record)

    def _free(self, key: int, record: BlockRecord) -> None:
        if record.block in self._alive:
            if self._records.get(key) is record:
                del self._records[key]
            self._end(record)

    def _end(self, record: BlockRecord) -> None:
        del self._alive[record.block]
        if record.class_ == "activation" and record.node == self._node:
            record.class_ = "temporary"  # the backward node that made it has not kept it
        self._log.append(("free", record))

    def _classify(self) -> None:
        """Give the blocks of gradients, parameters, buffers and moments their classes and paths."""

        def classify(class_: BlockClass, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
            for path, tensor in tensors:
                record = None if tensor is None else self._records.get(storage_key(tensor))
                if record is not None:
                    record.class_, record.module = class_, path

        model, average = self.built.model, self.built.average
        classify("gradient", ((name, x.grad) for name, x in model.named_parameters()))
        names: dict[Tensor, str] = {}
        for prefix, module in (("", model), ("ema.", average)):
            if module is not None:
                parameters = [(prefix + name, x) for name, x in module.named_parameters()]
                names |= {parameter: path for path, parameter in parameters}
                classify("parameter", parameters)
                classify("buffer", ((prefix + name, x) for name, x in module.named_buffers()))
        for trained, state in self.built.optimizer.state.items():
            tensors = ((names[trained], x) for x in state.values() if isinstance(x, Tensor))
            classify("optimizer", tensors)


def _event(kind: Kind, record: BlockRecord) -> Event:
    return Event(kind, record.block, record.bytes, record.class_, record.module)


def _tensors(batches: GlobalBatch) -> Iterator[Tensor]:
    for batch in batches:
        every = (batch.images, batch.sizes, batch.boxes_cxcywh, batch.labels, batch.colour)
        yield from (one for one in every if one is not None)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Hold off the garbage collector: when it runs differs, and so would the blocks it frees."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def recorder(factory: StepFactory, fields: BatchFields, gpu: Gpu) -> Iterator[Recorder]:
    """Build what trains on a fake GPU, ready to record steps."""
    with (
        _no_collection(),
        torch_private.fake_tensors(),
        torch_private.fake_cuda(gpu.capability, has_bf16=gpu.has_bf16, attention=gpu.attention),
    ):
        recording = Recorder(factory, torch_private.CUDA, fields, gpu)
        with torch_private.replaced_backward(recording.backward):
            yield recording
