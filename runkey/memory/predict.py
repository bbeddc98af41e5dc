"""Predict a training step's memory on a GPU, without a GPU.

    shapes = prepared_shapes(params, Path("prepared"))
    prediction = predict(params, shapes, lambda other: step_factory(other, shapes.num_classes))
    prediction.model.gpu.upper(8)       # bytes that 8 images take at most

A few traced steps give every micro-batch and every shape; docs/memory.md has the method. The result
is written to memory/memory.json, from which training picks a micro-batch. It follows from
parameters and annotations alone: the same bytes on every machine, no measurement. All bytes are
those of CUDA's caching allocator; the CUDA context and other processes are added when a device is
known (`runkey.memory.choose`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from runkey.errors import TrainingError
from runkey.files import read_json, write_atomically
from runkey.memory.batch_shapes import BatchShapes, ShapeStatistics
from runkey.memory.template import AllocatorReplay, Grid, Template, other_shape, replay_steps
from runkey.memory.trace.events import MicroBatch, Trace, timeline_of
from runkey.memory.trace.gpu import Gpu
from runkey.memory.trace.record import BatchFields, StepFactory, recorder
from runkey.model.backbones import spec_of, strides_of
from runkey.params import Params, override
from runkey.progress import each
from runkey.units import MIB

MODEL = "memory.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Line:
    """Peak bytes of a training step as a function of the images of a micro-batch."""

    base_bytes: float
    """Weights, optimizer state, libraries: what does not depend on the images."""
    bytes_per_image: float

    def at(self, images: int) -> int:
        """Return the predicted peak in bytes."""
        return round(self.base_bytes + self.bytes_per_image * images)

    def __str__(self) -> str:
        return f"{self.base_bytes / MIB:.0f} MiB + {self.bytes_per_image / MIB:.1f} MiB an image"


def line_through(first: tuple[int, int], last: tuple[int, int]) -> Line:
    """Return the line through two peaks, each (images, bytes); its slope is never negative."""
    first, last = sorted((first, last))
    slope = max(0.0, (last[1] - first[1]) / (last[0] - first[0]))
    # Through the larger peak: where noise makes the slope 0, the line stays above both.
    return Line(last[1] - slope * last[0], slope)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory of a training step at the largest shape, for micro-batches of 1, 2, ... images."""

    line: Line
    """Bytes of tensors at the peak, from two images on."""
    allocated_bytes: tuple[int, ...]
    """The same for each micro-batch; one image has the shape of the largest single image."""
    upper_bytes: tuple[int, ...]
    """Most bytes that the allocator holds, fragmentation and workspaces included."""

    def upper(self, images: int) -> int:
        """Return `upper_bytes` of a micro-batch, extrapolated beyond the batch size."""
        known = len(self.upper_bytes)
        if images <= known:
            return self.upper_bytes[images - 1]
        before = self.upper_bytes[-2] if known > 1 else self.upper_bytes[0]
        rise = max(self.line.bytes_per_image, self.upper_bytes[-1] - before)
        return self.upper_bytes[-1] + round(rise * (images - known))


@dataclass(frozen=True, slots=True)
class Alternative:
    """The same training with one parameter changed."""

    name: str
    """checkpointing, bf16, fp32, smaller images, grouping or no grouping."""
    change: str
    """As params.yaml writes it."""
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Confirmation:
    """A trace that the template was not made from, against what the template predicts."""

    images: int
    height: int
    width: int
    traced_bytes: int
    predicted_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """The content of memory.json."""

    batch_size: int
    """Images of an optimizer step."""
    precision: str
    """fp32, bf16 or fp16: what a current GPU computes in."""
    shapes: Annotated[ShapeStatistics, Field(alias="census")]
    gpu: Estimate
    cpu: Line
    """Bytes of tensors in a CPU's precision, which for `auto` is fp32."""
    gradient_bytes: int
    """What data parallel training adds: one copy of the gradients."""
    confirmation: Confirmation
    replays: tuple[AllocatorReplay, ...]
    loose_blocks: int
    """Number of blocks whose size follows no law and is bounded."""
    alternatives: tuple[Alternative, ...]

    def limit_pixels(self, images: int) -> int:
        """Return the padded pixels of the largest batch that is predicted for a micro-batch."""
        height, width = self.shapes.worst_of(images)
        return images * height * width

    def as_dict(self) -> dict[str, Any]:
        """Return the content of memory.json."""
        tree: dict[str, Any] = TypeAdapter(MemoryModel).dump_python(self, by_alias=True)
        return tree


def write_model(folder: Path, model: MemoryModel) -> None:
    """Write memory.json into `folder`, which is created if needed."""
    text = json.dumps({"format": FORMAT} | model.as_dict(), indent=1, allow_nan=False)
    # Lists of numbers on one line each: there is one number for each micro-batch.
    text = re.sub(r"\[[\s\d,]+\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
    write_atomically(folder / MODEL, text + "\n")


def read_model(path: Path, batch_size: int | None = None) -> MemoryModel:
    """Read memory/memory.json, made for `training.batch_size` images a step; None: for any.

    Raises:
        TrainingError: it is missing, not a memory model, or for another batch size.
    """
    again = "run `dvc repro profile_memory`"
    try:
        tree = read_json(path)
        if tree["format"] != FORMAT:
            raise ValueError("another format")
        model = TypeAdapter(MemoryModel).validate_python(tree)
    except FileNotFoundError:
        raise TrainingError(f"{path}: not found; {again} first") from None
    except (ValueError, TypeError, KeyError):
        raise TrainingError(f"{path}: no memory model of this version; {again}") from None
    if batch_size is not None and batch_size != model.batch_size:
        raise TrainingError(
            f"{path}: made for training.batch_size {model.batch_size}, not {batch_size}; {again}"
        )
    return model


WORKSPACE_SHARE = 1.0
"""Largest workspace of a convolution, as a part of its result: on an H200, some convolutions in
float32 copied their input to another memory format. A workspace exists while one operation runs,
and the peak is at the end of the forward pass, where results are small."""

MODEL_ERROR = 0.01
"""Margin on tensors and workspaces: in 70 trainings on an H200 they took at most 0.95% of 105 MiB,
else 0.39%, more than predicted (benchmarks/results/gpu/gpu_memory.json)."""

FactoryFor = Callable[[Params], StepFactory]
"""Returns the step factory for some parameters."""

# Images of the two traces that the line goes through. Not 1: kernels skip copies of a single one.
_FEW, _MANY = 2, 4
_CONFIRMED = 3
_REPLAYED = (40, 200)
"""Micro-batches that are replayed, of few images and of the whole batch size."""
_MOST_PARTIAL_SUMS = 160 * MIB
# An alternative: images of 3/4 the sides.
_SMALLER = 0.75
_LONGEST_LIST = 3


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


def predict(
    params: Params, shapes: BatchShapes, factory_for: FactoryFor, *, alternatives: bool = True
) -> Prediction:
    """Trace training steps on a fake GPU, and model their memory; the same bytes on any machine.

    Args:
        params: of the training.
        shapes: its batches.
        factory_for: returns what builds the step under some parameters.
        alternatives: predict the same training with one parameter changed, too.
    """
    batch_size, grid = params.training.batch_size, _grid(params)
    few, many = shapes.worst(_FEW), shapes.worst(_MANY)
    queries = params.model.num_queries if params.model.preset == "fast" else 0
    shape = other_shape((many.height, many.width), grid, queries)
    other = MicroBatch(_CONFIRMED, *shape, many.objects)
    unseen_shape = max(1, shape[0] - 5), max(1, shape[1] - 3)
    unseen = MicroBatch(_CONFIRMED + 2, *unseen_shape, many.objects)
    *traces, check = _trace(params, shapes, factory_for, (few, many, other, unseen))
    template = Template(traces, grid)
    replays = tuple(
        replay_steps(template, shapes.steps(images, count), WORKSPACE_SHARE)
        for images, count in zip((_FEW, max(batch_size, _MANY)), _REPLAYED, strict=True)
    )
    # What the allocator holds beside what is alive, over the images.
    fragmentation = line_through(
        *((one.images, one.reserved_bytes - one.allocated_bytes) for one in replays)
    )
    peaks = timeline_of(check).peak_bytes, template.peak(unseen)
    estimate = _estimate(params, template, shapes, fragmentation)
    found: tuple[Alternative, ...] = ()
    if alternatives:
        found = _alternatives(params, shapes, factory_for, template, fragmentation)
    fp32 = [one.estimate.line for one in found if one.name == "fp32"]
    precision = params.training.precision
    model = MemoryModel(
        batch_size=batch_size,
        precision={"auto": "bf16", "off": "fp32", "tf32": "fp32"}.get(precision, precision),
        shapes=shapes.statistics,
        gpu=estimate,
        cpu=fp32[0] if fp32 else estimate.line,
        gradient_bytes=template.gradient_bytes(),
        confirmation=Confirmation(unseen.images, unseen.height, unseen.width, *peaks),
        replays=replays,
        loose_blocks=template.laws.loose,
        alternatives=found,
    )
    return Prediction(model, template, shapes)


def _alternatives(
    params: Params,
    shapes: BatchShapes,
    factory_for: FactoryFor,
    template: Template,
    fragmentation: Line,
) -> tuple[Alternative, ...]:
    """Predict the same training with one parameter changed, for the same micro-batches."""
    found = []
    # Two traces: the step is only needed at the largest shape.
    sizes = (shapes.worst(_FEW), shapes.worst(_MANY))
    for name, values in each("predict memory", list(_changes(params).items()), "settings"):
        changed = override(params, values)
        step, batches = template, shapes
        if changed.data == params.data:
            step = Template(_trace(changed, shapes, factory_for, sizes), _grid(changed))
        else:
            batches = replace(shapes, statistics=shapes.statistics_under(changed))
        text = ", ".join(f"{field}: {_yaml(value)}" for field, value in values.items())
        estimate = _estimate(changed, step, batches, fragmentation)
        found.append(Alternative(name, text, estimate))
    return tuple(found)


def _changes(params: Params) -> dict[str, dict[str, Any]]:
    """Name of each alternative to the parameters that it changes."""
    data, is_fp32 = params.data, params.training.precision in ("off", "tf32")
    sides = tuple(max(1, round(side * _SMALLER)) for side in data.short_sides)
    long_side = max(1, round(data.long_side * _SMALLER))
    grouped = data.group_by_aspect
    less = {} if params.model.checkpointing else {"checkpointing": {"model.checkpointing": True}}
    return less | {
        "bf16" if is_fp32 else "fp32": {"training.precision": "bf16" if is_fp32 else "off"},
        "smaller images": {"data.short_sides": sides, "data.long_side": long_side},
        "no grouping" if grouped else "grouping": {"data.group_by_aspect": not grouped},
    }


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        long = len(value) > _LONGEST_LIST
        return f"[{value[0]}, ..., {value[-1]}]" if long else str(list(value))
    return str(value).lower()


def _grid(params: Params) -> Grid:
    """Return the cells that the body makes of an image."""
    return Grid(strides_of(params.model), spec_of(params.model.backbone).pad_multiple)


def batch_fields(params: Params, num_classes: int) -> BatchFields:
    """Return the fields of training batches."""
    augment = params.data.augment
    colour = 3 if augment.saturation else 2 if augment.brightness or augment.contrast else None
    return BatchFields(num_classes, colour)


def _trace(
    params: Params, shapes: BatchShapes, factory_for: FactoryFor, sizes: Sequence[MicroBatch]
) -> list[Trace]:
    """Trace a step over two equal micro-batches, for each of `sizes`."""
    fields = batch_fields(params, shapes.num_classes)
    with recorder(factory_for(params), fields, Gpu()) as recording:
        recording.step(sizes[:1])  # unlike all others: it allocates the optimizer's state
        return [recording.step((one, one)) for one in sizes]


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
            + _partial_sums_bytes(params, one)
            for one in every
        ),
    )


def _partial_sums_bytes(params: Params, one: MicroBatch) -> int:
    """Return the most bytes that a kernel takes to sum the gradient of the widest bias.

    See `reduction` in benchmarks/gpu_workspaces.py: two float32 numbers for each that is summed
    over all tokens, and no more than all blocks of the largest GPU have at once.
    """
    model, tokens = params.model, one.images * _grid(params).tokens(one.height, one.width)
    widest = max(model.feedforward_dim, 2 * model.decoder_layers * model.hidden_dim)
    return min(9 * tokens * widest, _MOST_PARTIAL_SUMS)
