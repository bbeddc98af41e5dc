"""Find the score threshold of each class that maximises its F1 on the val images."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from runkey.data.index import ClassName
from runkey.evaluation.per_image import MATCH_IOU, Judgement, MatchedBoxes
from runkey.inference.thresholds import ClassThreshold, Thresholds, class_keys

_DIGITS = 6
_STEPS = 10_000
"""Thresholds are multiples of its inverse."""


def best_thresholds(judged: Judgement, classes: list[ClassName], weights: str) -> Thresholds:
    """Return the score of best F1 of each class, at IoU 0.5.

    F1 = 2 right / (shown + objects), van Rijsbergen (1979); of equal values the highest score,
    rounded down to four digits. A
    class without objects, or that is never found, has none.

    Args:
        judged: matches of all detections of the split.
        classes: of the labels.
        weights: sha256 of the file of the weights that detected.
    """
    objects = Counter(label for one in judged.images for _, label, _ in one.record.objects())
    found = judged.detections
    best = {
        name: _best(found.keep(found.labels == one.index), objects[one.index])
        for name, one in zip(class_keys(classes), classes, strict=True)
    }
    return Thresholds(iou=MATCH_IOU, weights=weights, classes=best)


def _best(boxes: MatchedBoxes, objects: int) -> ClassThreshold | None:
    scores = boxes.scores
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(boxes.right[order])
    if not len(order) or not right[-1]:
        return None
    shown = np.arange(1, len(order) + 1)
    f1 = 2 * right / (shown + objects)
    descending = scores[order]
    # A threshold shows all detections of its score, so only the last of equal scores counts.
    last = np.append(descending[1:] != descending[:-1], True)
    best = descending[np.argmax(np.where(last, f1, -1))]
    # Rounded down, so that another runtime, whose scores differ by 1e-6, shows the same.
    score = math.floor(best * _STEPS) / _STEPS
    at = int(np.sum(scores >= score)) - 1
    return ClassThreshold(
        score=score,
        precision=round(float(right[at] / shown[at]), _DIGITS),
        recall=round(float(right[at] / objects), _DIGITS),
        f1=round(float(f1[at]), _DIGITS),
    )


def describe_thresholds(thresholds: Thresholds) -> str:
    """Say the range of scores and F1 over the classes, in a line."""
    known = [one for one in thresholds["classes"].values() if one]
    if not known:
        return "no class was found in val: no score thresholds"
    low, high = (pick(one["score"] for one in known) for pick in (min, max))
    worst, best = (pick(one["f1"] for one in known) for pick in (min, max))
    return (
        f"score thresholds of best F1 by class: {low:.2f} to {high:.2f}"
        f" (F1 {worst:.2f} to {best:.2f})"
    )
