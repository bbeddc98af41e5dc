"""Detections of many images as arrays: from a model or a results file to the metrics.

found = DetectionArrays.from_images(detections)
found.boxes_xywh[found.images == 3]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from runkey.data.index import ClassName, CocoDetection
from runkey.errors import ModelError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Detected(Protocol):
    """Detections of an image as tensors or arrays, see `runkey.model.postprocess.Detections`."""

    @property
    def scores(self) -> Any: ...  # noqa: D102
    @property
    def labels(self) -> Any: ...  # noqa: D102
    @property
    def boxes_xyxy(self) -> Any: ...  # noqa: D102


@dataclass(frozen=True, slots=True, eq=False)
class DetectionArrays:
    """D detections in I images, image by image."""

    ids: Integers
    """[I] ids of the images, also of those without a detection."""
    images: Integers
    """[D] index of each detection's image in `ids`, rising."""
    labels: Integers
    """[D] class indices 0..K-1."""
    scores: Floats
    """[D] 0..1."""
    boxes_xywh: Floats
    """[D, 4]: left, top, width, height in pixels of the original image."""

    @classmethod
    def from_images(cls, detections: Mapping[int, Detected]) -> Self:
        """Join the detections of images by id.

        Raises:
            ModelError: a score or a box is NaN or infinite; names the image.
        """
        found = list(detections.values())
        labels = [np.asarray(one.labels, dtype=np.int64) for one in found]
        boxes = _joined([np.reshape(np.asarray(one.boxes_xyxy), (-1, 4)) for one in found], (0, 4))
        scores = _joined([np.asarray(one.scores) for one in found], (0,))
        ids = np.fromiter(map(int, detections), np.int64, len(found))
        images = np.repeat(np.arange(len(found)), [len(one) for one in labels])
        finite = np.isfinite(scores) & np.isfinite(boxes).all(axis=1)
        if not finite.all():
            raise ModelError(
                f"image {ids[images[np.argmin(finite)]]}: the model predicts NaN or infinity; "
                "train again with a lower lr or with optimizer.clip"
            )
        boxes[:, 2:] -= boxes[:, :2]
        return cls(ids, images, np.concatenate([np.zeros(0, np.int64), *labels]), scores, boxes)

    @classmethod
    def from_results(cls, results: Sequence[CocoDetection], classes: Sequence[ClassName]) -> Self:
        """Convert detections in COCO's results format, in any order; a class must be known."""
        label_of = {one.id: one.index for one in classes}
        place = {id_: i for i, id_ in enumerate(dict.fromkeys(one["image_id"] for one in results))}
        images = np.array([place[one["image_id"]] for one in results], dtype=np.int64)
        labels = np.array([label_of[one["category_id"]] for one in results], dtype=np.int64)
        scores = np.array([one["score"] for one in results], dtype=np.float64)
        boxes = np.array([one["bbox"] for one in results], dtype=np.float64).reshape(-1, 4)
        order = np.argsort(images, kind="stable")
        ids = np.array(list(place), dtype=np.int64)
        return cls(ids, images[order], labels[order], scores[order], boxes[order])

    def __len__(self) -> int:
        return len(self.scores)

    def rows(self, classes: Sequence[ClassName]) -> Iterator[CocoDetection]:
        """Yield the detections in COCO's results format, with the data's category ids."""
        category = np.array([one.id for one in classes], dtype=np.int64)
        step = 10_000  # a list of all boxes would take five times the memory of the array
        for start in range(0, len(self), step):
            part = slice(start, start + step)
            yield from (
                CocoDetection(image_id=image, category_id=class_id, bbox=box, score=score)
                for image, class_id, box, score in zip(
                    self.ids[self.images[part]].tolist(),
                    category[self.labels[part]].tolist(),
                    self.boxes_xywh[part].tolist(),
                    self.scores[part].tolist(),
                    strict=True,
                )
            )

    def keep(self, which: NDArray[Any]) -> Self:
        """Return the detections at the positions `which`, rising, or where it is True [D]."""
        return replace(
            self,
            images=self.images[which],
            labels=self.labels[which],
            scores=self.scores[which],
            boxes_xywh=self.boxes_xywh[which],
        )


def _joined(parts: list[NDArray[Any]], empty: tuple[int, ...]) -> Floats:
    return np.concatenate([np.zeros(empty), *parts], dtype=np.float64)
