"""Predict a training step's memory on a GPU, without a GPU.

    shapes = prepared_shapes(params, Path("prepared"))
    prediction = predict(params, shapes, lambda other: step_factory(other, shapes.num_classes))
    prediction.model.gpu.upper(8)       # bytes that 8 images take at most

A few traced steps give every micro-batch and every shape; docs/memory.md has the method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from runkey.memory.batch_shapes import BatchShapes
from runkey.memory.memory_model import (
    Alternative,
    Confirmation,
    Estimate,
    Line,
    MemoryModel,
    line_through,
)
from runkey.memory.template import (
    AllocatorReplay,
    Template,
    make_template,
    other_shape,
    replay_steps,
)
from runkey.memory.trace.events import MicroBatch, Trace, timeline_of
from runkey.memory.trace.gpu import Gpu
from runkey.memory.trace.record import BatchFields, StepFactory, recorder
from runkey.params import Params, override
from runkey.progress import each
from runkey.units import MIB

# What a GPU's libraries add to the tensors of a step.


@dataclass(frozen=True, slots=True)
class Generation:
    """GPUs of one architecture."""

    name: str
    capability: tuple[int, int]
    """Its lowest compute capability."""
    context_bytes: tuple[int, int]
    """Least and most bytes that a process takes outside the allocator: the CUDA context, handles
    of cuBLAS and cuDNN, and kernels, which are loaded when they are first used."""
    has_bf16: bool
    source: str


WORKSPACE_SHARE = 1.0
"""Largest workspace of a convolution, as a part of its result: on an H200, some convolutions in
float32 copied their input to another memory format. A workspace exists while one operation runs,
and the peak is at the end of the forward pass, where results are small."""

MODEL_ERROR = 0.01
"""Margin on tensors and workspaces: in 70 trainings on the H200 below they took at most 0.95% of
105 MiB, else 0.39%, more than predicted."""

_NOT_MEASURED = "not measured; maskrcnn-benchmark#182 reports up to 1 GB"
_H200 = (
    "measured: 707 to 723 MiB over 70 trainings (benchmarks/results/gpu/gpu_memory.json), NVIDIA "
    "H200, driver 580.159.04, torch 2.11.0+cu130"
)

GENERATIONS = (
    Generation("Maxwell or older", (0, 0), (300 * MIB, 1024 * MIB), False, _NOT_MEASURED),
    Generation("Pascal", (6, 0), (300 * MIB, 1024 * MIB), False, _NOT_MEASURED),
    Generation("Volta, Turing", (7, 0), (300 * MIB, 1024 * MIB), False, _NOT_MEASURED),
    Generation("Ampere, Ada", (8, 0), (300 * MIB, 1024 * MIB), True, _NOT_MEASURED),
    Generation("Hopper", (9, 0), (700 * MIB, 800 * MIB), True, _H200),
    Generation("Blackwell", (10, 0), (300 * MIB, 1024 * MIB), True, _NOT_MEASURED),
)


def generation_of(capability: tuple[int, int]) -> Generation:
    """Return the generation of a compute capability, such as (9, 0)."""
    return [one for one in GENERATIONS if one.capability <= capability][-1]


# What would save memory: the same training with one parameter changed.


Name = Literal["checkpointing", "bf16", "fp32", "smaller images", "grouping", "no grouping"]

_SMALLER = 0.75
_LONGEST_LIST = 3


@dataclass(frozen=True, slots=True)
class Change:
    """A change of parameters, by dotted name."""

    name: Name
    values: dict[str, Any]

    def __str__(self) -> str:
        """Return the change as params.yaml writes it."""
        return ", ".join(f"{name}: {_yaml(value)}" for name, value in self.values.items())


def step_changes(params: Params) -> list[Change]:
    """Return the changes of the step itself, which must be traced again."""
    changes = []
    if not params.model.checkpointing:
        changes.append(Change("checkpointing", {"model.checkpointing": True}))
    if params.training.precision == "off":
        changes.append(Change("bf16", {"training.precision": "bf16"}))
    else:
        changes.append(Change("fp32", {"training.precision": "off"}))
    return changes


def batch_changes(params: Params) -> list[Change]:
    """Return the changes of the batches that the same step gets."""
    data = params.data
    sides = tuple(max(1, round(side * _SMALLER)) for side in data.short_sides)
    long_side = max(1, round(data.long_side * _SMALLER))
    grouped = data.group_by_aspect
    return [
        Change("smaller images", {"data.short_sides": sides, "data.long_side": long_side}),
        Change("no grouping" if grouped else "grouping", {"data.group_by_aspect": not grouped}),
    ]


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        long = len(value) > _LONGEST_LIST
        return f"[{value[0]}, ..., {value[-1]}]" if long else str(list(value))
    return str(value).lower()


# The prediction.


FactoryFor = Callable[[Params], StepFactory]
"""Returns the step factory for some parameters."""

# Images of the two traces that the line goes through. Not 1: kernels skip copies of a single one.
_FEW, _MANY = 2, 4
_CONFIRMED = 3
_REPLAYED = (40, 200)
"""Micro-batches that are replayed, of few images and of the whole batch size."""
_MOST_PARTIAL_SUMS = 160 * MIB
# memory.json is for the generation that most train on. Others differ in kernels and workspaces.
_GPU = Gpu((8, 0), 0)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The memory model, and the step that it was made from."""

    model: MemoryModel
    template: Template
    shapes: BatchShapes

    def peak(self, images: int) -> int:
        """Return the bytes of tensors at the peak of the largest micro-batch of that size."""
        return self.template.peak(self.shapes.worst(images))

    def trace(self, images: int) -> Trace:
        """Return the step over two of the largest micro-batches of that many images."""
        return self.template.at(self.shapes.worst(images))


@dataclass(frozen=True, slots=True)
class StepBound:
    """A training step with its upper bounds, for the parameters as they are."""

    template: Template
    estimate: Estimate
    fragmentation: Line
    """What the allocator holds beside what is alive, over the images."""
    replays: tuple[AllocatorReplay, ...]
    confirmation: Confirmation


def predict(params: Params, shapes: BatchShapes, factory_for: FactoryFor) -> Prediction:
    """Trace training steps on a fake GPU, and model their memory.

    Args:
        params: what is trained, and how.
        shapes: the batches.
        factory_for: returns what builds the step under some parameters.

    Returns:
        The same on any machine, to the byte.
    """
    bound = bound_step(params, shapes, factory_for)
    alternatives = _alternatives(params, shapes, factory_for, bound)
    fp32 = [one.estimate.line for one in alternatives if one.name == "fp32"]
    model = MemoryModel(
        batch_size=params.training.batch_size,
        precision=precision_on_gpu(params),
        shapes=shapes.statistics,
        gpu=bound.estimate,
        cpu=fp32[0] if fp32 else bound.estimate.line,
        gradient_bytes=bound.template.gradient_bytes(),
        confirmation=bound.confirmation,
        replays=bound.replays,
        loose_blocks=bound.template.loose_blocks,
        alternatives=alternatives,
    )
    return Prediction(model, bound.template, shapes)


def bound_step(params: Params, shapes: BatchShapes, factory_for: FactoryFor) -> StepBound:
    """Trace the step, confirm the template, replay sampled steps; arguments as for `predict`."""
    batch_size, stride = params.training.batch_size, token_stride(params)
    few, many = shapes.worst(_FEW), shapes.worst(_MANY)
    shape = other_shape((many.height, many.width), stride)
    other = MicroBatch(_CONFIRMED, *shape, many.objects)
    unseen = MicroBatch(_CONFIRMED + 2, shape[0] - 5, shape[1] - 3, many.objects)
    *traces, check = _trace(params, shapes, factory_for, (few, many, other, unseen))
    template = make_template(traces, stride)
    replays = tuple(
        replay_steps(template, shapes.steps(images, count), WORKSPACE_SHARE)
        for images, count in zip((_FEW, max(batch_size, _MANY)), _REPLAYED, strict=True)
    )
    fragmentation = line_through(*((one.images, one.fragmentation_bytes) for one in replays))
    peaks = timeline_of(check).peak_bytes, template.peak(unseen)
    confirmation = Confirmation(unseen.images, unseen.height, unseen.width, *peaks)
    estimate = _estimate(params, template, shapes, fragmentation)
    return StepBound(template, estimate, fragmentation, replays, confirmation)


def _alternatives(
    params: Params, shapes: BatchShapes, factory_for: FactoryFor, bound: StepBound
) -> tuple[Alternative, ...]:
    """Predict the same training with one parameter changed, for the same micro-batches."""
    found = []
    steps = step_changes(params)
    for change in each("predict memory", [*steps, *batch_changes(params)], "settings"):
        changed = override(params, change.values)
        template, batches = bound.template, shapes
        if change in steps:
            # Two traces: the step is only needed at the largest shape.
            sizes = (shapes.worst(_FEW), shapes.worst(_MANY))
            traces = _trace(changed, shapes, factory_for, sizes)
            template = make_template(traces, token_stride(changed))
        else:
            batches = shapes.under(changed)
        estimate = _estimate(changed, template, batches, bound.fragmentation)
        found.append(Alternative(change.name, str(change), estimate))
    return tuple(found)


def token_stride(params: Params) -> int:
    """Return the pixels from token to token."""
    if params.model.backbone == "compact":
        return 8
    return 16 if params.model.dilation else 32


def precision_on_gpu(params: Params) -> str:
    """Return what a GPU with bf16 computes in."""
    names = {"auto": "bf16", "off": "fp32"}
    return names.get(params.training.precision, params.training.precision)


def batch_fields(params: Params, num_classes: int) -> BatchFields:
    """Return the fields of training batches.

    An image has colour factors for brightness, contrast and, where it varies, saturation.
    """
    augment = params.data.augment
    if augment.saturation:
        return BatchFields(num_classes, 3)
    return BatchFields(num_classes, 2 if augment.brightness or augment.contrast else None)


def _trace(
    params: Params, shapes: BatchShapes, factory_for: FactoryFor, sizes: Sequence[MicroBatch]
) -> list[Trace]:
    """Trace a step over two equal micro-batches, for each of `sizes`."""
    fields = batch_fields(params, shapes.num_classes)
    with recorder(factory_for(params), fields, _GPU) as recording:
        # The first step is unlike all others: it allocates the optimizer's state.
        steps = [recording.step(step) for step in (sizes[:1], *((one, one) for one in sizes))]
        _, traces = recording.traces(steps)
    return traces[1:]


def _estimate(
    params: Params, template: Template, shapes: BatchShapes, fragmentation: Line
) -> Estimate:
    """Estimate micro-batches up to `training.batch_size`."""
    batch_size = params.training.batch_size
    every = [shapes.worst(images) for images in range(1, batch_size + 1)]
    last = max(batch_size, _MANY)
    ends = [(images, template.peak(shapes.worst(images))) for images in (_FEW, last)]
    return Estimate(
        line_through(*ends),
        tuple(template.peak(one) for one in every),
        tuple(
            fragmentation.at(one.images)
            + round(template.peak(one, WORKSPACE_SHARE) * (1 + MODEL_ERROR))
            + partial_sums_bytes(params, one)
            for one in every
        ),
    )


def partial_sums_bytes(params: Params, one: MicroBatch) -> int:
    """Return the most bytes that a kernel takes to sum the gradient of the widest bias.

    See `runkey.memory.trace.gpu.reduction`: two float32 numbers for each that is summed over all
    tokens, and no more than all blocks of the largest GPU have at once.
    """
    stride, model = token_stride(params), params.model
    tokens = one.images * -(-one.height // stride) * -(-one.width // stride)
    widest = max(model.feedforward_dim, 2 * model.decoder_layers * model.hidden_dim)
    return min(9 * tokens * widest, _MOST_PARTIAL_SUMS)
