"""Record training steps on fake tensors, allocation by allocation.

    with recorder(factory, BatchFields(num_classes, colour), gpu) as recording:
        steps = [recording.step(micro_batches) for micro_batches in global_batches]
        setup, traces = recording.traces(steps)

The floors above, which know training, pass a `StepFactory`. The step itself is not changed: modules
are watched by hooks, operations by a dispatch mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from runkey.data.dataset import Batch, GlobalBatch
from runkey.memory.trace import torch_private
from runkey.memory.trace.backward import run_backward
from runkey.memory.trace.events import Event, MicroBatch, Phase, Trace
from runkey.memory.trace.gpu import Gpu, Workspaces, attention_on
from runkey.memory.trace.tracker import Meaning, Scope, StepLog, Tracker, classify, watching
from runkey.model.criterion import Criterion
from runkey.model.matcher import Layers, Matcher, Matches, Targets


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


# Matches without values: fake predictions cannot be compared.


class FixedMatcher(Matcher):
    """A matcher that allocates like its parent; an image's i-th box gets its i-th prediction.

    Any assignment costs the same memory: its sizes follow from the numbers of boxes.
    """

    @torch.no_grad()
    def __call__(self, layers: Layers, targets: Targets) -> Matches:
        """Match as `Matcher` does, without a transfer from the device."""
        device = layers.logits.device
        images = _image_index(targets.counts).to(device, non_blocking=True)
        self._costs(layers, targets, images)
        pairs = _pairs(layers, targets.counts).to(device, non_blocking=True)
        return Matches(pairs[0], pairs[1])


def with_fixed_matches(criterion: Criterion) -> Criterion:
    """Return the same criterion with a `FixedMatcher`."""
    matcher = criterion.matcher
    return replace(
        criterion,
        matcher=FixedMatcher(matcher.class_cost, matcher.classification, matcher.l1, matcher.giou),
    )


def _image_index(counts: tuple[int, ...]) -> Tensor:
    """int64 [N]: `Targets.image_index`, whose operations fake tensors cannot run."""
    index = [image for image, count in enumerate(counts) for _ in range(count)]
    return torch.tensor(index, dtype=torch.int64)


def _pairs(layers: Layers, counts: tuple[int, ...]) -> Tensor:
    """int64 [2, R]: predictions and targets, laid out as in `runkey.model.matcher`."""
    num_layers, batch, queries = layers.logits.shape[:3]
    predictions: list[int] = []
    targets: list[int] = []
    for layer in range(num_layers):
        first = 0
        for image, count in enumerate(counts):
            chosen = min(count, queries)
            start = (layer * batch + image) * queries
            predictions += range(start, start + chosen)
            targets += range(first, first + chosen)
            first += count
    return torch.tensor([predictions, targets], dtype=torch.int64)


# Batches of given sizes.


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


class Recorder:
    """Steps of one training, recorded one after the other."""

    def __init__(
        self,
        factory: StepFactory,
        device: torch.device,
        fields: BatchFields,
        workspaces: Workspaces | None = None,
    ) -> None:
        """Build what trains, within the contexts that `recorder` enters.

        Args:
            factory: builds it.
            device: the device to watch.
            fields: of the batches.
            workspaces: what libraries and kernels allocate for themselves; None: not recorded.
        """
        self.fields = fields
        self.scope = Scope()
        self.scope.on_model = self._model_entered
        self.tracker = Tracker(device.type, self.scope, workspaces)
        self._inputs: set[int] = set()
        self._phases: list[tuple[int, Phase]] = []
        with self.tracker:
            self.built = factory(device)
        self.scope.name(self.built.model)
        self._setup = len(self.tracker.log)

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepLog:
        """Run one optimizer step over micro-batches of these sizes."""
        batches = tuple(synthetic_batch(one, self.fields) for one in micro_batches)
        self.tracker.outside = {torch_private.storage_key(x) for x in _tensors(batches)}
        before = tuple(self.tracker.alive)
        start = len(self.tracker.log)
        self._phases, self._inputs = [], set()
        self._start("forward")
        with watching(self.scope), self.tracker:
            self.built.step(batches)
        gradients = (
            (name, parameter.grad)
            for name, parameter in self.built.model.named_parameters()
            if parameter.grad is not None
        )
        return StepLog(
            micro_batches=tuple(micro_batches),
            start=start,
            end=len(self.tracker.log),
            before=before,
            phases=tuple(self._phases),
            inputs=frozenset(self._inputs),
            gradients=dict(self.tracker.blocks_of(gradients)),
        )

    def restart(self) -> None:
        """Drop the optimizer's state, gradients and library workspaces, as before a first step."""
        self.built.optimizer.state.clear()
        self.built.optimizer.zero_grad()
        self.tracker.forget_libraries()

    def traces(self, steps: Sequence[StepLog]) -> tuple[tuple[Event, ...], list[Trace]]:
        """Return the events before the first step and each step's trace; ends the recording."""
        self.tracker.stop()
        return classify(self.tracker, self._setup, steps, self._persistent())

    def backward_started(self) -> None:
        """Begin the backward phase."""
        self._start("backward")

    def backward_ended(self) -> None:
        """Begin the optimizer's phase; if another forward pass follows, `_model_entered` knows."""
        self.scope.forget_nodes()
        self._start("optimizer")

    def _start(self, phase: Phase) -> None:
        self.scope.start(phase)
        self._phases.append((len(self.tracker.log), phase))

    def _model_entered(self) -> None:
        """Take what was allocated since the last phase began, and is alive, for the input."""
        start, phase = self._phases[-1]
        if phase == "optimizer":
            self._phases[-1] = (start, "forward")
            self.scope.start("forward")
        new = {block for kind, block in self.tracker.log[start:] if kind == "alloc"}
        self._inputs |= new & self.tracker.alive.keys()

    def _persistent(self) -> dict[int, Meaning]:
        """Class and path of the blocks of parameters, buffers and moments."""
        found: dict[int, Meaning] = dict.fromkeys(self.tracker.library, ("library", ""))
        modules = [("", self.built.model)]
        if self.built.average is not None:
            modules.append(("ema.", self.built.average))
        names: dict[Tensor, str] = {}
        for prefix, module in modules:
            for name, parameter in module.named_parameters():
                names[parameter] = prefix + name
                for _, block in self.tracker.blocks_of([("", parameter)]):
                    found[block] = ("parameter", prefix + name)
            for name, block in self.tracker.blocks_of(module.named_buffers()):
                found[block] = ("buffer", prefix + name)
        for trained, state in self.built.optimizer.state.items():
            tensors = [(names[trained], x) for x in state.values() if isinstance(x, Tensor)]
            for name, block in self.tracker.blocks_of(tensors):
                found[block] = ("optimizer", name)
        return found


def _tensors(batches: GlobalBatch) -> Iterator[Tensor]:
    for batch in batches:
        every = (batch.images, batch.sizes, batch.boxes_cxcywh, batch.labels, batch.colour)
        yield from (one for one in every if one is not None)


@contextmanager
def python_backward(recording: Recorder) -> Iterator[None]:
    """Let `Tensor.backward` run our backward pass, and tell the recorder of it."""

    def run(root: Tensor, gradient: Tensor | None) -> None:
        recording.backward_started()
        run_backward(root, gradient, recording.scope.enter_node)
        recording.backward_ended()

    with torch_private.replaced_backward(run):
        yield


@contextmanager
def recorder(
    factory: StepFactory, fields: BatchFields, gpu: Gpu, workspaces: Workspaces | None = None
) -> Iterator[Recorder]:
    """Build what trains on a fake GPU, ready to record steps.

    Args:
        factory: builds it.
        fields: of the batches.
        gpu: the GPU to imitate.
        workspaces: what libraries and kernels allocate for themselves; None: what cuBLAS keeps.
    """
    with (
        torch_private.fake_tensors(),
        torch_private.fake_cuda(gpu.capability, has_bf16=gpu.has_bf16, attention=attention_on(gpu)),
    ):
        recording = Recorder(factory, torch_private.CUDA, fields, workspaces or Workspaces(gpu))
        with python_backward(recording):
            yield recording
