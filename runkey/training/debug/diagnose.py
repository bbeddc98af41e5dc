"""One step under the probe: the first place at which it is not finite."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from runkey.data.batch import Batch, Window
from runkey.data.normalise import normalise
from runkey.training.debug.finding import Finding
from runkey.training.debug.probe import Probe
from runkey.training.debug.tensors import floating, numbers_of
from runkey.training.seed import seed_step
from runkey.training.step import Machinery, accumulate_gradients

# True boxes are parts of an image; one that reaches this far is none.
_FAR = 2.0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a replayed step gave."""

    finding: Finding
    losses: dict[str, float]
    """`loss` and `loss_<part>` of the window, to be compared with what was logged."""


class _WatchedCriterion:
    """A criterion that shows its losses to a probe."""

    def __init__(self, criterion: Any, probe: Probe) -> None:
        self._criterion, self._probe = criterion, probe
        self.normaliser = criterion.normaliser

    def __call__(self, outputs: Any, targets: Any, normaliser: Any) -> Any:
        losses = self._criterion(outputs, targets, normaliser)
        named = {**losses.parts, "total": losses.total.detach()}
        bad = [name for name, value in named.items() if not value.isfinite()]
        seen = {**dict(floating({"output": outputs, "targets": targets})), **named}
        numbers = {name: numbers_of(tensor) for name, tensor in seen.items()}
        number = self._probe.micro_batch
        if bad and all(numbers[name].is_finite for name in seen if name not in named):
            names = ", ".join(name for name in bad if name != "total" or len(bad) == 1)
            ids = self._probe.image_ids
            self._probe.found(Finding("loss", names, "criterion", number, ids, numbers))
        return losses


def diagnose(
    machinery: Machinery, window: Window, *, seed: int, step: int, rank: int = 0
) -> Diagnosis:
    """Run a step's forward and backward passes; weights and moments are not changed.

    Args:
        machinery: in the state before the step, its model in training mode.
        window: the step's images.
        seed: of the run.
        step: steps done before this one.
        rank: of the process whose step it is.
    """
    broken = _before(machinery.model, window, machinery.channels_last)
    probe = Probe(machinery.model, window)
    watched = replace(
        machinery,
        criterion=_WatchedCriterion(machinery.criterion, probe),  # type: ignore[arg-type]
    )
    machinery.gradients.clear()
    with probe.watching():
        losses = accumulate_gradients(watched, window, reseed=partial(seed_step, seed, step, rank))
    machinery.statistics.restore(losses.statistics, torch.ones((), device=machinery.device))
    machinery.gradients.clear()
    finding = broken or probe.finding or Finding("nowhere")
    return Diagnosis(finding, {name: float(value) for name, value in losses.values.items()})


def _before(model: nn.Module, window: Window, channels_last: bool) -> Finding | None:
    """What is wrong before the step computes anything."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            numbers = numbers_of(tensor)
            if not numbers.is_finite:
                return Finding("weights", name, tensors={name: numbers})
    for number, batch in enumerate(window, start=1):
        images, _ = normalise(batch, channels_last=channels_last)
        rows = images.isfinite().flatten(1).all(1).tolist()
        bad = tuple(i for i, fine in zip(batch.image_ids, rows, strict=True) if not fine)
        if bad:
            seen = {"images": numbers_of(images)}
            return Finding("image", "", "", number, bad, seen)
        bad = _with_bad_boxes(batch)
        if bad:
            seen = {"boxes_cxcywh": numbers_of(batch.boxes_cxcywh)}
            return Finding("targets", "", "", number, bad, seen)
    return None


def _with_bad_boxes(batch: Batch) -> tuple[int, ...]:
    """Ids of the images with a true box that is not finite or far outside."""
    good = (batch.boxes_cxcywh.isfinite() & (batch.boxes_cxcywh.abs() <= _FAR)).all(1).tolist()
    spans = pairwise(accumulate(batch.counts, initial=0))
    return tuple(
        image_id
        for image_id, (start, end) in zip(batch.image_ids, spans, strict=True)
        if not all(good[start:end])
    )
