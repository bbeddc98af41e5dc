"""The detections of one image: what a model answers, to filter, draw and convert.

found = model("a.jpg")
found.boxes_xyxy, found.scores, found.names
found.above({"car": 0.4, "bus": 0.6}).draw().save("a.png")
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runkey.data.index import CocoDetection
from runkey.errors import ModelError
from runkey.inference.thresholds import class_keys
from runkey.model.weights import CardClass


class Detection(TypedDict):
    """A detection as plain values."""

    name: str
    score: float
    box_xyxy: list[float]
    """[left, top, right, bottom], pixels."""


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """The n detections of one image, best first."""

    boxes_xyxy: NDArray[np.float32]
    """[n, 4]: left, top, right, bottom in pixels of the upright image, inside it."""
    scores: NDArray[np.float32]
    """[n] in 0..1, descending."""
    labels: NDArray[np.int64]
    """[n], class indices 0..K-1."""
    classes: Sequence[CardClass]
    """All K classes of the model, by index."""
    image_size: tuple[int, int]
    """(height, width) of the upright image, pixels."""
    image: NDArray[np.uint8] | None = None
    """The upright image [H, W, 3] RGB; None if it was not kept."""
    source: str = ""
    """Where the image came from, such as its path."""

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        """Yield each detection as plain values: name, score, box_xyxy."""
        rows = zip(self.names, self.scores.tolist(), self.boxes_xyxy.tolist(), strict=True)
        return (Detection(name=name, score=score, box_xyxy=box) for name, score, box in rows)

    def __repr__(self) -> str:
        rows = ", ".join(f"{one['name']} {one['score']:.2f}" for one in list(self)[:3])
        more = f" and {len(self) - 3} more" if len(self) > 3 else ""
        return f"Detections({self.source or 'image'}: {rows or 'none'}{more})"

    @property
    def names(self) -> list[str]:
        """Return the class name of each detection."""
        return [self.classes[label].name for label in self.labels.tolist()]

    def keep(self, which: NDArray[Any]) -> Detections:
        """Return the detections at the positions `which` [m], or where it is True [n]."""
        boxes, scores, labels = self.boxes_xyxy[which], self.scores[which], self.labels[which]
        return replace(self, boxes_xyxy=boxes, scores=scores, labels=labels)

    def above(self, score: float | Mapping[str, float]) -> Detections:
        """Return the detections of at least this score.

        Args:
            score: for all classes, or by class name; a class that is not named keeps all.

        Raises:
            ModelError: the model has no class of a name.
        """
        return self.keep(self.scores >= score_limits(score, self.classes)[self.labels])

    def nms(self, iou: float) -> Detections:
        """Drop each detection that overlaps a better one of its class by more than `iou`.

        Greedy non-maximum suppression within each class.

        Raises:
            ModelError: `iou` is not above 0 and at most 1.
        """
        if not 0 < iou <= 1:
            raise ModelError(f"nms {iou:g}: give an IoU above 0, at most 1")
        import torch
        from torchvision.ops import batched_nms

        boxes_xyxy, scores, labels = map(
            torch.from_numpy, (self.boxes_xyxy, self.scores, self.labels)
        )
        return self.keep(np.sort(batched_nms(boxes_xyxy, scores, labels, iou).numpy()))

    def draw(self) -> Image.Image:
        """Draw boxes with names and scores, coloured by class, into a copy of the image.

        An image whose long side is below 640 pixels is enlarged, above 1600 reduced, so that lines
        and letters can be read.

        Raises:
            ModelError: the image was not kept.
        """
        from runkey.inference.draw import draw_detections

        if self.image is None:
            raise ModelError(f"{self.source or 'image'}: not kept, so that nothing can be drawn")
        return draw_detections(Image.fromarray(self.image), self)

    def to_supervision(self) -> Any:
        """Convert to `supervision.Detections`, with names in `data["class_name"]`.

        Raises:
            LockError: the package supervision is not installed.
        """
        from runkey.inference.extras import import_extra

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without OpenCV it says that it does without
            supervision = import_extra("supervision")
        return supervision.Detections(
            xyxy=self.boxes_xyxy.copy(),
            confidence=self.scores.copy(),
            class_id=self.labels.copy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_coco(self, image_id: int) -> list[CocoDetection]:
        """Convert to COCO's results format, with the data's category ids."""
        boxes = self.boxes_xyxy.astype(np.float64).reshape(-1, 4)
        boxes_xywh = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]).tolist()
        scores = self.scores.astype(np.float64).tolist()
        return [
            CocoDetection(
                image_id=image_id, category_id=self.classes[label].id, bbox=box, score=score
            )
            for label, box, score in zip(self.labels.tolist(), boxes_xywh, scores, strict=True)
        ]


def score_limits(
    score: float | Mapping[str, float],
    classes: Sequence[CardClass],
    others: Mapping[str, float] = {},
) -> NDArray[np.float32]:
    """Return the least score of each class, [K].

    Args:
        score: for all classes, or by name; classes of the same name are told apart by their
            category id, `car (3)`, and `car` names all of them.
        classes: of the model.
        others: of the classes that `score` does not name, by `class_keys`; 0 if not there.

    Raises:
        ModelError: the model has no class of a name, or a score is NaN.
    """
    named = score if isinstance(score, Mapping) else {"": score}
    for name, value in named.items():
        if math.isnan(value):
            raise ModelError(f"score {f'{name}=' * bool(name)}nan: give a number from 0 to 1")
    if not isinstance(score, Mapping):
        return np.full(len(classes), score, dtype=np.float32)
    keys, names = class_keys(classes), [one.name for one in classes]
    if unknown := sorted(set(score) - set(keys) - set(names)):
        shown = ", ".join(keys[:8]) + (" ..." if len(keys) > 8 else "")
        raise ModelError(f"score: no class {unknown[0]!r}; the model has {shown}")
    limits = [
        score.get(key, score.get(name, others.get(key, 0.0)))
        for key, name in zip(keys, names, strict=True)
    ]
    return np.array(limits, dtype=np.float32)
