"""Detect small objects in large images: run the model on overlapping tiles, merge what it finds.

An object of at most `overlap` pixels is whole in at least one tile. Larger objects are taken from a
view of the whole image, in which they are large enough. As in slicing aided inference (Akyon et al.
2022), but a box that a tile's edge cuts gives way to the box of a view that has the object whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runkey.errors import DataError

Rectangle = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the image."""

_PHOTOGRAPH = 4 / 3
SMALLEST = 32
"""Least pixels of a tile's side."""
MERGE_IOU = 0.5
"""Boxes of one class from two views that overlap more are one object."""
_EDGE = 0.01
"""A box ends at a tile's edge if it is nearer to it than this fraction of the tile's side."""
_COVERED = 0.6
"""Fraction of a cut box that the whole box of another view covers, if both are of one object."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles of an image, in its own pixels."""

    width: int
    height: int
    overlap: float = 0.2
    """Fraction of their side that neighbours share."""

    def __post_init__(self) -> None:
        if min(self.width, self.height) < SMALLEST:
            raise DataError(f"--tile {self.width}x{self.height}: at least {SMALLEST} pixels")
        if not 0 <= self.overlap <= 0.75:
            raise DataError(f"--overlap {self.overlap:g}: from 0 to 0.75 of a tile's side")

    @property
    def shared(self) -> int:
        """Return the pixels that neighbours share at least."""
        return int(min(self.width, self.height) * self.overlap)

    def views(self, height: int, width: int) -> list[Rectangle]:
        """Return the whole image, then its tiles; only the image if it is no larger than a tile.

        All tiles have one size; they are spread evenly, so that the last ends at the image's edge.
        """
        whole = (0, 0, width, height)
        tiles = [
            (left, top, min(left + self.width, width), min(top + self.height, height))
            for top in self._starts(height, self.height)
            for left in self._starts(width, self.width)
        ]
        return [whole] if tiles == [whole] else [whole, *tiles]

    def _starts(self, length: int, side: int) -> Iterator[int]:
        """Return where the tiles of a row or column begin."""
        stride = side - int(side * self.overlap)
        steps = max(0, -(-(length - side) // stride))
        for number in range(steps + 1):
            yield round(number * max(0, length - side) / max(1, steps))


def parse_tiling(text: str, overlap: float, short_side: int, long_side: int) -> Tiling:
    """Parse `WIDTHxHEIGHT`, or the width alone.

    A detector finds objects best in images of the shape that it was trained on. Most photographs
    are 4:3, which is the shape if only the width is given; it is squarer if the model's sizes are.

    Args:
        text: in pixels.
        overlap: see `Tiling`.
        short_side: of the model's images, see `Sizes`.
        long_side: bound of the other side.

    Raises:
        DataError: it is neither, or too small.
    """
    width, cross, height = text.lower().partition("x")
    try:
        if cross:
            return Tiling(int(width), int(height), overlap)
        shape = min(max(long_side / short_side, 1.0), _PHOTOGRAPH)
        return Tiling(int(width), round(int(width) / shape), overlap)
    except ValueError:
        raise DataError(f"--tile {text}: pixels, such as 640 or 640x480") from None


@dataclass(frozen=True, slots=True)
class ViewDetections:
    """What the model finds in a view of an image."""

    view: Rectangle
    scores: NDArray[np.float32]
    """[n] in 0..1."""
    labels: NDArray[np.int64]
    """[n], class indices."""
    boxes_xyxy: NDArray[np.float32]
    """[n, 4], fractions of the view's width and height."""


def merge_views(
    found: Sequence[ViewDetections],
    size: tuple[int, int],
    tiling: Tiling,
    limits: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """Merge the detections of an image's views, the first of which is the whole image.

    Of the whole image, boxes that fit into what neighbours share are left to the tiles. A box that
    ends at an edge inside the image is dropped if an uncut box of its class covers it. Of boxes of
    one class that overlap by more than `MERGE_IOU` and come from two views, the best stays.

    Args:
        found: of each view.
        size: (height, width) of the image.
        tiling: of the views.
        limits: [K], least score of each class.

    Returns:
        Scores [n], descending; labels [n]; boxes xyxy [n, 4] in pixels of the image.
    """
    if len(found) == 1:
        (one,) = found
        frame = np.array([size[1], size[0]] * 2, dtype=np.float32)
        keep = one.scores >= limits[one.labels]
        return one.scores[keep], one.labels[keep], one.boxes_xyxy[keep] * frame
    scores, labels, boxes, views, cut = [], [], [], [], []
    for number, one in enumerate(found):
        left, top, right, bottom = one.view
        sides = np.array([right - left, bottom - top] * 2, dtype=np.float32)
        placed = one.boxes_xyxy * sides + np.array([left, top] * 2, dtype=np.float32)
        keep = one.scores >= limits[one.labels]
        if number == 0:
            keep &= (placed[:, 2:] - placed[:, :2]).max(1, initial=0) > tiling.shared
        scores.append(one.scores[keep])
        labels.append(one.labels[keep])
        boxes.append(placed[keep])
        views.append(np.full(int(keep.sum()), number))
        cut.append(_is_cut(one.view, one.boxes_xyxy, size)[keep])
    order = np.argsort(-np.concatenate(scores), kind="stable")
    ordered = [np.concatenate(parts)[order] for parts in (scores, labels, boxes, views, cut)]
    kept = _merged(*ordered[1:])
    return ordered[0][kept], ordered[1][kept], ordered[2][kept]


def _is_cut(
    view: Rectangle, boxes_xyxy: NDArray[np.float32], size: tuple[int, int]
) -> NDArray[np.bool_]:
    """Return which boxes [n, 4] (fractions of the view) end at an edge of it inside the image."""
    left, top, right, bottom = view
    inner = np.array([left > 0, top > 0, right < size[1], bottom < size[0]])
    distances = np.where([True, True, False, False], boxes_xyxy, 1 - boxes_xyxy)
    is_cut: NDArray[np.bool_] = ((distances < _EDGE) & inner).any(1)
    return is_cut


def _merged(
    labels: NDArray[np.int64],
    boxes: NDArray[np.float32],
    views: NDArray[np.int64],
    cut: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """Return the rows that stay, of boxes [n, 4] by descending score."""
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    # Only boxes of one class and of neighbouring views can be the same object: compare few pairs.
    stays = np.ones(len(boxes), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.argsort(boxes[rows, 0], kind="stable")]
        starts = boxes[rows, 0]
        drop: set[int] = set()
        pairs = []
        for at, row in enumerate(rows):
            end = int(np.searchsorted(starts, boxes[row, 2], side="right"))
            others = rows[at + 1 : end]
            if not len(others):
                continue
            shared = _shared(boxes[row], boxes[others])
            near = (shared > 0) & (views[others] != views[row])
            pairs += [
                (int(row), int(other), float(area))
                for other, area in zip(others[near], shared[near], strict=True)
            ]
        for one, other, shared_area in pairs:
            for mine, whole in ((one, other), (other, one)):
                if cut[mine] and not cut[whole] and shared_area > _COVERED * areas[mine]:
                    drop.add(mine)
        # Greedy, as in non-maximum suppression: the rows are ordered by score.
        rivals: dict[int, list[int]] = {}
        for one, other, shared_area in pairs:
            union = areas[one] + areas[other] - shared_area
            if shared_area > MERGE_IOU * union:
                better, worse = min(one, other), max(one, other)
                rivals.setdefault(better, []).append(worse)
        for best in sorted(map(int, rows)):
            if best not in drop:
                drop.update(rivals.get(best, ()))
        stays[list(drop)] = False
    return np.flatnonzero(stays)


def _shared(box: NDArray[np.float32], boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the area that a box [4] shares with each of `boxes` [n, 4]."""
    low = np.maximum(box[:2], boxes[:, :2])
    high = np.minimum(box[2:], boxes[:, 2:])
    shared: NDArray[np.float32] = np.clip(high - low, 0, None).prod(1)
    return shared
