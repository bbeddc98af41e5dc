"""Evaluate a model on a set of images: its detections, its loss, its COCO metrics.

Images go through the model in groups of one shape. A mask keeps attention out of padding, but
convolutions reach into it, where it is not zero beyond the first layer: without padding, the batch
size cannot change the result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from runkey.data.dataset import IMAGENET, Batch, Normalisation, normalise
from runkey.data.index import ClassName, ImageRecord
from runkey.evaluation.coco import CocoResult, evaluate_results
from runkey.evaluation.detections import Detected, DetectionArrays
from runkey.model.criterion import Criterion
from runkey.model.matcher import Targets
from runkey.model.postprocess import Detections, Postprocess, unpack
from runkey.progress import progress
from runkey.units import counted

AutocastFactory = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of a `Validation`."""

    result: CocoResult
    detections: DetectionArrays
    losses: dict[str, float]
    """"loss" and its parts, over all images together as one batch."""

    def metrics(self, prefix: str = "val/") -> dict[str, float]:
        """Return the metrics that are defined, for logging: val/AP, val/AP50, ..., val/loss, ..."""
        values = {**self.result.summary, **self.losses}
        return {prefix + name: value for name, value in values.items() if value is not None}


def detect(
    model: nn.Module,
    postprocess: Postprocess,
    batches: Iterable[Batch],
    device: torch.device,
    autocast: AutocastFactory = nullcontext,
    on_batch: Callable[[Any, Batch], None] = lambda outputs, batch: None,  # noqa: ARG005
    normalisation: Normalisation = IMAGENET,
) -> dict[int, Detections]:
    """Detect the objects of all batches; return them by image id.

    The model is on the device and is called in evaluation mode, restored after, as
    model(images [B, 3, H, W], padding_mask [B, H, W]). `on_batch` receives the outputs and their
    batch, whose images have one shape.
    """
    found: list[tuple[tuple[int, ...], Tensor]] = []
    was_training = model.training
    model.eval()
    try:
        # no_grad, not inference_mode: what the model caches here (positions) is used in training.
        with torch.no_grad():
            for batch in (part for mixed in batches for part in same_shape_batches(mixed)):
                on_device = batch.to(device)
                with autocast():
                    outputs = model(*normalise(on_device, normalisation))
                packed = postprocess.pack(outputs, batch.original_sizes).float()
                # One copy for a batch, into page-locked memory, that nothing waits for.
                found.append((batch.image_ids, packed.to("cpu", non_blocking=True)))
                on_batch(outputs, on_device)
    finally:
        model.train(was_training)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {
        image_id: one
        for ids, packed in found
        for image_id, one in zip(ids, unpack(packed), strict=True)
    }


@dataclass(frozen=True)
class Validation:
    """Evaluates models on a set of images: their detections against the ground truth, and the loss.

    The loss is normalised over all images at once, so the batch size does not change it.
    """

    records: list[ImageRecord]
    """The ground truth."""
    classes: list[ClassName]
    batches: Iterable[Batch]
    """Every image of `records` once, with all objects but crowds, in any order and grouping."""
    device: torch.device
    postprocess: Postprocess
    criterion: Criterion
    autocast: AutocastFactory = nullcontext
    normalisation: Normalisation = IMAGENET
    """Of the images of the models."""

    def __call__(self, model: nn.Module) -> Evaluation:
        """Evaluate a model that is on the device.

        Raises:
            ModelError: the model predicts NaN or infinity.
        """
        counts = [len(record.objects()) for record in self.records]
        normaliser = self.criterion.normaliser(counts)
        sums: dict[str, Tensor] = {}
        boxes = 0
        with progress("evaluate", len(self.records), "images") as steps:

            def on_batch(outputs: Any, batch: Batch) -> None:
                nonlocal boxes
                boxes += len(batch.labels)
                targets = Targets(batch.boxes_cxcywh, batch.labels, batch.counts)
                losses = self.criterion(outputs, targets, normaliser)
                parts = {f"loss_{name}": part for name, part in losses.parts.items()}
                for name, value in {"loss": losses.total, **parts}.items():
                    sums[name] = sums[name] + value if name in sums else value
                steps.advance(len(batch))

            detections = detect(
                model,
                self.postprocess,
                self.batches,
                self.device,
                self.autocast,
                on_batch,
                self.normalisation,
            )
        if boxes != sum(counts):
            raise ValueError(f"batches hold {counted(boxes, 'box')}, records {sum(counts)}")
        losses = {name: float(value) for name, value in sums.items()}
        found = _join(self.records, detections)
        return Evaluation(evaluate_results(self.records, self.classes, found), found, losses)


def evaluate_detections(
    records: list[ImageRecord], classes: list[ClassName], detections: Mapping[int, Detected]
) -> CocoResult:
    """Evaluate the detections of every image of `records`; otherwise as `evaluate_results`.

    Raises:
        ModelError: a score or a box is not finite.
    """
    return evaluate_results(records, classes, _join(records, detections))


def _join(records: list[ImageRecord], detections: Mapping[int, Detected]) -> DetectionArrays:
    wanted, got = {record.id for record in records}, set(detections)
    if wanted != got:
        raise ValueError(
            f"detections missing of {counted(len(wanted - got), 'image')}, there of "
            f"{counted(len(got - wanted), 'unknown image')}"
        )
    return DetectionArrays.from_images(detections)


def same_shape_batches(batch: Batch) -> Iterator[Batch]:
    """Split a batch by the images' valid sizes, and remove the padding."""
    rows_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, (height, width) in enumerate(batch.sizes.tolist()):
        rows_of[height, width].append(row)
    boxes_cxcywh = torch.split(batch.boxes_cxcywh, list(batch.counts))
    labels = torch.split(batch.labels, list(batch.counts))
    for (height, width), rows in rows_of.items():
        yield replace(
            batch,
            images=batch.images[rows, :, :height, :width],
            sizes=batch.sizes[rows],
            boxes_cxcywh=torch.cat([boxes_cxcywh[row] for row in rows]),
            labels=torch.cat([labels[row] for row in rows]),
            counts=tuple(batch.counts[row] for row in rows),
            image_ids=tuple(batch.image_ids[row] for row in rows),
            original_sizes=batch.original_sizes[rows],
            colour=None if batch.colour is None else batch.colour[rows],
        )
