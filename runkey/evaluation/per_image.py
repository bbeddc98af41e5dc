"""Matches, misses and false detections of each image, at one score threshold.

Detections above the threshold are matched at IoU 0.5, and an image is ranked by its F1,
2 right / (2 right + false + missed). The threshold maximises the F1 of all images together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from runkey.data.index import ImageRecord
from runkey.evaluation.detections import DetectionArrays
from runkey.evaluation.matching import ObjectArrays, box_iou, find_pairs, match_greedily

MATCH_IOU = 0.5
BINS = 10


@dataclass(frozen=True, slots=True, eq=False)
class MatchedBoxes:
    """n detections and what they match, for any threshold.

    Matching goes by descending score, so detections below a threshold do not change those above.
    """

    labels: NDArray[np.int64]
    """[n]: class indices."""
    boxes_xywh: NDArray[np.float64]
    """[n, 4]."""
    scores: NDArray[np.float64]
    """[n]."""
    targets: NDArray[np.int64]
    """[n]: index of the matched box in the record, which no better detection has matched; -1:
    none."""
    ious: NDArray[np.float64]
    """[n]: with the matched box; 0 without one."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def right(self) -> NDArray[np.bool_]:
        """[n]: whether each matches an object of its class."""
        return self.targets >= 0

    def keep(self, which: NDArray[np.bool_] | slice) -> MatchedBoxes:
        """Return some of them."""
        return MatchedBoxes(
            self.labels[which],
            self.boxes_xywh[which],
            self.scores[which],
            self.targets[which],
            self.ious[which],
        )


@dataclass(frozen=True, slots=True)
class ImageScore:
    """One image's detections above the threshold, against its ground truth."""

    record: ImageRecord
    shown: MatchedBoxes
    """By descending score, without those in a crowd region of their class."""

    @property
    def found(self) -> tuple[bool, ...]:
        """For each box of the record, whether a detection matches it; False for crowds."""
        taken = set(self.shown.targets.tolist())
        return tuple(place in taken for place in range(len(self.record.labels)))

    @property
    def mean_iou(self) -> float:
        """Mean IoU of the matches; 0 without any."""
        ious = self.shown.ious[self.shown.right].tolist()
        return sum(ious) / len(ious) if ious else 0.0

    @property
    def objects(self) -> int:
        """Number of objects in the ground truth, without crowds."""
        return len(self.record.objects())

    @property
    def right(self) -> int:
        """Number of detections that match an object."""
        return int(np.count_nonzero(self.shown.right))

    @property
    def false(self) -> int:
        """Number of detections that match nothing."""
        return len(self.shown) - self.right

    @property
    def missed(self) -> int:
        """Number of objects that no detection matches."""
        return self.objects - self.right

    @property
    def f1(self) -> float:
        """F1, 0..1; 1 for an empty image without detections."""
        total = 2 * self.right + self.false + self.missed
        return 2 * self.right / total if total else 1.0


@dataclass(frozen=True, slots=True)
class Judgement:
    """The matches of a split."""

    images: tuple[ImageScore, ...]
    """In the order of the records."""
    threshold: float
    """The score threshold: the one that maximises the F1 of all images together, or that of val."""
    detections: MatchedBoxes
    """Those of any score, without those in a crowd region of their class."""


def judge_images(
    records: Sequence[ImageRecord], found: DetectionArrays, threshold: float | None = None
) -> Judgement:
    """Match the detections of every image with its objects.

    `threshold`: the score threshold; None: the one that maximises the F1 of these images.
    """
    images, boxes = _match(records, found)
    if threshold is None:
        threshold = _best_threshold(boxes, sum(len(record.objects()) for record in records))
    above = boxes.scores >= threshold
    ends = np.searchsorted(images[above], np.arange(len(records) + 1)).tolist()
    shown = boxes.keep(above)
    scored = (
        ImageScore(record, shown.keep(slice(*part)))
        for record, part in zip(records, pairwise(ends), strict=True)
    )
    return Judgement(tuple(scored), threshold, boxes)


def rank_images(scores: Sequence[ImageScore], *, best: bool) -> list[ImageScore]:
    """Sort images from best to worst, or from worst to best.

    Among equal F1, the higher mean IoU comes first among the best, and more faults first among the
    worst; then the lower image id.
    """
    if best:
        return sorted(scores, key=lambda s: (-s.f1, -round(s.mean_iou, 6), s.record.id))
    return sorted(scores, key=lambda s: (s.f1, -s.missed - s.false, s.record.id))


def _match(
    records: Sequence[ImageRecord], found: DetectionArrays
) -> tuple[NDArray[np.int64], MatchedBoxes]:
    """Match by descending score, as COCO does; drop detections in a crowd.

    Returns:
        The index of each detection's record, and the detections, by record and descending score.
    """
    index = {record.id: i for i, record in enumerate(records)}
    images = np.array([index.get(id_, -1) for id_ in found.ids.tolist()], dtype=np.int64)
    images = images[found.images]
    order = np.lexsort((-found.scores, images))
    order = order[np.count_nonzero(images < 0) :]
    images, found = images[order], found.keep(order)
    objects = ObjectArrays.from_records(records)
    classes = 1 + max(found.labels.max(initial=0), objects.labels.max(initial=0))
    groups = images * classes + found.labels
    by_group = np.argsort(groups, kind="stable")
    groups, boxes_xywh = groups[by_group], found.boxes_xywh[by_group]
    wanted = objects.images * classes + objects.labels
    pairs = find_pairs(groups, boxes_xywh, objects, wanted, MATCH_IOU, first_of_equal=True)
    crowd = objects.crowd
    matches = match_greedily(pairs, groups, np.array([MATCH_IOU]), crowd[:, None], crowd)
    chosen = matches.pairs[:, 0, 0]
    rows, chosen = by_group[matches.detections[chosen >= 0]], chosen[chosen >= 0]
    which = pairs.objects[chosen]
    targets, ious = np.full(len(images), -1), np.zeros(len(images))
    firsts = np.searchsorted(objects.images, images[rows])
    targets[rows], ious[rows] = which - firsts, pairs.ious[chosen]
    keep = np.ones(len(images), dtype=bool)
    keep[rows[crowd[which]]] = False
    boxes = MatchedBoxes(found.labels, found.boxes_xywh, found.scores, targets, ious)
    return images[keep], boxes.keep(keep)


def _best_threshold(boxes: MatchedBoxes, objects: int) -> float:
    """Return the highest score that maximises F1 = 2 right / (shown + objects)."""
    if not len(boxes):
        return 0.0
    order = np.argsort(-boxes.scores, kind="stable")
    right = np.cumsum(boxes.right[order])
    f1 = 2 * right / (np.arange(1, len(order) + 1) + objects)
    # A threshold shows all detections of its score, so only the last of equal scores counts.
    descending = boxes.scores[order]
    last = np.append(descending[1:] != descending[:-1], True)
    return float(descending[np.argmax(np.where(last, f1, -1))])


def confusion(judged: Judgement, classes: int) -> NDArray[np.int64]:
    """Count which of K classes is detected as which, above the score threshold.

    Returns:
        [K+1, K+1]: rows are true classes, columns detected ones; the last of each is background:
        detections of nothing, and missed objects.
    """
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for image in judged.images:
        _count_pairs(counts, image)
    return counts


def _count_pairs(counts: NDArray[np.int64], image: ImageScore) -> None:
    """Count one image; each false detection and missed object is background until they pair."""
    record, shown, background = image.record, image.shown, len(counts) - 1
    missed = ~(np.array(image.found, dtype=bool) | np.array(record.crowd, dtype=bool))
    missed_labels = np.array(record.labels, dtype=np.int64)[missed]
    false_labels = shown.labels[~shown.right]
    np.add.at(counts, (np.where(shown.right, shown.labels, background), shown.labels), 1)
    np.add.at(counts, (missed_labels, background), 1)
    boxes = shown.boxes_xywh[~shown.right]
    others = np.array(record.boxes_xywh, dtype=np.float64).reshape(-1, 4)[missed]
    shape = (len(boxes), len(others))
    overlaps = box_iou(
        np.repeat(boxes, shape[1], axis=0),
        np.tile(others, (shape[0], 1)),
        np.zeros(shape[0] * shape[1], dtype=bool),
    ).reshape(shape)
    while overlaps.size and overlaps.max() >= MATCH_IOU:
        d, o = np.unravel_index(np.argmax(overlaps), shape)
        detected, true = false_labels[d], missed_labels[o]
        counts[true, detected] += 1
        counts[background, detected] -= 1
        counts[true, background] -= 1
        overlaps[d], overlaps[:, o] = -1, -1


@dataclass(frozen=True, slots=True)
class Calibration:
    """Scores against the share of right detections, by bins of the score.

    A score of 0.8 should mean that 8 of 10 such detections are right.
    """

    counts: NDArray[np.int64]
    """[BINS]: number of detections in each bin."""
    mean_scores: NDArray[np.float64]
    """[BINS]; NaN where a bin is empty."""
    shares_right: NDArray[np.float64]
    """[BINS], 0..1; NaN where a bin is empty."""

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017), 0..1; 0 without detections."""
        used = self.counts > 0
        distances = np.abs(self.mean_scores - self.shares_right)[used]
        return float(np.average(distances, weights=self.counts[used])) if used.any() else 0.0


def calibration(judged: Judgement, least_score: float = 0.0) -> Calibration:
    """Bin all detections of at least `least_score`, by 0 to 0.1, 0.1 to 0.2, ..."""
    shown = judged.detections.keep(judged.detections.scores >= least_score)
    scores, right = shown.scores, shown.right.astype(np.float64)
    bin_of = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(bin_of, minlength=BINS)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        means = (np.bincount(bin_of, values, BINS) / counts for values in (scores, right))
        return Calibration(counts, *means)
