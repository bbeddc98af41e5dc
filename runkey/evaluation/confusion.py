"""Which class is taken for which, with the background as one more class.

What the sheets call right is on the diagonal: a detection takes an object of its own class first.
Detections and objects that are left over are then paired by IoU whatever their classes, and what
still is alone was seen where nothing is, or not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runkey.evaluation.per_image import MATCH_IOU, ImageScore, Judgement, iou_xywh


@dataclass(frozen=True, slots=True)
class Confusion:
    """Counts over all images at one score threshold."""

    counts: NDArray[np.int64]
    """[K+1, K+1]: rows are the truth, columns what was detected; the last of each is background:
    detections where nothing is, and objects that were missed."""
    threshold: float
    """Detections below this score do not count."""


def confusion(judged: Judgement, classes: int) -> Confusion:
    """Count which class was detected for which.

    Args:
        judged: the evaluated split.
        classes: K.
    """
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for image in judged.images:
        _add(counts, image)
    return Confusion(counts, judged.threshold)


def _add(counts: NDArray[np.int64], image: ImageScore) -> None:
    background = len(counts) - 1
    record = image.record
    missed = []
    for place, (label, crowd) in enumerate(zip(record.labels, record.crowd, strict=True)):
        if image.found[place]:
            counts[label, label] += 1
        elif not crowd:
            missed.append(place)
    false = [box for box in image.shown if not box.right]
    overlaps = iou_xywh(
        np.array([box.box_xywh for box in false], dtype=np.float64).reshape(-1, 4),
        np.array([record.boxes_xywh[i] for i in missed], dtype=np.float64).reshape(-1, 4),
        np.zeros(len(missed), dtype=bool),
    )
    alone, unseen = set(range(len(false))), set(range(len(missed)))
    while overlaps.size and overlaps.max() >= MATCH_IOU:
        d, o = map(int, np.unravel_index(np.argmax(overlaps), overlaps.shape))
        counts[record.labels[missed[o]], false[d].label] += 1
        overlaps[d], overlaps[:, o] = -1, -1
        alone.discard(d)
        unseen.discard(o)
    for d in alone:
        counts[background, false[d].label] += 1
    for o in unseen:
        counts[record.labels[missed[o]], background] += 1
