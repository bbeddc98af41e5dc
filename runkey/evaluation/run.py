"""Evaluate a model on a set of images: its detections, its loss, its COCO metrics.

Images go through the model in groups of one shape, without padding. A mask keeps attention out of
padding, but convolutions reach into it: beyond the first layer padding is no longer zero, and the
features near an image's edge would depend on the other images of its batch. Without padding the
batch size cannot change the result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from runkey.data.dataset import Batch
from runkey.data.index import ClassName, ImageRecord
from runkey.data.normalise import normalise
from runkey.evaluation.coco import CocoResult, evaluate_detections
from runkey.evaluation.files import ImageDetections
from runkey.model.criterion import Criterion
from runkey.model.matcher import Targets
from runkey.model.postprocess import Postprocess
from runkey.progress import progress

AutocastFactory = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of `evaluate_model`."""

    result: CocoResult
    detections: dict[int, ImageDetections]
    """By image id."""
    losses: dict[str, float]
    """"loss" and its parts, over all images together as one batch; empty without a criterion."""

    def metrics(self, prefix: str = "val/") -> dict[str, float]:
        """Return the metrics that are defined, for logging: val/AP, val/AP50, ..., val/loss, ..."""
        losses = {prefix + name: value for name, value in self.losses.items()}
        return {**self.result.metrics(prefix), **losses}


def detect(
    model: nn.Module,
    postprocess: Postprocess,
    batches: Iterable[Batch],
    device: torch.device,
    autocast: AutocastFactory = nullcontext,
    on_batch: Callable[[Any, Batch], None] = lambda outputs, batch: None,  # noqa: ARG005
) -> dict[int, ImageDetections]:
    """Return all detections by image id; the model runs in evaluation mode, restored after.

    Args:
        model: a detector; called as model(images [B, 3, H, W], padding_mask [B, H, W]).
        postprocess: turns its outputs into detections.
        batches: in any grouping.
        device: where the model is.
        autocast: returns the context of each forward pass (mixed precision).
        on_batch: called with the outputs and the batch, whose images have one shape.
    """
    detections: dict[int, ImageDetections] = {}
    was_training = model.training
    model.eval()
    try:
        # no_grad, not inference_mode: what the model caches here (positions) is used in training.
        with torch.no_grad():
            for batch in (part for mixed in batches for part in same_shape_batches(mixed)):
                on_device = batch.to(device)
                with autocast():
                    outputs = model(*normalise(on_device))
                found = postprocess(outputs, batch.original_sizes.to(device))
                for image_id, of_image in zip(batch.image_ids, found, strict=True):
                    detections[image_id] = ImageDetections(
                        scores=of_image.scores.float().cpu().numpy(),
                        labels=of_image.labels.cpu().numpy(),
                        boxes_xyxy=of_image.boxes_xyxy.float().cpu().numpy(),
                    )
                on_batch(outputs, on_device)
    finally:
        model.train(was_training)
    return detections


def evaluate_model(
    model: nn.Module,
    postprocess: Postprocess,
    batches: Iterable[Batch],
    records: list[ImageRecord],
    classes: list[ClassName],
    device: torch.device,
    *,
    autocast: AutocastFactory = nullcontext,
    criterion: Criterion | None = None,
    by_size: bool = True,
) -> Evaluation:
    """Detect objects (see `detect`), and compare them with the ground truth, `records`.

    The batches hold every image of `records` once, in any order and any grouping. A criterion
    computes the loss too, as in training; it is normalised over all images at once, so the batch
    size does not change it either. The batches must then hold all objects but crowds.

    Raises:
        ModelError: the model predicts NaN or infinity.
    """
    meter = _LossMeter(criterion, [len(r.objects()) for r in records]) if criterion else None
    with progress("evaluate", len(records), "images") as steps:

        def on_batch(outputs: Any, batch: Batch) -> None:
            if meter:
                meter.add(outputs, batch)
            steps.advance(len(batch))

        detections = detect(model, postprocess, batches, device, autocast, on_batch)
    losses = meter.losses() if meter else {}
    result = evaluate_detections(records, classes, detections, by_size=by_size)
    return Evaluation(result, detections, losses)


def same_shape_batches(batch: Batch) -> Iterator[Batch]:
    """Split a batch by the images' valid sizes, and remove the padding."""
    rows_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, (height, width) in enumerate(batch.sizes.tolist()):
        rows_of[height, width].append(row)
    ends = list(accumulate(batch.counts, initial=0))
    for (height, width), rows in rows_of.items():
        boxes = [i for row in rows for i in range(ends[row], ends[row + 1])]
        yield replace(
            batch,
            images=batch.images[rows, :, :height, :width],
            sizes=batch.sizes[rows],
            boxes_cxcywh=batch.boxes_cxcywh[boxes],
            labels=batch.labels[boxes],
            counts=tuple(batch.counts[row] for row in rows),
            image_ids=tuple(batch.image_ids[row] for row in rows),
            original_sizes=batch.original_sizes[rows],
            colour=None if batch.colour is None else batch.colour[rows],
        )


class _LossMeter:
    """Sum of the losses of batches, each normalised by the counts of the whole set."""

    def __init__(self, criterion: Criterion, counts: list[int]) -> None:
        self._criterion = criterion
        self._counts = counts
        self._normaliser = criterion.normaliser(counts)
        self._sums: dict[str, Tensor] = {}
        self._boxes = 0

    def add(self, outputs: Any, batch: Batch) -> None:
        targets = Targets(batch.boxes_cxcywh, batch.labels, batch.counts)
        losses = self._criterion(outputs, targets, self._normaliser)
        self._boxes += sum(batch.counts)
        parts = {f"loss_{name}": part for name, part in losses.parts.items()}
        for name, value in {"loss": losses.total, **parts}.items():
            previous = self._sums.get(name)
            self._sums[name] = value.detach() if previous is None else previous + value.detach()

    def losses(self) -> dict[str, float]:
        if self._boxes != sum(self._counts):
            raise ValueError(f"batches hold {self._boxes} boxes, records {sum(self._counts)}")
        return {name: float(value) for name, value in self._sums.items()}
