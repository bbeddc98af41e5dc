"""Greedy matching of detections with objects, as COCO does it, on arrays.

Within an image and a class, detections choose in descending score: each takes the object of largest
IoU at or above the threshold that no better one has taken. Objects that are ignored (crowd regions,
other sizes) are taken only where no other object fits; a crowd region may be taken again and again.

Only pairs of at least the lowest threshold are looked at. The first detections of all images and
classes choose at once, at all thresholds and in all area ranges; then the second ones, and so on.
Sums and products are in the order of pycocotools' C code, so that IoUs are the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.data.index import ImageRecord

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

_PAIRS = 200_000
"""Pairs that are worked on at a time, which bounds the memory."""
_CELLS = 2_000_000
"""Pairs times thresholds times area ranges that are worked on at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class ObjectArrays:
    """The G objects and crowd regions of I images, image by image in the order of their records."""

    images: Integers
    """[G] index of each object's image."""
    labels: Integers
    """[G]."""
    areas: Floats
    """[G]."""
    crowd: Flags
    """[G]."""
    boxes_xywh: Floats
    """[G, 4]."""

    @classmethod
    def from_records(cls, records: Sequence[ImageRecord]) -> ObjectArrays:
        """Join the objects of records."""
        count = sum(len(one.labels) for one in records)

        def joined(name: str, kind: Any) -> NDArray[Any]:
            values = chain.from_iterable(getattr(one, name) for one in records)
            return np.fromiter(values, kind, count)

        return cls(
            images=np.repeat(np.arange(len(records)), [len(one.labels) for one in records]),
            labels=joined("labels", np.int64),
            areas=joined("areas", np.float64),
            crowd=joined("crowd", np.bool_),
            boxes_xywh=joined("boxes_xywh", np.dtype((np.float64, 4))).reshape(-1, 4),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """P pairs of a detection and an object of its image and class that overlap.

    By detection, in the order in which detections choose; those of one by rising IoU.
    """

    detections: Integers
    """[P]."""
    objects: Integers
    """[P]."""
    ious: Floats
    """[P]; of a crowd region, the part of the detection that lies in it."""


def box_iou(boxes_xywh: Floats, others_xywh: Floats, crowd: Flags) -> Floats:
    """Compute the IoU of n pairs [n, 4]; with a crowd region, the part of the first in it."""
    left, top, width, height = boxes_xywh.T
    x, y, w, h = others_xywh.T
    across = np.minimum(width + left, w + x) - np.maximum(left, x)
    along = np.minimum(height + top, h + y) - np.maximum(top, y)
    shared, area = across * along, width * height
    union = np.where(crowd, area, area + w * h - shared)
    ious = np.zeros(len(shared))
    np.divide(shared, union, out=ious, where=(across > 0) & (along > 0))
    return ious


def find_pairs(
    groups: Integers,
    boxes_xywh: Floats,
    objects: ObjectArrays,
    object_groups: Integers,
    least_iou: float,
    *,
    first_of_equal: bool = False,
) -> Pairs:
    """Find all pairs of at least `least_iou`.

    Args:
        groups: [D] number of each detection's image and class, rising; the detections of a group in
            the order in which they choose.
        boxes_xywh: [D, 4].
        objects: all objects.
        object_groups: [G] as `groups`.
        least_iou: of a pair.
        first_of_equal: of objects of equal IoU choose the first one, not the last as COCO does.
    """
    by_group = np.argsort(object_groups, kind="stable")
    sorted_groups = object_groups[by_group]
    low = np.searchsorted(sorted_groups, groups)
    count = np.searchsorted(sorted_groups, groups, side="right") - low
    some = np.flatnonzero(count)
    low, count = low[some], count[some]
    found: list[tuple[Integers, Integers, Floats]] = []
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    bounds = np.searchsorted(ends, np.arange(_PAIRS, total + _PAIRS, _PAIRS), side="left") + 1
    for part in np.split(np.arange(len(some)), np.unique(np.minimum(bounds, len(some)))):
        times = count[part]
        within = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        which = by_group[np.repeat(low[part], times) + within]
        detection = np.repeat(some[part], times)
        ious = box_iou(boxes_xywh[detection], objects.boxes_xywh[which], objects.crowd[which])
        near = ious >= least_iou
        found.append((detection[near], which[near], ious[near]))
    detections, which, ious = (np.concatenate(parts) for parts in zip(*found, strict=True))
    place = -which if first_of_equal else which
    order = np.lexsort((place, ious, detections))
    return Pairs(detections[order], which[order], ious[order])


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """What M detections that overlap an object match, at T IoU thresholds in A area ranges."""

    detections: Integers
    """[M], rising."""
    pairs: NDArray[np.int32]
    """[M, A, T]: index of the pair; -1: none."""


def match_greedily(
    pairs: Pairs, groups: Integers, thresholds: Floats, ignored: Flags, crowd: Flags
) -> Matches:
    """Match detections with objects, see the top of this file.

    Args:
        pairs: of at least the lowest threshold.
        groups: [D] number of each detection's image and class.
        thresholds: [T] least IoU of a match, rising.
        ignored: [G, A] objects that are ignored in each area range.
        crowd: [G].
    """
    starts = np.flatnonzero(np.diff(pairs.detections, prepend=-1))
    counts = np.diff(starts, append=len(pairs.detections))
    detections = pairs.detections[starts]
    shape = (ignored.shape[1], len(thresholds))
    chosen = np.full((len(detections), *shape), -1, dtype=np.int32)
    taken = np.zeros((len(ignored), *shape), dtype=bool)
    turns = place_in_run(groups[detections])
    by_turn = np.argsort(turns, kind="stable")
    cells = np.cumsum(counts[by_turn]) * (shape[0] * shape[1]) // _CELLS
    ends = np.flatnonzero(np.diff(turns[by_turn]) | np.diff(cells)) + 1
    for part in np.split(by_turn, ends) if len(by_turn) else ():
        times = counts[part]
        first = np.cumsum(times) - times
        within = np.arange(times.sum()) - np.repeat(first, times)
        rows = np.repeat(starts[part], times) + within
        which, most = pairs.objects[rows], times.max() + 1
        fits = (pairs.ious[rows, None] >= thresholds)[:, None]
        free = (~taken[which] | crowd[which, None, None]) & fits
        # The last pair has the largest IoU; any one that is not ignored is better than one that is.
        rank = (within + 1)[:, None] + np.where(ignored[which], 0, most)
        best = np.maximum.reduceat(np.where(free, rank[..., None].astype(np.int32), 0), first)
        some = best > 0
        pair = np.where(some, starts[part][:, None, None] + best % most - 1, -1)
        chosen[part] = pair
        _, area, threshold = np.nonzero(some)
        taken[pairs.objects[pair[some]], area, threshold] = True
    return Matches(detections, chosen)


def place_in_run(values: Integers) -> Integers:
    """[n]: how many equal values there are right before each."""
    starts = np.diff(values, prepend=values[:1] - 1) != 0
    places = np.arange(len(values))
    return places - np.maximum.accumulate(np.where(starts, places, 0))
