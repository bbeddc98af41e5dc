"""What `profile_memory` needs to know before it predicts: the batches of prepared data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from runkey.data.index import Record, read_classes, read_index
from runkey.data.shapes import Shape
from runkey.memory.batch_shapes import Census, census_of_shape, sample_windows, take_census
from runkey.memory.memory_model import (
    MIB,
    Alternative,
    Confirmation,
    Estimate,
    Line,
    MemoryModel,
    Replay,
    Template,
    line_through,
    make_template,
    other_shape,
    replay,
)
from runkey.memory.timeline import timeline_of
from runkey.memory.trace.backward import Gpu
from runkey.memory.trace.record import Content, StepFactory, recorder
from runkey.memory.trace.tracker import Pass, Trace
from runkey.params import Params, override
from runkey.progress import progress

# What a GPU's libraries add to the tensors of a step: bands, by generation.


@dataclass(frozen=True, slots=True)
class Generation:
    """GPUs of one architecture."""

    name: str
    capability: tuple[int, int]
    """The least compute capability of it."""
    context_bytes: tuple[int, int]
    """Least and most that a process takes beside the allocator: the CUDA context, the handles of
    cuBLAS and cuDNN, and their kernels, which are loaded when they are first used."""
    has_bf16: bool
    source: str


WORKSPACE_SHARE = 1.0
"""Most that a convolution takes as workspace, as a part of its result: on an H200, some in float32
were seen to copy their input to another memory format.  A workspace is there while one operation
runs, and the peak is at the end of the forward pass, where results are small."""

MODEL_ERROR = 0.01
"""Most that tensors and workspaces were measured to take beyond the prediction, as a part of it:
0.95% of 105 MiB, else 0.39%, in 70 trainings on the H200 below."""

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
    """The generation of a compute capability, such as (9, 0)."""
    return [one for one in GENERATIONS if one.capability <= capability][-1]


# What would save memory: the same training with one parameter changed.


Name = Literal["checkpointing", "bf16", "fp32", "smaller images", "grouping", "no grouping"]

_SMALLER = 0.75
_SHORT = 3
"""Lists of more entries are shortened."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of parameters."""

    name: Name
    changes: tuple[tuple[str, Any], ...]
    """Dotted names and values."""

    @property
    def values(self) -> dict[str, Any]:
        """By dotted name."""
        return dict(self.changes)

    def __str__(self) -> str:
        """As params.yaml writes it."""
        return ", ".join(f"{name}: {_yaml(value)}" for name, value in self.changes)


def other_steps(params: Params) -> list[Change]:
    """Changes of the step itself, which must be traced anew."""
    changes = []
    if not params.model.checkpointing:
        changes.append(Change("checkpointing", (("model.checkpointing", True),)))
    if params.training.precision == "off":
        changes.append(Change("bf16", (("training.precision", "bf16"),)))
    else:
        changes.append(Change("fp32", (("training.precision", "off"),)))
    return changes


def other_batches(params: Params) -> list[Change]:
    """Changes of the batches that the same step gets."""
    data = params.data
    sides = tuple(max(1, round(side * _SMALLER)) for side in data.short_sides)
    long_side = max(1, round(data.long_side * _SMALLER))
    smaller = (("data.short_sides", sides), ("data.long_side", long_side))
    grouped = data.group_by_aspect
    return [
        Change("smaller images", smaller),
        Change("no grouping" if grouped else "grouping", (("data.group_by_aspect", not grouped),)),
    ]


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{value[0]}, ..., {value[-1]}]" if len(value) > _SHORT else str(list(value))
    return str(value).lower()


# The prediction: a few traced steps, from which every micro-batch and every shape follows.


FactoryFor = Callable[[Params], StepFactory]
"""Builds what trains under some parameters."""
SampleWindows = Callable[[int, int], list[tuple[Pass, ...]]]
"""Optimizer steps of the census, by images of a micro-batch and how many micro-batches."""

# Images of the two traces that the line goes through.  Not 1: kernels skip copies of a single one.
_FEW, _MANY = 2, 4
_PARTIAL_SUMS = 160 * MIB
_CONFIRMED = 3
_BATCHES = (40, 200)
"""Forward passes that are replayed, of few images and of the whole batch size."""
# What memory.json is for: the generation that most train on.  Others differ in kernels and bands.
_GPU = Gpu((8, 0), 0)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a step is traced in, beside its parameters."""

    census: Census
    census_of: Callable[[Params], Census]
    """The census under other parameters."""
    sample: SampleWindows
    num_classes: int

    def worst(self, images: int) -> Pass:
        """The worst micro-batch of that many images."""
        return Pass(images, *self.census.worst_of(images), self.census.objects[0])

    def windows(self, images: int, batches: int) -> list[tuple[Pass, ...]]:
        """Sampled steps of micro-batches of up to that many images; the worst in their middle.

        Args:
            images: of a micro-batch.
            batches: how many there are at least.
        """
        windows = self.sample(images, batches)
        middle = len(windows) // 2
        return [*windows[:middle], (self.worst(images),) * 2, *windows[middle:]]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The model of memory, and the step that it is of."""

    model: MemoryModel
    template: Template
    around: Surroundings

    def trace(self, images: int) -> Trace:
        """The step with two of the worst micro-batches of that many images."""
        return self.template.at(self.around.worst(images))


@dataclass(frozen=True, slots=True)
class Bounded:
    """A training step with what its micro-batches take at most, for the parameters as they are."""

    template: Template
    estimate: Estimate
    held: Line
    """What the allocator holds beside what is alive, over the images."""
    replays: tuple[Replay, ...]
    confirmation: Confirmation


def predict(params: Params, around: Surroundings, factory_for: FactoryFor) -> Prediction:
    """Trace training steps on a GPU that is not there, and model their memory.

    Args:
        params: what is trained, and how.
        around: the batches.
        factory_for: builds it.

    Returns:
        The same on any machine, to the byte.
    """
    bounded = bound_step(params, around, factory_for)
    alternatives = _alternatives(params, around, factory_for, bounded)
    fp32 = [one.estimate.line for one in alternatives if one.name == "fp32"]
    model = MemoryModel(
        batch_size=params.training.batch_size,
        precision=precision_on_gpu(params),
        census=around.census,
        gpu=bounded.estimate,
        cpu=fp32[0] if fp32 else bounded.estimate.line,
        gradient_bytes=bounded.template.gradient_bytes(),
        confirmation=bounded.confirmation,
        replays=bounded.replays,
        loose_blocks=bounded.template.loose_blocks,
        alternatives=alternatives,
    )
    return Prediction(model, bounded.template, around)


def bound_step(params: Params, around: Surroundings, factory_for: FactoryFor) -> Bounded:
    """Trace the step, confirm the template, replay the census; arguments as for `predict`."""
    batch_size, stride = params.training.batch_size, token_stride(params)
    few, many = around.worst(_FEW), around.worst(_MANY)
    shape = other_shape((many.height, many.width), stride)
    other = Pass(_CONFIRMED, *shape, many.objects)
    unseen = Pass(_CONFIRMED + 2, shape[0] - 5, shape[1] - 3, many.objects)
    *traces, check = _trace(factory_for(params), around, params, (few, many, other, unseen))
    template = make_template(traces, stride)
    replays = tuple(
        replay(template, around.windows(images, batches), WORKSPACE_SHARE)
        for images, batches in zip((_FEW, max(batch_size, _MANY)), _BATCHES, strict=True)
    )
    held = line_through(*((one.images, one.fragments_bytes) for one in replays))
    peaks = timeline_of(check).peak_bytes, template.peak(unseen)
    confirmation = Confirmation(unseen.batch, unseen.height, unseen.width, *peaks)
    estimate = _estimate(params, template, around, held)
    return Bounded(template, estimate, held, replays, confirmation)


def _alternatives(
    params: Params, around: Surroundings, factory_for: FactoryFor, bounded: Bounded
) -> tuple[Alternative, ...]:
    """The same training with one parameter changed, for the same micro-batches."""
    found = []
    changes = [*other_steps(params), *other_batches(params)]
    with progress("predict memory", len(changes), "settings") as steps:
        for change in changes:
            changed = override(params, change.values)
            template, batches = bounded.template, around
            if change in other_steps(params):
                template = _step_under(changed, around, factory_for)
            else:
                batches = replace(around, census=around.census_of(changed))
            estimate = _estimate(changed, template, batches, bounded.held)
            found.append(Alternative(change.name, str(change), estimate))
            steps.advance()
    return tuple(found)


def token_stride(params: Params) -> int:
    """Pixels from token to token."""
    if params.model.backbone == "compact":
        return 8
    return 16 if params.model.dilation else 32


def precision_on_gpu(params: Params) -> str:
    """What a GPU that has bf16 computes in."""
    names = {"auto": "bf16", "off": "fp32"}
    return names.get(params.training.precision, params.training.precision)


def colour_factors(params: Params) -> int | None:
    """Colour factors of an image: brightness, contrast and, where it varies, saturation."""
    augment = params.data.augment
    if augment.saturation:
        return 3
    return 2 if augment.brightness or augment.contrast else None


def _trace(
    factory: StepFactory, around: Surroundings, params: Params, passes: Sequence[Pass]
) -> list[Trace]:
    """A step over a window of two equal micro-batches, for each of `passes`."""
    colour = colour_factors(params)
    with recorder(factory, Content(around.num_classes, colour), _GPU) as one:
        # The first step is unlike all others: it makes the optimizer's state.
        steps = [one.step(window) for window in (passes[:1], *((p, p) for p in passes))]
        _, traces = one.classified(steps)
    return traces[1:]


def _estimate(params: Params, template: Template, around: Surroundings, held: Line) -> Estimate:
    """Of micro-batches up to `training.batch_size`.

    Args:
        params: what is trained.
        template: the step.
        around: its batches.
        held: what the allocator holds beside what is alive, over the images.
    """
    batch_size = params.training.batch_size
    every = [around.worst(images) for images in range(1, batch_size + 1)]
    last = max(batch_size, _MANY)
    ends = [(images, template.peak(around.worst(images))) for images in (_FEW, last)]
    return Estimate(
        line_through(*ends),
        tuple(template.peak(one) for one in every),
        tuple(
            held.at(one.batch)
            + round(template.peak(one, WORKSPACE_SHARE) * (1 + MODEL_ERROR))
            + partial_sums_bytes(params, one)
            for one in every
        ),
    )


def partial_sums_bytes(params: Params, one: Pass) -> int:
    """Most that a kernel takes to sum up the gradient of the widest bias over all tokens.

    See `runkey.memory.trace.workspaces.reduction`: two float32 numbers for each that is summed, and
    no more than all blocks at once of the largest GPU have.
    """
    stride, model = token_stride(params), params.model
    tokens = one.batch * -(-one.height // stride) * -(-one.width // stride)
    widest = max(model.feedforward_dim, 2 * model.decoder_layers * model.hidden_dim)
    return min(9 * tokens * widest, _PARTIAL_SUMS)


def _step_under(params: Params, around: Surroundings, factory_for: FactoryFor) -> Template:
    """The same step under other parameters, known for the worst shape only."""
    passes = around.worst(_FEW), around.worst(_MANY)
    traces = _trace(factory_for(params), around, params, passes)
    return make_template(traces, token_stride(params))


def prepared_surroundings(params: Params, prepared: Path) -> Surroundings:
    """The batches that training will meet.

    Args:
        params: data, seed, model.num_queries and training.batch_size are read.
        prepared: prepare's output folder.

    Raises:
        DataError: prepare has not run, or left no image.
    """
    records = read_index(prepared / "train.json")
    census = partial(_census, records)
    return Surroundings(
        census=census(params),
        census_of=census,
        sample=partial(_sample, params, records),
        num_classes=len(read_classes(prepared / "classes.json")),
    )


def single_shape_surroundings(
    params: Params, shape: Shape, *, objects: int, num_classes: int
) -> Surroundings:
    """Batches of one shape, without any data.

    Args:
        params: data.short_sides and training.batch_size are read.
        shape: padded (height, width), pixels.
        objects: boxes of each image.
        num_classes: K.
    """

    def census(other: Params) -> Census:
        part = max(other.data.short_sides) / max(params.data.short_sides)
        height, width = (max(1, round(side * part)) for side in shape)
        if not other.data.group_by_aspect:
            height = width = max(height, width)
        return census_of_shape(
            (height, width), batch_size=other.training.batch_size, objects=objects
        )

    def sample(images: int, _: int) -> list[tuple[Pass, ...]]:
        return [(Pass(images, *shape, objects),) * 2] * 2

    return Surroundings(census(params), census, sample, num_classes)


def max_objects(params: Params) -> int:
    """Boxes of an image that the loader keeps."""
    return min(n for n in (params.data.max_objects, params.model.num_queries) if n)


def _census(records: list[Record], params: Params) -> Census:
    return take_census(
        params.data,
        records,
        batch_size=params.training.batch_size,
        max_objects=max_objects(params),
    )


def _sample(
    params: Params, records: list[Record], images: int, batches: int
) -> list[tuple[Pass, ...]]:
    return sample_windows(
        params.data,
        records,
        seed=params.seed,
        batch_size=params.training.batch_size,
        micro_batch=images,
        max_objects=max_objects(params),
        batches=batches,
    )
