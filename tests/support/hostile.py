"""Evaluations that are hard to get right: ties, borders, crowds, empty and degenerate boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runkey.data.index import ClassName, CocoDetection, ImageRecord

BORDERS = (32.0, 96.0, 31.999, 96.001)
AREAS = (32.0**2, 96.0**2, 1e10, 2e10, 0.0, np.nextafter(32.0**2, 0), np.nextafter(96.0**2, 1e9))


@dataclass(frozen=True)
class Hostile:
    """Ground truth, and detections in COCO's results format."""

    records: list[ImageRecord]
    classes: list[ClassName]
    results: list[CocoDetection]


def make_hostile(seed: int) -> Hostile:
    """Draw a set of images, in which each hard thing occurs with some probability."""
    random = np.random.default_rng(seed)
    images, count = int(random.integers(0, 40)), int(random.integers(1, 9))
    categories = random.choice(2000, count, replace=False)  # neither rising nor contiguous
    classes = [ClassName(k, int(id_), str(id_)) for k, id_ in enumerate(categories)]
    used = int(random.integers(1, count + 1))  # some classes have no object
    crowd = random.choice([0, 0, 0.1, 0.5, 1])
    most_objects = int(random.choice([0, 1, 5, 30]))
    most_found = int(random.choice([0, 3, 40, 150, 250]))
    steps, grid = random.choice([0, 2, 5, 20]), random.choice([0, 0, 1, 8, 32])
    records: list[ImageRecord] = []
    results: list[CocoDetection] = []
    for id_ in random.choice(10**6, images, replace=False).tolist():
        objects = 0 if random.random() < 0.2 else int(random.integers(0, most_objects + 1))
        boxes = _boxes(random, objects, grid)
        labels = random.integers(0, used, objects)
        shares = random.uniform(0.3, 1, objects) if random.random() < 0.5 else np.ones(objects)
        areas = boxes[:, 2] * boxes[:, 3] * shares
        areas = np.where(random.random(objects) < 0.3, random.choice(AREAS, objects), areas)
        records.append(
            ImageRecord(
                id=id_,
                file=f"{id_}.jpg",
                width=500,
                height=500,
                rotate=0,
                mirror=False,
                boxes_xywh=tuple(map(tuple, boxes.tolist())),
                labels=tuple(labels.tolist()),
                areas=tuple(areas.tolist()),
                crowd=tuple((random.random(objects) < crowd).tolist()),
                annotation_ids=tuple(range(objects)),
            )
        )
        found = 0 if random.random() < 0.1 else int(random.integers(0, most_found + 1))
        detected, classified = _boxes(random, found, grid), random.integers(0, count, found)
        if objects:
            near, which = random.random(found) < 0.8, random.integers(0, objects, found)
            noise = random.normal(0, random.choice([0, 0.02, 0.1]), (found, 4))
            noise *= np.tile(np.abs(boxes[which][:, 2:]), 2)
            detected[near] = (boxes[which] + noise)[near]
            same = near & (random.random(found) < 0.8)
            classified[same] = labels[which][same]
            if grid and random.random() < 0.5:
                detected = np.round(detected / grid) * grid
        scores = random.random(found)
        if steps:
            scores = np.round(scores * steps) / steps
        results += [
            CocoDetection(image_id=id_, category_id=classes[label].id, bbox=box, score=score)
            for label, box, score in zip(
                classified.tolist(), detected.tolist(), scores.tolist(), strict=True
            )
        ]
    if random.random() < 0.3:
        random.shuffle(results)  # type: ignore[arg-type]
    return Hostile(records, classes, results)


def _boxes(random: np.random.Generator, count: int, grid: float) -> np.ndarray:
    """Left, top, width, height: squares at the border of a size, multiples of `grid`, sides of 0
    and below, far larger than an image, of single precision."""
    sides = np.exp(random.uniform(np.log(2), np.log(300), (count, 2)))
    if random.random() < 0.4:
        sides = np.tile(random.choice(BORDERS, (count, 1)), 2)
    boxes = np.hstack([random.uniform(0, 200, (count, 2)), sides])
    if grid:
        boxes = np.round(boxes / grid) * grid
    if random.random() < 0.1:
        boxes[:, 2:] *= random.choice([0, 1, 1, -1], (count, 2))
    if random.random() < 0.03:
        boxes *= 1e6
    return boxes.astype(np.float32).astype(np.float64) if random.random() < 0.5 else boxes
