"""Detections in COCO's results format: what is saved, evaluated and drawn.

Class indices become category ids here, boxes become left, top, width, height.  Numbers are kept to
their last digit, so the saved file gives the metrics again exactly, in anyone's evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from runkey.data.index import ClassName
from runkey.errors import DataError, ModelError


class DetectionsLike(Protocol):
    """Detections of one image: tensors on the host, or arrays."""

    @property
    def scores(self) -> Any:
        """Floats [n], any order; ties keep the order that they have here."""

    @property
    def labels(self) -> Any:
        """Integers [n], class indices 0..K-1."""

    @property
    def boxes_xyxy(self) -> Any:
        """Floats [n, 4], pixels of the original image."""


class Found(TypedDict):
    """One detection as COCO's results format has it."""

    image_id: int
    category_id: int
    bbox: list[float]
    """Left, top, width, height in pixels of the original image."""
    score: float


def to_results_json(
    detections: Mapping[int, DetectionsLike], classes: list[ClassName]
) -> list[Found]:
    """All detections as one list, image by image, with the data set's own category ids.

    Args:
        detections: of each image id.
        classes: as in classes.json; the index of each is its place in this list.

    Raises:
        ModelError: a score or a box is NaN or infinite; names the image.
    """
    category_ids = np.array([c.id for c in classes], dtype=np.int64)
    results: list[Found] = []
    for image_id, found in detections.items():
        scores, labels, boxes_xywh = _arrays(image_id, found)
        if labels.size and (labels.min() < 0 or labels.max() >= len(classes)):
            raise ValueError(f"image {image_id}: a label outside 0..{len(classes) - 1}")
        ids = category_ids[labels].tolist() if labels.size else []
        results += [
            Found(image_id=int(image_id), category_id=category, bbox=box, score=score)
            for category, box, score in zip(ids, boxes_xywh.tolist(), scores.tolist(), strict=True)
        ]
    return results


def write_results(path: Path, results: list[Found]) -> None:
    """Write the results format, one detection a line."""
    lines = ",\n".join(json.dumps(found) for found in results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n" if results else "[]\n", encoding="utf-8")


def read_results(path: Path) -> list[Found]:
    """Read the results format.

    Raises:
        DataError: the file is not there, or is no list of detections.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: not found; run `dvc repro evaluate` first") from None
    except ValueError as error:
        raise DataError(f"{path}: no JSON ({error}); run `dvc repro -f evaluate`") from None
    keys = Found.__required_keys__
    if not isinstance(results, list) or not all(
        isinstance(r, dict) and keys <= set(r) for r in results
    ):
        raise DataError(f"{path}: not COCO's results format (a list of {sorted(keys)})")
    return results


def _arrays(
    image_id: int, found: DetectionsLike
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Scores [n], labels [n] and boxes [n, 4] as left, top, width, height."""
    scores = np.asarray(found.scores, dtype=np.float64)
    labels = np.asarray(found.labels, dtype=np.int64)
    boxes_xyxy = np.asarray(found.boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    if not (np.isfinite(scores).all() and np.isfinite(boxes_xyxy).all()):
        raise ModelError(
            f"image {image_id}: the model predicts NaN or infinity; "
            "train again with a lower lr or with optimizer.clip"
        )
    return scores, labels, np.hstack([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]])
