"""Made-up truth and detections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from runkey.data.index import ClassName, ImageRecord


@dataclass(frozen=True)
class Boxes:
    """The smallest thing that counts as one image's detections."""

    scores: np.ndarray
    labels: np.ndarray
    boxes_xyxy: np.ndarray


@dataclass(frozen=True)
class World:
    records: list[ImageRecord]
    classes: list[ClassName]
    detections: dict[int, Boxes]


def make_world(
    seed: int,
    *,
    images: int = 20,
    category_ids: tuple[int, ...] = (3, 1, 90, 0, 17),
    most_objects: int = 8,
    detections_per_image: int = 30,
    crowd_share: float = 0.0,
    score_steps: int = 0,
    unused_classes: tuple[int, ...] = (),
) -> World:
    """Random objects, and detections of which two thirds lie near an object.

    Args:
        score_steps: round scores to so many steps, which makes ties.
        unused_classes: indices that no object has, though detections may.
    """
    rng = np.random.default_rng(seed)
    classes = [ClassName(k, id_, f"class {id_}") for k, id_ in enumerate(category_ids)]
    used = [k for k in range(len(classes)) if k not in unused_classes]
    records, detections = [], {}
    next_annotation = 1
    for number in range(images):
        image_id = int(1000 - 7 * number)  # neither rising nor contiguous
        width, height = (int(v) for v in rng.integers(60, 700, 2))
        count = int(rng.integers(0, most_objects + 1)) if number % 5 else 0
        boxes = _boxes(rng, count, width, height)
        labels = rng.choice(used, count)
        records.append(
            ImageRecord(
                id=image_id,
                file=f"{image_id}.jpg",
                width=width,
                height=height,
                rotate=0,
                mirror=False,
                boxes_xywh=tuple(tuple(b) for b in boxes.tolist()),
                labels=tuple(labels.tolist()),
                # A segmentation's area is smaller than its box's.
                areas=tuple((boxes[:, 2] * boxes[:, 3] * rng.uniform(0.4, 1, count)).tolist()),
                crowd=tuple((rng.random(count) < crowd_share).tolist()),
                annotation_ids=tuple(range(next_annotation, next_annotation + count)),
            )
        )
        next_annotation += count
        detections[image_id] = _detections(
            rng, boxes, labels, detections_per_image, len(classes), (width, height), score_steps
        )
    return World(records, classes, detections)


def _boxes(rng: np.random.Generator, count: int, width: int, height: int) -> np.ndarray:
    """Left, top, width, height; sides log-uniform, so that all of S, M and L occur."""
    sides = np.exp(rng.uniform(np.log(4), np.log([width * 0.9, height * 0.9]), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * ([width, height] - sides)
    return np.hstack([corner, sides])


def _detections(rng, boxes, labels, count, num_classes, size, score_steps) -> Boxes:
    found = _boxes(rng, count, *size)
    found_labels = rng.integers(0, num_classes, count)
    if len(boxes):
        near = rng.random(count) < 0.67
        which = rng.integers(0, len(boxes), count)
        noise = rng.normal(0, 0.06, (count, 4)) * np.tile(boxes[which][:, 2:], 2)
        found[near] = (boxes[which] + noise)[near]
        found[:, 2:] = np.maximum(found[:, 2:], 0.5)
        right = near & (rng.random(count) < 0.8)
        found_labels[right] = labels[which][right]
    scores = rng.random(count)
    if score_steps:
        scores = np.round(scores * score_steps) / score_steps
    corners = np.hstack([found[:, :2], found[:, :2] + found[:, 2:]])
    return Boxes(scores.astype(np.float32), found_labels, corners.astype(np.float32))


@pytest.fixture
def world() -> Callable[..., World]:
    return make_world


@pytest.fixture
def boxes() -> type[Boxes]:
    return Boxes
