"""One optimizer step over a window of micro-batches.

The losses of a window are sums divided by the whole window's own counts over all ranks, known
before the first forward pass, so the gradient is the same whatever the micro-batch and however
many ranks share the window.  Nothing here waits for the device; only the matcher, inside the
criterion, fetches its costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from runkey.data.dataset import Batch, GlobalBatch
from runkey.data.normalise import normalise
from runkey.errors import RunkeyError
from runkey.model.criterion import Criterion, Losses, Normaliser
from runkey.model.matcher import Targets
from runkey.training.device import Precision
from runkey.training.distributed import SharedError, World
from runkey.training.metrics import RunningStatistics
from runkey.training.optimizer import (
    Clipped,
    Clipper,
    Gradients,
    guarded_step,
    set_rates,
    trained_parameters,
)
from runkey.training.split import Split, in_pieces, is_out_of_memory


@dataclass(frozen=True)
class TrainStep:
    """What a step works with."""

    model: nn.Module
    criterion: Criterion
    optimizer: torch.optim.AdamW
    precision: Precision
    channels_last: bool
    clipper: Clipper
    world: World = field(default_factory=World)
    """The ranks that share each window."""

    @property
    def device(self) -> torch.device:
        """Where training runs."""
        return self.precision.device

    @cached_property
    def gradients(self) -> Gradients:
        """Those of the parameters that the optimizer moves."""
        return Gradients(trained_parameters(self.optimizer), self.world)

    @cached_property
    def statistics(self) -> RunningStatistics:
        """The model's running statistics."""
        return RunningStatistics(self.model)


@dataclass(frozen=True, slots=True)
class WindowLosses:
    """What the forward passes of a window gave, on all ranks."""

    values: dict[str, Tensor]
    """`loss` and `loss_<part>`, detached scalars on the device."""
    faults: tuple[str, ...]
    """See `StepResult.faults`."""
    image_ids: tuple[int, ...]
    """See `StepResult.image_ids`."""
    splits: tuple[Split, ...]
    """See `StepResult.splits`."""
    statistics: list[Tensor]
    """The model's running statistics from before the window."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Scalars on the device: reading one waits for the step."""

    losses: dict[str, Tensor]
    """`loss`, the weighted sum that is minimised, and `loss_<part>`; of the whole window."""
    faults: tuple[str, ...]
    """What the matching found that is not finite, with the micro-batch; on the host."""
    clipped: Clipped
    """Joint norms of the unscaled gradients."""
    skipped: Tensor
    """1 where loss or gradients were not finite and nothing was updated, else 0."""
    scale: Tensor | None
    """The loss scaler's factor in this step; None without one."""
    image_ids: tuple[int, ...]
    """COCO ids of the window, rank by rank."""
    splits: tuple[Split, ...]
    """Micro-batches that did not fit in memory; the last limit holds from here on."""


def train_step(
    machinery: TrainStep,
    window: GlobalBatch,
    factor: float,
    *,
    limit: int | None = None,
    reseed: Callable[[], None] = lambda: None,
) -> StepResult:
    """Forward and backward over each micro-batch, then one guarded update.

    A step whose loss or gradients are not finite leaves weights, moments, counters and running
    statistics as they were, bit for bit.

    Args:
        machinery: model, criterion, optimizer and settings.
        window: this rank's micro-batches of the effective batch, on the host.
        factor: the schedule's factor on every rate.
        limit: most padded pixels (images x height x width) of a forward pass, if known.
        reseed: sets the random state that the window's noise is drawn from.

    Raises:
        StoppedError: one image does not fit in memory, or another rank failed.
    """
    set_rates(machinery.optimizer, factor)
    machinery.gradients.clear()
    return _update(machinery, accumulate_gradients(machinery, window, limit, reseed))


def _update(machinery: TrainStep, losses: WindowLosses) -> StepResult:
    """Clip the gradients and step, or undo what the forward passes left behind.

    Args:
        machinery: its parameters have the window's gradients.
        losses: of the window.
    """
    scaler, optimizer = machinery.precision.scaler, machinery.optimizer
    scale = None
    if scaler is not None:
        scale = scaler.scale(torch.ones((), device=machinery.device))
        scaler.unscale_(optimizer)
    gradients = [p.grad for p in trained_parameters(optimizer) if p.grad is not None]
    clipped = machinery.clipper.clip(gradients)
    skipped = (~(clipped.before.isfinite() & losses.values["loss"].isfinite())).float()
    guarded_step(optimizer, skipped)
    machinery.statistics.restore(losses.statistics, skipped)
    if scaler is not None:
        scaler.update()
    return StepResult(
        losses.values,
        losses.faults,
        clipped,
        skipped,
        scale,
        image_ids=losses.image_ids,
        splits=losses.splits,
    )


def accumulate_gradients(
    machinery: TrainStep,
    window: GlobalBatch,
    limit: int | None = None,
    reseed: Callable[[], None] = lambda: None,
) -> WindowLosses:
    """Make the gradients of a window's losses, over all ranks, the parameters' `.grad`.

    When memory runs out, this rank's gradients are discarded and its share is computed again in
    smaller pieces, from the same random state and running statistics: the result is what it would
    be had the limit been known.  If this raises, running statistics are as they were before.

    Args:
        machinery: model, criterion and ranks; its gradients are clear.
        window: this rank's share; nothing, if there are fewer images than ranks.
        limit: most padded pixels of a forward pass, if known.
        reseed: called before each attempt.

    Raises:
        StoppedError: one image does not fit in memory, or a rank has ended.
        SharedError: a rank cannot go on; raised on all of them.
    """
    shares = machinery.world.gather([(b.counts, b.image_ids) for b in window])
    counts = [count for share in shares for some, _ in share for count in some]
    ids = tuple(image_id for share in shares for _, some in share for image_id in some)
    normaliser = machinery.criterion.normaliser(counts)
    before = machinery.statistics.copy()

    def undo() -> None:
        machinery.gradients.clear()
        machinery.statistics.restore(before, torch.ones((), device=machinery.device))

    def attempt(parts: GlobalBatch) -> tuple[dict[str, Tensor], tuple[str, ...]] | Batch:
        reseed()
        return _add_gradients(machinery, parts, normaliser)

    def accumulate() -> _Outcome:
        pieces = in_pieces(attempt, undo, window, limit)
        return _Outcome(*pieces.result, pieces.splits)

    try:
        outcome = accumulate() if machinery.world.size == 1 else _together(machinery, accumulate)
    except BaseException:
        undo()
        raise
    return WindowLosses(outcome.values, outcome.faults, ids, outcome.splits, before)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Of one rank's share, or of all."""

    values: dict[str, Tensor]
    faults: tuple[str, ...]
    splits: tuple[Split, ...]


def _together(machinery: TrainStep, accumulate: Callable[[], _Outcome]) -> _Outcome:
    """Accumulate on every rank; when all are done, add up gradients, losses and statistics."""
    world, scaler = machinery.world, machinery.precision.scaler
    zero = torch.zeros((), device=machinery.device)
    if scaler is not None:  # makes the scaler's factor, if this rank has no image to do so
        scaler.scale(zero)
    mine, failure = _Outcome({}, (), ()), ""
    try:
        mine = accumulate()
    except RunkeyError as error:
        failure = f"rank {world.rank} of {world.size}: {error}"
    told = world.gather((failure, tuple(mine.values), mine.faults, mine.splits))
    for failure, *_ in told:
        if failure:
            raise SharedError(failure)
    machinery.gradients.add_up()
    machinery.statistics.average(world)
    names = next(names for _, names, _, _ in told if names)
    values = torch.stack([mine.values.get(name, zero) for name in names]).double()
    world.add_up(values)
    return _Outcome(
        dict(zip(names, values, strict=True)),
        tuple(
            f"rank {rank}, {fault}"
            for rank, (_, _, faults, _) in enumerate(told)
            for fault in faults
        ),
        tuple(split for *_, splits in told for split in splits),
    )


def _add_gradients(
    machinery: TrainStep, window: GlobalBatch, normaliser: Normaliser
) -> tuple[dict[str, Tensor], tuple[str, ...]] | Batch:
    """Add up gradients; the losses and faults, or the batch for which memory ran out.

    In the latter case nothing refers to what was computed: the exception, whose traceback holds
    every tensor on the way, ends in here.
    """
    scaler = machinery.precision.scaler
    sums: dict[str, Tensor] = {}
    faults = []
    for number, batch in enumerate(window, start=1):
        try:
            losses = _forward(machinery, batch, normaliser)
            total = losses.total if scaler is None else scaler.scale(losses.total)
            total.backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return batch
        parts = {"loss": losses.total.detach()}
        parts |= {part_name(name): value for name, value in losses.parts.items()}
        sums = {name: sums[name] + value for name, value in parts.items()} if sums else parts
        if losses.fault:
            faults.append(f"micro-batch {number}: {losses.fault}")
    return sums, tuple(faults)


def _forward(machinery: TrainStep, batch: Batch, normaliser: Normaliser) -> Losses:
    """The losses of one micro-batch, computed in the chosen precision."""
    batch = batch.to(machinery.device)
    images, padding_mask = normalise(batch, channels_last=machinery.channels_last)
    targets = Targets(batch.boxes_cxcywh, batch.labels, batch.counts)
    with machinery.precision.autocast():
        outputs = machinery.model(images, padding_mask, targets)
        return machinery.criterion(outputs, targets, normaliser)


def part_name(name: str) -> str:
    """`loss_l1` for `l1` and for `loss_l1`."""
    return name if name.startswith("loss") else f"loss_{name}"


def image_ids_of(window: GlobalBatch) -> tuple[int, ...]:
    """COCO ids of a window's images."""
    return tuple(image_id for batch in window for image_id in batch.image_ids)
