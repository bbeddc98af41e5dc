"""COCO metrics, the same bits as pycocotools', which `runkey.evaluation.cross_check` compares.

    result = evaluate_results(records, classes, found)
    result.summary["AP"], result.per_class[0].ap50

The ground truth comes from the index, in original pixels and category ids.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from runkey.data.index import ClassName, ImageRecord
from runkey.evaluation.detections import DetectionArrays
from runkey.evaluation.intervals import ClassMatches
from runkey.evaluation.matching import (
    Flags,
    Floats,
    Integers,
    ObjectArrays,
    find_pairs,
    match_greedily,
    place_in_run,
)

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
RECALLS: Floats = np.linspace(0, 1, 101)
AREA_LIMITS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
"""Smallest and largest area of all objects, and of those of each of `SIZES`, in pixels."""
MAX_DETECTIONS = (1, 10, 100)
"""How many detections of a class in an image count."""
SIZES = ("small", "medium", "large")
"""COCO's: areas up to 32 x 32 pixels, up to 96 x 96, and above."""
SUMMARY_NAMES = (
    *("AP", "AP50", "AP75", *(f"AP_{size}" for size in SIZES)),
    *("AR_1", "AR_10", "AR_100", *(f"AR_{size}" for size in SIZES)),
)
"""In the order of `COCOeval.stats`."""


@dataclass(frozen=True, slots=True)
class SizeResult:
    """Metrics of one class among objects of one size."""

    objects: int
    """Number of objects in the ground truth, without crowd regions; each counts in one size."""
    ap: float | None
    """AP averaged over IoU 0.50 to 0.95, 0..1; None without such an object. COCO's, which judges
    an object of exactly 32 x 32 or 96 x 96 pixels in both sizes."""


@dataclass(frozen=True, slots=True)
class ClassResult:
    """Metrics of one class, 0..1; None where the ground truth has no object of it."""

    name: str
    category_id: int
    objects: int
    """Number of objects in the ground truth, without crowd regions."""
    ap: float | None
    """AP averaged over IoU 0.50 to 0.95."""
    ap50: float | None
    ar: float | None
    """Recall averaged over IoU 0.50 to 0.95, at most 100 detections per image."""
    by_size: dict[str, SizeResult]
    """By `SIZES`."""


@dataclass(frozen=True, slots=True)
class CocoResult:
    """Metrics and curves of one set of detections."""

    summary: dict[str, float | None]
    """The twelve metrics by `SUMMARY_NAMES`, 0..1; None where nothing of that size exists."""
    per_class: tuple[ClassResult, ...]
    """In the order of the class list."""
    iou_thresholds: NDArray[np.float64]
    """[T]: 0.50, 0.55, ... 0.95."""
    recalls: NDArray[np.float64]
    """[R]: 0.00, 0.01, ... 1.00, at which precision is given."""
    precision: NDArray[np.float64]
    """[K, T, R]: largest precision at that recall or beyond; NaN for a class without objects."""
    matches: tuple[ClassMatches, ...]
    """Of each class, from which `runkey.evaluation.intervals` computes how sure the metrics are."""


@dataclass(frozen=True, slots=True, eq=False)
class CocoArrays:
    """Precision and recall as COCOeval has them, with classes by category id; -1: undefined."""

    precision: Floats
    """[T, R, K, A] with at most 100 detections."""
    recall: Floats
    """[T, K, A, D] for each of `MAX_DETECTIONS`."""

    def summary(self) -> dict[str, float | None]:
        """Average the twelve metrics, by `SUMMARY_NAMES`; None where nothing of a size exists.

        Numbers are added in the order of COCOeval's arrays, as rounding depends on it.
        """
        precision, recall = self.precision, self.recall
        of_iou = [precision[iou == IOU_THRESHOLDS, ..., 0] for iou in (0.5, 0.75)]
        parts = [precision[..., 0], *of_iou, *(precision[..., a] for a in (1, 2, 3))]
        parts += [recall[..., 0, d] for d in range(len(MAX_DETECTIONS))]
        parts += [recall[..., a, -1] for a in (1, 2, 3)]
        return dict(zip(SUMMARY_NAMES, map(_mean, parts), strict=True))


def evaluate_results(
    records: Sequence[ImageRecord], classes: Sequence[ClassName], found: DetectionArrays
) -> CocoResult:
    """Compare all detections, without a score threshold, with the ground truth of `records`."""
    judged = _judge(records, classes, found)
    arrays, matches = _accumulate(judged), _collect(judged)
    order = _places(classes)
    precision = arrays.precision[..., order, 0].transpose(2, 0, 1)
    return CocoResult(
        summary=arrays.summary(),
        per_class=class_results(arrays, records, classes),
        iou_thresholds=IOU_THRESHOLDS,
        recalls=RECALLS,
        precision=np.where(precision < 0, np.nan, precision),
        matches=tuple(matches[k] for k in order),
    )


def class_results(
    arrays: CocoArrays, records: Sequence[ImageRecord], classes: Sequence[ClassName]
) -> tuple[ClassResult, ...]:
    """Average the metrics of each class, in the order of the class list."""
    order = _places(classes)
    by_area = arrays.precision[:, :, order].transpose(3, 2, 0, 1)  # [A, K, T, R]
    recall = arrays.recall[:, order, 0, -1].T
    found = [(label, area) for record in records for _, label, area in record.objects()]
    # COCO judges an area at a limit (32 x 32) in both sizes; here it counts in the smaller one.
    limits = [most for _, most in AREA_LIMITS[1:-1]]
    sizes = [Counter(label for label, _ in found), *(Counter[int]() for _ in SIZES)]
    for label, area in found:
        sizes[1 + bisect_left(limits, area)][label] += 1
    return tuple(
        ClassResult(
            name=c.name,
            category_id=c.id,
            objects=sizes[0][k],
            ap=_mean(by_area[0, k]),
            ap50=_mean(by_area[0, k, 0]),
            ar=_mean(recall[k]),
            by_size={
                name: SizeResult(sizes[a][k], _mean(by_area[a, k]))
                for a, name in enumerate(SIZES, start=1)
            },
        )
        for k, c in enumerate(classes)
    )


def _places(classes: Sequence[ClassName]) -> list[int]:
    """Return the place of each class by category id, as COCOeval sorts them."""
    place = {category: k for k, category in enumerate(sorted(c.id for c in classes))}
    return [place[c.id] for c in classes]


def _mean(values: Floats) -> float | None:
    """Average the values that are defined."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else None


# --- matching and accumulation; from here on classes are by category id, and images by id


@dataclass(frozen=True, slots=True, eq=False)
class _Judged:
    """D detections by class, then descending score, then image; M of them overlap an object."""

    found: DetectionArrays
    ranks: Integers
    """[D]: how many detections of the class in the image are better."""
    starts: Integers
    """[K + 1]: where each class starts."""
    inside: Flags
    """[D, A]: whether the area is in each range; if not, no match means nothing."""
    places: Integers
    """[M]: indices of those that overlap, rising."""
    matched: Flags
    """[M, A, T]."""
    right: Flags
    """[M, A, T]: matched with an object that is not ignored."""
    objects: Integers
    """[K, A]: number of objects that are not ignored."""
    objects_by_image: Integers
    """[K, I], of all sizes."""


def _judge(
    records: Sequence[ImageRecord], classes: Sequence[ClassName], found: DetectionArrays
) -> _Judged:
    """Match the best hundred detections of each image and class."""
    records = sorted(records, key=lambda record: record.id)
    ids, count = np.array([record.id for record in records], dtype=np.int64), len(classes)
    place = np.array(_places(classes), dtype=np.int64)
    if not np.isin(found.ids, ids).all():
        raise ValueError(f"detections in unknown images: {np.setdiff1d(found.ids, ids)[:5]}")
    images = np.searchsorted(ids, found.ids)[found.images]
    found = _sort(replace(found, images=images, labels=place[found.labels]), count)
    by_image = _stable_order(found.images, len(ids))
    groups = (found.images * count + found.labels)[by_image]
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[by_image] = place_in_run(groups)
    keep = ranks < MAX_DETECTIONS[-1]
    if not keep.all():
        kept = keep[by_image]
        by_image, groups = (np.cumsum(keep) - 1)[by_image[kept]], groups[kept]
        found, ranks = found.keep(keep), ranks[keep]
    objects = ObjectArrays.from_records(records)
    wanted = objects.images * count + place[objects.labels]
    boxes_xywh = found.boxes_xywh[by_image]
    pairs = find_pairs(groups, boxes_xywh, objects, wanted, IOU_THRESHOLDS[0])
    ignored = objects.crowd[:, None] | ~_inside(objects.areas)
    matches = match_greedily(pairs, groups, IOU_THRESHOLDS, ignored, objects.crowd)
    order = np.argsort(by_image[matches.detections])
    chosen = matches.pairs[order]
    matched, right = chosen >= 0, np.zeros(chosen.shape, dtype=bool)
    area = np.nonzero(matched)[1]
    right[matched] = ~ignored[pairs.objects[chosen[matched]], area]
    labels = place[objects.labels]
    counts = [np.bincount(labels[one], minlength=count) for one in ~ignored.T]
    cells = (labels * len(ids) + objects.images)[~ignored[:, 0]]
    return _Judged(
        found=found,
        ranks=ranks,
        starts=np.searchsorted(found.labels, np.arange(count + 1)),
        inside=_inside(found.boxes_xywh[:, 2] * found.boxes_xywh[:, 3]),
        places=by_image[matches.detections[order]],
        matched=matched,
        right=right,
        objects=np.stack(counts, axis=1),
        objects_by_image=np.bincount(cells, minlength=count * len(ids)).reshape(count, -1),
    )


def _sort(found: DetectionArrays, classes: int) -> DetectionArrays:
    """Sort by class, then descending score, then image; equal ones stay as they are."""
    order = np.argsort(found.images, kind="stable")
    order = order[np.argsort(-found.scores[order], kind="stable")]
    return found.keep(order[_stable_order(found.labels[order], classes)])


def _stable_order(values: Integers, most: int) -> Integers:
    """Return the order that sorts values below `most`; numpy sorts 16 bits in linear time."""
    return np.argsort(values.astype(np.uint16) if most <= 2**16 else values, kind="stable")


def _inside(areas: Floats) -> Flags:
    """[n, A]: whether areas [n] are in each range."""
    least, most = np.array(AREA_LIMITS).T
    inside: Flags = (areas[:, None] >= least) & (areas[:, None] <= most)
    return inside


def _accumulate(judged: _Judged) -> CocoArrays:
    """Compute precision and recall, as COCOeval does, of all classes at once.

    Only right detections are corners of the curve: the others lie below, or have the same value.
    """
    objects = judged.objects
    ious, ranges = len(IOU_THRESHOLDS), len(AREA_LIMITS)
    precision = np.full((ious, len(RECALLS), *objects.shape), -1.0)
    recall = np.full((ious, *objects.shape, len(MAX_DETECTIONS)), -1.0)
    for a in range(ranges):
        known = objects[:, a] > 0
        shown = np.concatenate([[0], np.cumsum(judged.inside[:, a])])
        needed = np.array([_needed(count) for count in objects[:, a].tolist()])
        for t in range(ious):
            hit = judged.matched[:, a, t]
            places, right = judged.places[hit], judged.right[hit, a, t]
            # What counts up to and with each: inside the range, or right; but not if ignored.
            more = np.cumsum(right.astype(np.int64) - judged.inside[places, a])
            seen = shown[places + 1] + more
            before = shown[judged.starts]
            before = before + np.append(0, more)[np.searchsorted(places, judged.starts)]
            corners = places[right]
            starts = np.searchsorted(corners, judged.starts)
            counts = np.diff(starts)
            label = np.repeat(np.arange(len(known)), counts)
            tp = np.arange(len(corners)) - starts[label] + 1
            each = tp / ((seen[right] - before[label]) + np.spacing(1))
            precision[t, :, known, a] = _envelope(each, starts, needed)[known]
            for d, most in enumerate(MAX_DETECTIONS):
                among = label[judged.ranks[corners] < most]
                found = np.bincount(among, minlength=len(known))[known]
                recall[t, known, a, d] = found / objects[known, a]
    return CocoArrays(precision, recall)


def _needed(objects: int) -> Integers:
    """[R]: how many of the objects must be found to reach each recall, less one."""
    found: Integers = np.searchsorted(np.arange(1, objects + 1) / max(1, objects), RECALLS)
    return found


def _envelope(each: Floats, starts: Integers, needed: Integers) -> Floats:
    """[K, R]: largest precision at or beyond each recall; 0 where it is not reached.

    Args:
        each: [C] precision with each right detection, class by class.
        starts: [K + 1] where each class starts.
        needed: [K, R] see `_needed`.
    """
    ends = starts[1:, None]
    first = np.minimum(starts[:-1, None] + needed, ends)
    cuts = np.concatenate([first, ends], axis=1)
    largest = np.maximum.reduceat(np.append(each, 0.0), cuts.ravel())
    largest = np.where(first < ends, largest.reshape(cuts.shape)[:, :-1], 0.0)
    return np.maximum.accumulate(largest[:, ::-1], axis=1)[:, ::-1]


def _collect(judged: _Judged) -> list[ClassMatches]:
    """Collect each class's matches among objects of all sizes."""
    outside, places = ~judged.inside[:, 0], judged.places
    right = np.zeros((len(IOU_THRESHOLDS), len(outside)), dtype=bool)
    right[:, places] = judged.right[:, 0].T
    ignored = np.repeat(outside[None], len(right), axis=0)
    ignored[:, places] = np.where(judged.matched[:, 0].T, ~right[:, places], outside[places])
    parts = [slice(*ends) for ends in pairwise(judged.starts.tolist())]
    return [
        ClassMatches(
            images=judged.found.images[part],
            scores=judged.found.scores[part],
            right=right[:, part],
            ignored=ignored[:, part],
            objects=judged.objects_by_image[k],
        )
        for k, part in enumerate(parts)
    ]
