"""One optimizer step over a global batch, which is computed in micro-batches.

The losses of a global batch are sums divided by its own counts over all ranks, known before the
first forward pass, so the gradient is the same whatever the micro-batch and however many ranks
share it. Nothing here waits for the device; only the matcher, inside the criterion, fetches its
costs.

When a micro-batch does not fit in memory, it is split and the global batch is tried again. What
fits is a number of padded pixels (images x height x width) of one forward pass: the pixel limit.
It only goes down, is saved with the training's state, and a resumed training starts with it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from runkey.data.dataset import IMAGENET, Batch, GlobalBatch, Normalisation, normalise
from runkey.errors import StoppedError
from runkey.model.criterion import Criterion, Losses, Normaliser
from runkey.model.detr import Detector
from runkey.model.matcher import Targets
from runkey.training.device import Precision, draw_depth, seed_step
from runkey.training.distributed import World
from runkey.training.optimizer import (
    Clipper,
    GradientExchange,
    current_rates,
    guarded_step,
    set_rates,
    trained_parameters,
)
from runkey.training.tensors import flat_groups


class RunningStatistics:
    """Batch norm's running statistics: restored where the step that changed them does not count.

    A forward pass poisons them before anyone knows that its loss is not finite, and unlike the
    optimizer's update this cannot be left out afterwards.
    """

    def __init__(self, module: nn.Module) -> None:
        buffers = [
            buffer
            for part in module.modules()
            if isinstance(part, _NormBase) and part.track_running_stats
            for buffer in part.buffers(recurse=False)
        ]
        self._groups = flat_groups(buffers)

    def copy(self) -> list[Tensor]:
        """Return their present values, one flat tensor for each dtype."""
        return [_joined(group) for group, _ in self._groups]

    @torch.no_grad()
    def restore(self, saved: list[Tensor], where: Tensor) -> None:
        """Restore, bit for bit, what `copy` gave if the scalar `where` is not 0; no host sync."""
        for (group, layout), before in zip(self._groups, saved, strict=True):
            # A few kernels for all buffers, not one for each of a hundred.
            restored = torch.where(where > 0, before, _joined(group))
            torch._foreach_copy_(group, layout.views(restored))

    @torch.no_grad()
    def average(self, world: World) -> None:
        """Give all ranks the mean of their statistics, and rank 0's number of batches.

        Each rank has moved them by the images of its own share, as each micro-batch does in one
        process. The mean is the same bits everywhere.
        """
        if world.size == 1:
            return
        for group, layout in self._groups:
            joined = _joined(group)
            if joined.is_floating_point():
                world.all_reduce(joined)
                joined /= world.size
            else:
                joined *= world.is_main
                world.all_reduce(joined)
            torch._foreach_copy_(group, layout.views(joined))


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@dataclass(frozen=True)
class TrainStep:
    """What an optimizer step works with."""

    model: nn.Module
    criterion: Criterion
    optimizer: torch.optim.AdamW
    precision: Precision
    channels_last: bool
    clipper: Clipper
    world: World = field(default_factory=World)
    """The ranks that share each global batch."""
    normalisation: Normalisation = IMAGENET
    """Of the model's images."""
    layer_drop: float = 0.0
    """`model.layer_drop`; above 0 the model is a `Detector`."""

    @property
    def device(self) -> torch.device:
        """Where training runs."""
        return self.precision.device

    @cached_property
    def statistics(self) -> RunningStatistics:
        """The model's running statistics."""
        return RunningStatistics(self.model)

    @cached_property
    def exchange(self) -> GradientExchange:
        """Of the gradients, with the other ranks."""
        trained = {id(p) for p in trained_parameters(self.optimizer)}
        parameters = [p for p in self.model.parameters() if id(p) in trained]
        # Backward passes finish about in this order: heads, decoder, encoder, backbone.
        return GradientExchange(reversed(parameters), self.world)

    def reseed(self, seed: int, step: int, rank: int) -> None:
        """Make a step's noise and its number of decoder layers a function of the arguments."""
        seed_step(seed, step, rank)
        if self.layer_drop:
            decoder = cast(Detector, self.model).transformer.decoder
            decoder.depth = draw_depth(self.layer_drop, len(decoder.layers), seed, step)


@dataclass(frozen=True, slots=True)
class BatchLosses:
    """Result of a global batch's forward and backward passes, on all ranks."""

    values: dict[str, Tensor]
    """`loss`, the weighted sum that is minimised, and `loss_<part>`: detached scalars on the
    device, of the whole global batch."""
    faults: tuple[str, ...] = ()
    """What the matching found that is not finite, with the micro-batch; on the host."""
    splits: tuple[Split, ...] = ()
    """Micro-batches that did not fit in memory; the last limit holds from here on."""
    image_ids: tuple[int, ...] = ()
    """COCO ids of the global batch, rank by rank."""
    statistics: list[Tensor] = field(default_factory=list)
    """The model's running statistics from before."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of a step. Scalars are on the device: reading one waits for the step."""

    batch: BatchLosses
    scalars: dict[str, Tensor]
    """By metric name: losses, joint norms of the unscaled gradients, what clipped and scaled them,
    and `skipped`."""
    rates: dict[str, float]
    """Learning rates of the parameter groups, by metric name."""

    @property
    def skipped(self) -> Tensor:
        """1 where loss or gradients were not finite and nothing was updated, else 0."""
        return self.scalars["skipped"]


def train_step(
    parts: TrainStep,
    batch: GlobalBatch,
    factor: float,
    *,
    limit: int | None = None,
    reseed: Callable[[], None] = lambda: None,
) -> StepResult:
    """Run forward and backward over each micro-batch, then one guarded update.

    A step whose loss or gradients are not finite leaves weights, moments, counters and running
    statistics as they were, bit for bit.

    The batch is this rank's share, on the host. `factor` is the schedule's on every learning rate,
    `limit` the most padded pixels (images x height x width) of a forward pass, if it is known, and
    `reseed` sets the random state that the step's noise is drawn from. See `accumulate_gradients`
    for what is raised.
    """
    set_rates(parts.optimizer, factor)
    parts.optimizer.zero_grad()
    losses = accumulate_gradients(parts, batch, limit, reseed)
    scaler, optimizer = parts.precision.scaler, parts.optimizer
    scale = None
    if scaler is not None:
        scale = scaler.scale(torch.ones((), device=parts.device))
        scaler.unscale_(optimizer)
    if parts.layer_drop:
        _fill_gradients(optimizer)
    gradients = [p.grad for p in trained_parameters(optimizer) if p.grad is not None]
    clipped = parts.clipper.clip(gradients)
    skipped = (~(clipped.before.isfinite() & losses.values["loss"].isfinite())).float()
    guarded_step(optimizer, skipped)
    parts.statistics.restore(losses.statistics, skipped)
    if scaler is not None:
        scaler.update()
    scalars = {f"train/{name}": value for name, value in losses.values.items()} | {
        "train/grad_norm": clipped.before,
        "train/grad_norm_clipped": clipped.after,
        "skipped": skipped,
    }
    if clipped.threshold is not None:
        scalars["train/clip_threshold"] = clipped.threshold
    if scale is not None:
        scalars["train/loss_scale"] = scale
    kept = replace(losses, statistics=[])  # frees what is not needed any more
    return StepResult(kept, scalars, current_rates(optimizer))


def _fill_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Give dropped layers gradients of zero, as the sum over several ranks does."""
    for parameter in trained_parameters(optimizer):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def accumulate_gradients(
    parts: TrainStep,
    batch: GlobalBatch,
    limit: int | None = None,
    reseed: Callable[[], None] = lambda: None,
) -> BatchLosses:
    """Compute the gradients of a global batch's losses, over all ranks, into `.grad`.

    When memory runs out, this rank's gradients are discarded and its share is computed again in
    smaller micro-batches, from the same random state and running statistics: the result is what it
    would be had the limit been known. If the rank had sent a part of them to the others by then,
    all ranks compute their shares again. If this raises, running statistics are as they were
    before.

    Arguments as for `train_step`. The share is empty if there are fewer images than ranks.

    Raises:
        StoppedError: one image does not fit in memory, or a rank has ended.
        SharedError: a rank cannot continue; raised on all of them.
    """
    shares = parts.world.gather([(b.counts, b.image_ids) for b in batch])
    counts = [count for share in shares for some, _ in share for count in some]
    ids = tuple(image_id for share in shares for _, some in share for image_id in some)
    normaliser = parts.criterion.normaliser(counts)
    before = parts.statistics.copy()
    splits: list[Split] = []

    def undo() -> None:
        parts.optimizer.zero_grad()
        parts.statistics.restore(before, torch.ones((), device=parts.device))

    def accumulate() -> BatchLosses | None:
        """Return None if this rank's gradients do not count and a part of them has been sent."""
        nonlocal limit
        while True:
            reseed()
            result = _add_gradients(parts, split_batches(batch, limit), normaliser)
            if not isinstance(result, Batch):
                return BatchLosses(*result, tuple(splits))
            undo()
            gc.collect()
            torch.cuda.empty_cache()  # does nothing without a GPU
            splits.append(_halve(result))
            limit = splits[-1].limit
            if parts.exchange.has_begun:
                return None

    try:
        losses = _over_ranks(parts, accumulate, undo)
    except BaseException:
        undo()
        raise
    return replace(losses, image_ids=ids, statistics=before)


def _over_ranks(
    parts: TrainStep, accumulate: Callable[[], BatchLosses | None], undo: Callable[[], None]
) -> BatchLosses:
    """Accumulate on every rank until all have succeeded; sum gradients, losses and statistics."""
    world, scaler = parts.world, parts.precision.scaler
    if world.size == 1:
        alone = accumulate()
        assert alone  # nothing is sent
        return alone
    zero = torch.zeros((), device=parts.device)
    if scaler is not None:  # makes the scaler's factor, if this rank has no image to do so
        scaler.scale(zero)
    mine = BatchLosses({})

    def work() -> tuple[bool, tuple[str, ...], tuple[str, ...], tuple[Split, ...]]:
        nonlocal mine
        try:
            result = accumulate()
        finally:  # the others wait for this rank's part, whatever has become of it
            parts.exchange.finish()
        mine = result or BatchLosses({})
        return result is not None, tuple(mine.values), mine.faults, mine.splits

    received = world.together(work)
    while not all(counts for counts, *_ in received):
        undo()
        received = world.together(work)
    parts.statistics.average(world)
    names = next(names for _, names, _, _ in received if names)
    values = torch.stack([mine.values.get(name, zero) for name in names]).double()
    world.all_reduce(values)
    return BatchLosses(
        dict(zip(names, values, strict=True)),
        tuple(
            f"rank {rank}, {fault}"
            for rank, (_, _, faults, _) in enumerate(received)
            for fault in faults
        ),
        tuple(split for *_, splits in received for split in splits),
    )


def _add_gradients(
    parts: TrainStep, batch: GlobalBatch, normaliser: Normaliser
) -> tuple[dict[str, Tensor], tuple[str, ...]] | Batch:
    """Add up gradients; return the losses and faults, or the micro-batch that did not fit.

    In the latter case nothing refers to what was computed: the exception, whose traceback holds
    every tensor on the way, ends in here. The last backward pass sends what it has finished to the
    other ranks.
    """
    scaler = parts.precision.scaler
    sums: dict[str, Tensor] = {}
    faults = []
    for number, micro_batch in enumerate(batch, start=1):
        sends = number == len(batch) and parts.world.size > 1
        try:
            losses = _forward(parts, micro_batch, normaliser)
            total = losses.total if scaler is None else scaler.scale(losses.total)
            with parts.exchange.overlap() if sends else nullcontext():
                total.backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return micro_batch
        values = {"loss": losses.total.detach()}
        values |= {f"loss_{name}": value for name, value in losses.parts.items()}
        sums = {name: sums[name] + value for name, value in values.items()} if sums else values
        if losses.fault:
            faults.append(f"micro-batch {number}: {losses.fault}")
    return sums, tuple(faults)


def _forward(parts: TrainStep, micro_batch: Batch, normaliser: Normaliser) -> Losses:
    """Compute the losses of one micro-batch in the chosen precision."""
    padded = is_padded(micro_batch)
    micro_batch = micro_batch.to(parts.device)
    images, padding_mask = normalise(
        micro_batch, parts.normalisation, channels_last=parts.channels_last
    )
    targets = Targets(micro_batch.boxes_cxcywh, micro_batch.labels, micro_batch.counts)
    with parts.precision.autocast():
        outputs = parts.model(images, padding_mask if padded else None, targets)
        return parts.criterion(outputs, targets, normaliser)


def is_padded(batch: Batch) -> bool:
    """Return True if an image of a batch on the host is smaller than the others.

    Without padding there is no mask, and attention has faster kernels. Sizes without values, of a
    step whose memory is predicted, count as padded: that takes more memory.
    """
    if type(batch.sizes) is not Tensor:
        return True
    return batch.sizes.tolist() != [list(batch.images.shape[2:])] * len(batch)


def image_ids_of(batch: GlobalBatch) -> tuple[int, ...]:
    """Return the COCO ids of a batch's images."""
    return tuple(image_id for micro_batch in batch for image_id in micro_batch.image_ids)


# Micro-batches that do not fit in memory.

# What a CPU's allocator, cuBLAS and cuDNN say in a RuntimeError of no special kind.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


@dataclass(frozen=True, slots=True)
class Split:
    """A micro-batch that did not fit in memory, and the limit from then on."""

    images: int
    height: int
    """Padded, pixels."""
    width: int
    limit: int
    """Most padded pixels of a forward pass from here on."""

    @property
    def text(self) -> str:
        """In words, for the log and the terminal."""
        fits = max(1, self.limit // (self.height * self.width))
        return (
            f"memory ran out with {self.images} x {self.height} x {self.width} (images x height"
            f" x width); such a batch is computed in parts of at most {fits} from here on, with the"
            " same result up to rounding"
        )


def pixels(micro_batch: Batch) -> int:
    """Return the padded pixels of a micro-batch, which its memory grows with."""
    return len(micro_batch) * micro_batch.images.shape[2] * micro_batch.images.shape[3]


def split_batches(batch: GlobalBatch, limit: int | None) -> GlobalBatch:
    """Split micro-batches until each has at most `limit` padded pixels, or one image.

    The padding stays as it is: convolutions see its edge, so cutting it would change the result.
    """
    if limit is None:
        return batch
    return tuple(part for micro_batch in batch for part in _parts(micro_batch, limit))


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an exception means that memory ran out, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def _halve(micro_batch: Batch) -> Split:
    """Return what to try after memory ran out: the larger half."""
    images, (height, width) = len(micro_batch), micro_batch.images.shape[2:]
    if images == 1:
        raise StoppedError(
            f"memory ran out with a single image, {micro_batch.image_ids[0]}, of {height} x {width}"
            " pixels; that needs a device with more memory, or a training with a lower"
            " data.long_side or with model.checkpointing: true"
        )
    return Split(images, height, width, -(-images // 2) * height * width)


def _parts(micro_batch: Batch, limit: int) -> Iterator[Batch]:
    """Yield halves of halves, in order: the same cuts as if memory had run out with each."""
    if pixels(micro_batch) <= limit or len(micro_batch) == 1:
        yield micro_batch
        return
    half = -(-len(micro_batch) // 2)
    yield from _parts(_images(micro_batch, 0, half), limit)
    yield from _parts(_images(micro_batch, half, len(micro_batch)), limit)


def _images(batch: Batch, start: int, stop: int) -> Batch:
    """Images `start` to `stop` with their targets; views, so pinned memory stays pinned."""
    first, last = sum(batch.counts[:start]), sum(batch.counts[:stop])
    return replace(
        batch,
        images=batch.images[start:stop],
        sizes=batch.sizes[start:stop],
        boxes_cxcywh=batch.boxes_cxcywh[first:last],
        labels=batch.labels[first:last],
        counts=batch.counts[start:stop],
        image_ids=batch.image_ids[start:stop],
        original_sizes=batch.original_sizes[start:stop],
        colour=None if batch.colour is None else batch.colour[start:stop],
    )
