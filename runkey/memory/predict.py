"""The prediction: a few traced steps, from which every micro-batch and every shape follows.

    prediction = predict(params, surroundings, lend_for)

`lend_for(params)` comes from the floors above: it builds what trains under these parameters, see
`runkey.memory.trace.record`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from runkey.memory.alternatives import other_batches, other_steps
from runkey.memory.census import Census
from runkey.memory.fragments import Replay, replay
from runkey.memory.generations import MODEL_ERROR, WORKSPACE_SHARE
from runkey.memory.laws import other_shape
from runkey.memory.line import MIB, Line, line_through
from runkey.memory.model import (
    Alternative,
    Confirmation,
    Estimate,
    MemoryModel,
)
from runkey.memory.template import Template, make_template
from runkey.memory.timeline import timeline_of
from runkey.memory.trace.events import Pass, Trace
from runkey.memory.trace.gpu import Gpu
from runkey.memory.trace.record import Content, Lend, recorder
from runkey.params import Params, override
from runkey.progress import progress

LendFor = Callable[[Params], Lend]
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


def predict(params: Params, around: Surroundings, lend_for: LendFor) -> Prediction:
    """Trace training steps on a GPU that is not there, and model their memory.

    Args:
        params: what is trained, and how.
        around: the batches.
        lend_for: builds it.

    Returns:
        The same on any machine, to the byte.
    """
    bounded = bound_step(params, around, lend_for)
    alternatives = _alternatives(params, around, lend_for, bounded)
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


def bound_step(params: Params, around: Surroundings, lend_for: LendFor) -> Bounded:
    """Trace the step, confirm the template, replay the census; arguments as for `predict`."""
    batch_size, stride = params.training.batch_size, token_stride(params)
    few, many = around.worst(_FEW), around.worst(_MANY)
    shape = other_shape((many.height, many.width), stride)
    other = Pass(_CONFIRMED, *shape, many.objects)
    unseen = Pass(_CONFIRMED + 2, shape[0] - 5, shape[1] - 3, many.objects)
    *traces, check = _trace(lend_for(params), around, params, (few, many, other, unseen))
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
    params: Params, around: Surroundings, lend_for: LendFor, bounded: Bounded
) -> tuple[Alternative, ...]:
    """The same training with one parameter changed, for the same micro-batches."""
    found = []
    changes = [*other_steps(params), *other_batches(params)]
    with progress("predict memory", len(changes), "settings") as steps:
        for change in changes:
            changed = override(params, change.values)
            template, batches = bounded.template, around
            if change in other_steps(params):
                template = _step_under(changed, around, lend_for)
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


def _trace(lend: Lend, around: Surroundings, params: Params, passes: Sequence[Pass]) -> list[Trace]:
    """A step over a window of two equal micro-batches, for each of `passes`."""
    colour = colour_factors(params)
    with recorder(lend, Content(around.num_classes, colour), _GPU) as one:
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


def _step_under(params: Params, around: Surroundings, lend_for: LendFor) -> Template:
    """The same step under other parameters, known for the worst shape only."""
    passes = around.worst(_FEW), around.worst(_MANY)
    traces = _trace(lend_for(params), around, params, passes)
    return make_template(traces, token_stride(params))
