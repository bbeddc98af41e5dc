"""From a step that is built to its trace.

    session = trace_session(factory, Content(num_classes, colour), passes, gpu)

`factory(device)` comes from the floors above, which know training; see `BuiltStep`.

The step itself is not touched: modules are watched by hooks, operations by a dispatch mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from runkey.data.dataset import Batch, GlobalBatch
from runkey.memory.trace.backward import Gpu
from runkey.memory.trace.fake import CUDA, fake_cuda, fake_tensors, own_backward
from runkey.memory.trace.tracker import (
    Event,
    Pass,
    Phase,
    Scope,
    Session,
    Step,
    Trace,
    Tracker,
    classify,
    watching,
)
from runkey.memory.trace.workspaces import Workspaces
from runkey.model.criterion import Criterion
from runkey.model.matcher import Layers, Matcher, Matches, Targets

# Matches without values: what a fake step does where a real one looks at its predictions.


class FixedMatcher(Matcher):
    """Allocates what the matcher allocates; an image's i-th box gets its i-th prediction.

    Any assignment costs the same memory: its sizes follow from the numbers of boxes alone.
    """

    @torch.no_grad()
    def __call__(self, layers: Layers, targets: Targets) -> Matches:
        """See `Matcher`; nothing is fetched from the device."""
        device = layers.logits.device
        images = _image_index(targets.counts).to(device, non_blocking=True)
        self._costs(layers, targets, images)
        pairs = _pairs(layers, targets.counts).to(device, non_blocking=True)
        return Matches(pairs[0], pairs[1])


def with_fixed_matches(criterion: Criterion) -> Criterion:
    """The same criterion with a `FixedMatcher`."""
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
    """int64 [2, R]: as `runkey.model.matcher` lays them out."""
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


# Batches of a given size whose content does not matter.


def synthetic_batch(one: Pass, num_classes: int, colour: int | None) -> Batch:
    """A batch on the CPU, of real or of fake tensors.

    The last image is smaller, as in a real batch that pads.

    Args:
        one: sizes.
        num_classes: K.
        colour: factors of an image (2, or 3 with saturation); None: colours are not changed.
    """
    boxes = one.batch * one.objects
    sizes = torch.tensor([[one.height, one.width]] * one.batch)
    if one.batch > 1:
        sizes[-1, 0] = max(1, one.height * 3 // 4)
    images = torch.zeros(one.batch, one.height, one.width, 3, dtype=torch.uint8)
    return Batch(
        images=images.permute(0, 3, 1, 2),
        sizes=sizes,
        boxes_cxcywh=torch.linspace(0.2, 0.6, boxes * 4).view(boxes, 4),
        labels=torch.arange(boxes) % num_classes,
        counts=(one.objects,) * one.batch,
        image_ids=tuple(range(one.batch)),
        original_sizes=sizes,
        colour=None if colour is None else torch.ones(one.batch, colour),
    )


@dataclass(frozen=True, slots=True)
class BuiltStep:
    """A training step, and what it trains, from the floors that know training."""

    step: Callable[[GlobalBatch], object]
    """A whole optimizer step over a window, the moving average's update included."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: nn.Module | None
    """The moving average's module."""


# Builds everything that trains, on a device.  Its criterion has `with_fixed_matches`.
StepFactory = Callable[[torch.device], BuiltStep]


@dataclass(frozen=True, slots=True)
class Content:
    """What batches hold beside their sizes."""

    num_classes: int
    colour: int | None
    """See `synthetic_batch`."""


class Recorder:
    """Steps of one training, traced one after the other."""

    def __init__(
        self,
        factory: StepFactory,
        device: torch.device,
        content: Content,
        workspaces: Workspaces | None = None,
    ) -> None:
        """Build what is built; within the contexts that `recorder` enters.

        Args:
            factory: builds it.
            device: what is looked at.
            content: of the batches.
            workspaces: what libraries and kernels take for themselves; None: not looked at.
        """
        self.content = content
        self.scope = Scope()
        self.scope.on_model = self._model_entered
        self.tracker = Tracker(device.type, self.scope, workspaces)
        self._inputs: set[int] = set()
        self._starts: list[tuple[int, Phase]] = []
        with self.tracker:
            self.built = factory(device)
        self.scope.name(self.built.model)
        self._setup = len(self.tracker.log)

    def step(self, passes: Sequence[Pass]) -> Step:
        """Run one optimizer step over a window of these micro-batches."""
        window = tuple(
            synthetic_batch(one, self.content.num_classes, self.content.colour) for one in passes
        )
        self.tracker.outside = {x.untyped_storage()._cdata for x in _tensors(window)}
        before = tuple(self.tracker.alive)
        start = len(self.tracker.log)
        self._starts, self._inputs = [], set()
        self._start("forward")
        with watching(self.scope), self.tracker:
            self.built.step(window)
        return Step(
            passes=tuple(passes),
            start=start,
            end=len(self.tracker.log),
            before=before,
            starts=tuple(self._starts),
            inputs=frozenset(self._inputs),
            gradients=dict(self.tracker.blocks_of(self._gradients())),
        )

    def restart(self) -> None:
        """Forget the optimizer's state, gradients and libraries: the next step is a first one."""
        self.built.optimizer.state.clear()
        self.built.optimizer.zero_grad()
        self.tracker.forget_libraries()

    def classified(self, steps: Sequence[Step]) -> tuple[tuple[Event, ...], list[Trace]]:
        """The setup's events and the steps' traces; nothing can be traced after this."""
        self.tracker.stop()
        return classify(self.tracker, self._setup, steps, self._persistent())

    def backward_started(self) -> None:
        """The engine calls this."""
        self._start("backward")

    def backward_ended(self) -> None:
        """The engine calls this; if another forward pass follows, `_model_entered` says so."""
        self.scope.forget_nodes()
        self._start("optimizer")

    def _start(self, phase: Phase) -> None:
        self.scope.start(phase)
        self._starts.append((len(self.tracker.log), phase))

    def _model_entered(self) -> None:
        """What has been allocated since the last phase began, and is alive, is the input."""
        start, phase = self._starts[-1]
        if phase == "optimizer":
            self._starts[-1] = (start, "forward")
            self.scope.start("forward")
        new = {block for kind, block, _ in self.tracker.log[start:] if kind == "alloc"}
        self._inputs |= new & self.tracker.alive.keys()

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.built.model.named_parameters():
            if parameter.grad is not None:
                yield name, parameter.grad

    def _persistent(self) -> dict[int, tuple[str, str]]:
        """(class, path) of the blocks of parameters, buffers and moments."""
        found: dict[int, tuple[str, str]] = dict.fromkeys(self.tracker.library, ("library", ""))
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


def _tensors(window: GlobalBatch) -> Iterator[Tensor]:
    for batch in window:
        every = (batch.images, batch.sizes, batch.boxes_cxcywh, batch.labels, batch.colour)
        yield from (one for one in every if one is not None)


@contextmanager
def recorder(
    factory: StepFactory, content: Content, gpu: Gpu | None, *, kernels: bool = False
) -> Iterator[Recorder]:
    """Build what trains, and trace its steps.

    Args:
        factory: builds it.
        content: of the batches.
        gpu: fake tensors on this GPU; None: fake tensors on a CPU.
        kernels: add what kernels take while they run, too (not only what libraries keep).  Whether
            a kernel takes anything depends on shapes, so such traces differ in more than bytes.
    """
    device = torch.device("cpu") if gpu is None else CUDA
    with ExitStack() as stack:
        stack.enter_context(fake_tensors())
        if gpu is not None:
            stack.enter_context(fake_cuda(gpu))
        workspaces = None if gpu is None else Workspaces(gpu, kernels=kernels)
        one = Recorder(factory, device, content, workspaces)
        stack.enter_context(
            own_backward(one.scope.enter_node, one.backward_started, one.backward_ended)
        )
        yield one


def trace_session(
    factory: StepFactory, content: Content, passes: Sequence[Pass], gpu: Gpu | None
) -> Session:
    """The first step and a later one over the same window.

    Args:
        factory: builds what trains.
        content: of the batches.
        passes: the window.
        gpu: see `recorder`.
    """
    with recorder(factory, content, gpu) as one:
        steps = [one.step(passes) for _ in range(2)]
        setup, (first, steady) = one.classified(steps)
    return Session(setup, first, steady)
