"""Matches, misses and false detections of each image, at one score threshold.

Detections above the threshold are matched at IoU 0.5, and an image is ranked by its F1,
2 right / (2 right + false + missed). The threshold maximises the F1 of all images together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runkey.data.index import ClassName, CocoDetection, ImageRecord

MATCH_IOU = 0.5
BINS = 10


@dataclass(frozen=True, slots=True)
class MatchedBox:
    """A detection and its match, for any threshold.

    Matching goes by descending score, so detections below a threshold do not change those above.
    """

    label: int
    """Class index."""
    box_xywh: tuple[float, float, float, float]
    score: float
    target: int
    """Index of the matched box in the record, which no better detection has matched; -1: none."""
    iou: float
    """With the matched box; 0 without one."""

    @property
    def right(self) -> bool:
        """Whether it matches an object of its class."""
        return self.target >= 0


@dataclass(frozen=True, slots=True)
class ImageScore:
    """One image's detections above the threshold, against its ground truth."""

    record: ImageRecord
    shown: tuple[MatchedBox, ...]
    """By descending score, without those in a crowd region of their class."""

    @property
    def found(self) -> tuple[bool, ...]:
        """For each box of the record, whether a detection matches it; False for crowds."""
        taken = {box.target for box in self.shown}
        return tuple(place in taken for place in range(len(self.record.labels)))

    @property
    def mean_iou(self) -> float:
        """Mean IoU of the matches; 0 without any."""
        ious = [box.iou for box in self.shown if box.right]
        return sum(ious) / len(ious) if ious else 0.0

    @property
    def objects(self) -> int:
        """Number of objects in the ground truth, without crowds."""
        return len(self.record.objects())

    @property
    def right(self) -> int:
        """Number of detections that match an object."""
        return sum(box.right for box in self.shown)

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
    detections: tuple[MatchedBox, ...]
    """Those of any score, without those in a crowd region of their class."""


def judge_images(
    records: list[ImageRecord],
    classes: list[ClassName],
    results: list[CocoDetection],
    threshold: float | None = None,
) -> Judgement:
    """Match the detections of every image, given in COCO's results format, with its objects.

    `threshold`: the score threshold; None: the one that maximises the F1 of these images.
    """
    label_of = {c.id: c.index for c in classes}
    by_image: dict[int, list[CocoDetection]] = defaultdict(list)
    for found in results:
        by_image[found["image_id"]].append(found)
    matches = [_match(record, by_image[record.id], label_of) for record in records]
    every = [box for of_image in matches for box in of_image]
    if threshold is None:
        threshold = _best_threshold(every, sum(len(record.objects()) for record in records))
    scored = [
        ImageScore(record, tuple(box for box in of_image if box.score >= threshold))
        for record, of_image in zip(records, matches, strict=True)
    ]
    return Judgement(tuple(scored), threshold, tuple(every))


def rank_images(scores: Sequence[ImageScore], *, best: bool) -> list[ImageScore]:
    """Sort images from best to worst, or from worst to best.

    Among equal F1, the higher mean IoU comes first among the best, and more faults first among the
    worst; then the lower image id.
    """
    if best:
        return sorted(scores, key=lambda s: (-s.f1, -round(s.mean_iou, 6), s.record.id))
    return sorted(scores, key=lambda s: (s.f1, -s.missed - s.false, s.record.id))


def _overlaps(
    boxes_xywh: Sequence[Sequence[float]],
    others_xywh: Sequence[Sequence[float]],
    crowd: Sequence[bool],
) -> NDArray[np.float64]:
    """IoU of each pair, [n, m]; for a crowd, the part of the box that lies in it."""
    from pycocotools.mask import iou  # here, as the report of a run is drawn without it

    shape = (len(boxes_xywh), len(others_xywh))
    if 0 in shape:
        return np.zeros(shape)
    boxes, others = (np.array(some, dtype=np.float64) for some in (boxes_xywh, others_xywh))
    overlaps: NDArray[np.float64] = iou(boxes, others, crowd)
    return overlaps


def _match(
    record: ImageRecord, results: list[CocoDetection], label_of: dict[int, int]
) -> list[MatchedBox]:
    """Match greedily by descending score, as COCO does; drop detections in a crowd."""
    results = sorted(results, key=lambda found: -found["score"])
    overlaps = _overlaps([found["bbox"] for found in results], record.boxes_xywh, record.crowd)
    crowd = np.array(record.crowd, dtype=bool)
    labels = np.array(record.labels, dtype=np.int64)
    free = ~crowd
    matches = []
    for found, overlap in zip(results, overlaps, strict=True):
        label = label_of[found["category_id"]]
        fits = (labels == label) & (overlap >= MATCH_IOU)
        target, iou = -1, 0.0
        if (fits & free).any():
            target = int(np.argmax(np.where(fits & free, overlap, -1)))
            free[target], iou = False, float(overlap[target])
        elif (fits & crowd).any():
            continue
        left, top, width, height = found["bbox"]
        box = (left, top, width, height)
        matches.append(MatchedBox(label, box, found["score"], target, iou))
    return matches


def _best_threshold(matches: list[MatchedBox], objects: int) -> float:
    """Return the highest score that maximises F1 = 2 right / (shown + objects)."""
    if not matches:
        return 0.0
    scores = np.array([box.score for box in matches])
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum([matches[i].right for i in order])
    f1 = 2 * right / (np.arange(1, len(order) + 1) + objects)
    # A threshold shows all detections of its score, so only the last of equal scores counts.
    descending = scores[order]
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
    record, background = image.record, len(counts) - 1
    rows = zip(image.found, record.crowd, record.labels, record.boxes_xywh, strict=True)
    missed = [(label, box) for found, crowd, label, box in rows if not (found or crowd)]
    false = [box for box in image.shown if not box.right]
    for shown in image.shown:
        counts[shown.label if shown.right else background, shown.label] += 1
    for label, _ in missed:
        counts[label, background] += 1
    overlaps = _overlaps(
        [shown.box_xywh for shown in false], [box for _, box in missed], [False] * len(missed)
    )
    while overlaps.size and overlaps.max() >= MATCH_IOU:
        d, o = np.unravel_index(np.argmax(overlaps), overlaps.shape)
        detected, true = false[d].label, missed[o][0]
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
    shown = [d for d in judged.detections if d.score >= least_score]
    scores = np.array([d.score for d in shown], dtype=np.float64)
    right = np.array([d.right for d in shown], dtype=np.float64)
    bin_of = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(bin_of, minlength=BINS)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        means = (np.bincount(bin_of, values, BINS) / counts for values in (scores, right))
        return Calibration(counts, *means)
