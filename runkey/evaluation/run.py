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
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from runkey.data.dataset import IMAGENET, Batch, Normalisation, normalise
from runkey.data.index import ClassName, CocoDetection, ImageRecord
from runkey.errors import ModelError
from runkey.evaluation.coco import CocoResult, evaluate_results
from runkey.model.criterion import Criterion
from runkey.model.matcher import Targets
from runkey.model.postprocess import Detections, Postprocess
from runkey.progress import progress
from runkey.units import counted

AutocastFactory = Callable[[], AbstractContextManager[object]]


class Detected(Protocol):
    """Detections of an image as tensors or arrays, see `runkey.model.postprocess.Detections`."""

    @property
    def scores(self) -> Any: ...  # noqa: D102
    @property
    def labels(self) -> Any: ...  # noqa: D102
    @property
    def boxes_xyxy(self) -> Any: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of a `Validation`."""

    result: CocoResult
    detections: dict[int, Detections]
    """By image id, on the host."""
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
    detections: dict[int, Detections] = {}
    was_training = model.training
    model.eval()
    try:
        # no_grad, not inference_mode: what the model caches here (positions) is used in training.
        with torch.no_grad():
            for batch in (part for mixed in batches for part in same_shape_batches(mixed)):
                on_device = batch.to(device)
                with autocast():
                    outputs = model(*normalise(on_device, normalisation))
                found = postprocess(outputs, batch.original_sizes.to(device))
                for image_id, of_image in zip(batch.image_ids, found, strict=True):
                    detections[image_id] = Detections(
                        scores=of_image.scores.float().cpu(),
                        labels=of_image.labels.cpu(),
                        boxes_xyxy=of_image.boxes_xyxy.float().cpu(),
                    )
                on_batch(outputs, on_device)
    finally:
        model.train(was_training)
    return detections


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

    def __call__(self, model: nn.Module, *, by_size: bool = True) -> Evaluation:
        """Evaluate a model that is on the device; `by_size`: see `evaluate_results`.

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
            raise ValueError(f"batches hold {boxes} boxes, records {sum(counts)}")
        losses = {name: float(value) for name, value in sums.items()}
        result = evaluate_detections(self.records, self.classes, detections, by_size=by_size)
        return Evaluation(result, detections, losses)


def evaluate_detections(
    records: list[ImageRecord],
    classes: list[ClassName],
    detections: Mapping[int, Detected],
    *,
    by_size: bool = True,
) -> CocoResult:
    """Evaluate the detections of every image of `records`; otherwise as `evaluate_results`.

    Raises:
        ModelError: a score or a box is not finite.
    """
    wanted, got = {record.id for record in records}, set(detections)
    if wanted != got:
        raise ValueError(
            f"detections missing of {counted(len(wanted - got), 'image')}, there of "
            f"{counted(len(got - wanted), 'unknown image')}"
        )
    return evaluate_results(records, classes, to_results_json(detections, classes), by_size=by_size)


def to_results_json(
    detections: Mapping[int, Detected], classes: list[ClassName]
) -> list[CocoDetection]:
    """Convert detections to COCO's results format, image by image, with the data's category ids.

    Raises:
        ModelError: a score or a box is NaN or infinite; names the image.
    """
    results: list[CocoDetection] = []
    for image_id, found in detections.items():
        scores = np.asarray(found.scores, dtype=np.float64)
        boxes = np.asarray(found.boxes_xyxy, dtype=np.float64).reshape(-1, 4)
        if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
            raise ModelError(
                f"image {image_id}: the model predicts NaN or infinity; "
                "train again with a lower lr or with optimizer.clip"
            )
        boxes_xywh = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]).tolist()
        results += [
            CocoDetection(
                image_id=int(image_id), category_id=classes[label].id, bbox=box, score=score
            )
            for label, box, score in zip(
                found.labels.tolist(), boxes_xywh, scores.tolist(), strict=True
            )
        ]
    return results


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
