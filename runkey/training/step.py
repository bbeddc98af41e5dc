"""One optimizer step over a window of micro-batches.

The losses of a window are sums divided by the whole window's own counts, so the gradient is the
same whatever the micro-batch.  Nothing here waits for the device; only the matcher, inside the
criterion, fetches its costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from runkey.data.batch import Batch, Window
from runkey.data.normalise import normalise
from runkey.model.criterion import Criterion, Losses, Normaliser
from runkey.model.targets import Targets
from runkey.training.clip import Clipped, Clipper
from runkey.training.optimizer import guarded_step, set_rates, trained_parameters
from runkey.training.precision import Precision
from runkey.training.statistics import RunningStatistics


@dataclass(frozen=True)
class Machinery:
    """What a step works with."""

    model: nn.Module
    criterion: Criterion
    optimizer: torch.optim.AdamW
    precision: Precision
    channels_last: bool
    clipper: Clipper

    @property
    def device(self) -> torch.device:
        """Where training runs."""
        return self.precision.device

    @cached_property
    def statistics(self) -> RunningStatistics:
        """The model's running statistics."""
        return RunningStatistics(self.model)


@dataclass(frozen=True, slots=True)
class WindowLosses:
    """What the forward passes of a window gave."""

    values: dict[str, Tensor]
    """`loss` and `loss_<part>`, detached scalars on the device."""
    faults: tuple[str, ...]
    """See `StepResult.faults`."""


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


def train_step(machinery: Machinery, window: Window, factor: float) -> StepResult:
    """Forward and backward over each micro-batch, then one guarded update.

    A step whose loss or gradients are not finite leaves weights, moments, counters and running
    statistics as they were, bit for bit.

    Args:
        machinery: model, criterion, optimizer and settings.
        window: the micro-batches of the effective batch, on the host.
        factor: the schedule's factor on every rate.
    """
    optimizer = machinery.optimizer
    set_rates(optimizer, factor)
    optimizer.zero_grad(set_to_none=True)
    statistics = machinery.statistics.copy()
    losses = accumulate_gradients(machinery, window)
    return _update(machinery, losses, statistics)


def _update(machinery: Machinery, losses: WindowLosses, statistics: list[Tensor]) -> StepResult:
    """Clip the gradients and step, or undo what the forward passes left behind.

    Args:
        machinery: its parameters have the window's gradients.
        losses: of the window.
        statistics: running statistics from before the window.
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
    machinery.statistics.restore(statistics, skipped)
    if scaler is not None:
        scaler.update()
    return StepResult(losses.values, losses.faults, clipped, skipped, scale)


def accumulate_gradients(machinery: Machinery, window: Window) -> WindowLosses:
    """Add the gradients of a window's losses to the parameters' `.grad`."""
    counts = [count for batch in window for count in batch.counts]
    normaliser = machinery.criterion.normaliser(counts)
    scaler = machinery.precision.scaler
    sums: dict[str, Tensor] = {}
    faults = []
    for number, batch in enumerate(window, start=1):
        losses = _forward(machinery, batch, normaliser)
        total = losses.total if scaler is None else scaler.scale(losses.total)
        total.backward()  # type: ignore[no-untyped-call]
        parts = {"loss": losses.total.detach()}
        parts |= {part_name(name): value for name, value in losses.parts.items()}
        sums = {name: sums[name] + value for name, value in parts.items()} if sums else parts
        if losses.fault:
            faults.append(f"micro-batch {number}: {losses.fault}")
    return WindowLosses(sums, tuple(faults))


def _forward(machinery: Machinery, batch: Batch, normaliser: Normaliser) -> Losses:
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


def image_ids_of(window: Window) -> tuple[int, ...]:
    """COCO ids of a window's images."""
    return tuple(image_id for batch in window for image_id in batch.image_ids)
