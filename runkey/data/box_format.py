"""What boxes tell about their format: units, order of the numbers, and the image they are made for.

Each function looks at all boxes of an image or of a JSON, so that a single odd box decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Size = tuple[float, float]
"""(width, height), pixels."""

_ROUNDING = 0.05
"""Fraction of the image's size by which boxes may reach over it and still fit."""
_NEARLY_ALL = 0.95
_SAME_PIXELS, _SAME_IOU = 0.5, 0.9
"""Boxes of one object written twice: their edges differ by at most so much."""
_FEWEST_AREAS = 10
_CHANCE = 1e-9
"""Boxes are in percent if by chance so few data sets would have all of them in that corner."""
_LEAST_SPREAD = 1 / 16
"""Standard deviation of the boxes' centres, as a fraction of the unit: less is a fixed place."""
_FAR_LARGER = 1.8
"""Side of an image / unit; boxes in pixels, spread so around the side's middle, reach over it."""


def is_finite(value: Any) -> bool:
    """Return True for a finite number that is no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int larger than any float
        return False


def sound_boxes(bboxes: Sequence[list[Any]]) -> list[list[float]]:
    """Return the boxes (xywh) that are four finite numbers, with sides above 0."""
    return [box for box in bboxes if all(map(is_finite, box)) and min(box[2:]) > 0]


def fits(boxes: Sequence[Sequence[float]], frame: Size) -> bool:
    """Return True if nearly all boxes (xywh) lie in an image of that size, about."""
    width, height = frame
    slack_x, slack_y = 1 + _ROUNDING * width, 1 + _ROUNDING * height
    inside = sum(
        x >= -slack_x and y >= -slack_y and x + w <= width + slack_x and y + h <= height + slack_y
        for x, y, w, h in boxes
    )
    return inside >= _NEARLY_ALL * len(boxes)


@dataclass(frozen=True, slots=True)
class SizeFault:
    """What is wrong with an image's size in the JSON, and what `fix` does about it."""

    what: str
    fixed: str = ""
    """Empty: its boxes cannot be repaired."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Of boxes from the JSON's size to the file's, in x and y."""


def compare_sizes(frame: Size, stated: Size, boxes: Sequence[Sequence[float]]) -> SizeFault | None:
    """Compare an image's size with the JSON's, and decide by its boxes what repairs them."""
    if frame == stated:
        return None
    scale = (frame[0] / stated[0], frame[1] / stated[1])
    what = f"is {frame[0]:g}x{frame[1]:g}, but {stated[0]:g}x{stated[1]:g} in the JSON"
    kept = "the file's size taken, boxes kept, as they fit it"
    # Both sizes are whole pixels, so the factors of one resizing differ by that rounding.
    rounding = max(1.0, scale[0]) / stated[0] + max(1.0, scale[1]) / stated[1]
    in_file, in_stated = fits(boxes, frame), fits(boxes, stated)
    if abs(scale[0] - scale[1]) <= rounding:
        if in_stated or not in_file:
            return SizeFault(what, f"boxes scaled by {scale[0]:.6g} and {scale[1]:.6g}", scale)
        return SizeFault(f"{what}, whose boxes fit the file alone", kept)
    swapped = frame == stated[::-1]
    what += ", with width and height swapped" if swapped else ", of another shape"
    if in_file and (swapped or not boxes or not in_stated):
        return SizeFault(what, kept)
    return SizeFault(f"{what}, so that its boxes cannot be scaled")


def contradicts(stated: Size, boxes: Sequence[Sequence[float]]) -> bool:
    """Return True if the boxes fit the JSON's size only with width and height swapped."""
    return bool(boxes) and not fits(boxes, stated) and fits(boxes, stated[::-1])


def fractions_of_size(boxes_xywh: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which boxes [N, 4] have only numbers between 0 and 1, up to rounding."""
    inside: NDArray[np.bool_] = ((boxes_xywh > -_ROUNDING) & (boxes_xywh < 1 + _ROUNDING)).all(1)
    return inside


def whole_of_unit(
    boxes_xywh: NDArray[np.float64], sizes: NDArray[np.float64], images: NDArray[np.int64]
) -> int:
    """Return 100 or 1000 if that is the image's whole size in these boxes; 0 if they are pixels.

    Nearly all boxes lie within that unit, in so many far larger images that chance does not explain
    it, and not at one place, as a logo or a gauge would. Images of 1024 or 1280 pixels are no sign
    of thousandths: objects are rarely at their right edge.

    Args:
        boxes_xywh: [N, 4], with sides above 0.
        sizes: [N, 2], width and height of each box's image.
        images: [N], the image of each box.
    """
    low, high = boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]
    own = sizes[np.unique(images, return_index=True)[1]]
    for unit in (100, 1000):
        slack = unit * _ROUNDING / 10
        inside = ((low >= -slack) & (high <= unit + slack)).all(1)
        by_chance = np.log(unit / own[own >= _FAR_LARGER * unit]).sum()
        if inside.mean() < _NEARLY_ALL or by_chance > math.log(_CHANCE):
            continue
        if ((low + high)[inside] / 2).std(0).min() > _LEAST_SPREAD * unit:
            return unit
    return 0


def common_part(areas: NDArray[np.float64], boxes_xywh: NDArray[np.float64]) -> float | None:
    """Return area / (width x height) if it is the same small number for nearly all boxes.

    Areas of masks differ from box to box; those of boxes that were scaled without them do not.
    """
    known = areas > 0
    if known.sum() < _FEWEST_AREAS:
        return None
    parts = areas[known] / boxes_xywh[known, 2:].prod(1)
    low, middle, high = np.quantile(parts, (1 - _NEARLY_ALL, 0.5, _NEARLY_ALL)).tolist()
    return float(middle) if middle < 0.5 and high - low < 0.01 * middle else None


def doubled(
    boxes_xywh: NDArray[np.float64], images: NDArray[np.int64], kinds: NDArray[np.int64]
) -> dict[int, int]:
    """Find boxes that repeat an earlier one of the same image and kind, but for rounding.

    Returns:
        Of each repeated box its row, and the row of the first one.
    """
    first: dict[int, int] = {}
    boxes = boxes_xywh.tolist()
    corners = boxes_xywh[:, :2].clip(-(2.0**40), 2.0**40)
    # Corners that differ by half a pixel share a cell in one of these four grids.
    for shift in ((0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5)):
        x, y = np.floor(corners + shift).astype(np.int64).T
        cells = ((images * 8191 + kinds) * 524287 + x) * 6700417 + y  # wraps around: only a hash
        order = np.argsort(cells, kind="stable")
        changes = np.flatnonzero(np.diff(cells[order])) + 1
        bounds = np.array([0, *changes, len(order)])
        for at in np.flatnonzero(np.diff(bounds) > 1):
            _match(order[bounds[at] : bounds[at + 1]].tolist(), boxes, images, kinds, first)
    return first


def _match(
    cell: list[int],
    boxes: list[list[float]],
    images: NDArray[np.int64],
    kinds: NDArray[np.int64],
    first: dict[int, int],
) -> None:
    """Add the boxes of a cell that repeat one before them, to `first`."""
    distinct: list[int] = []
    for row in cell:
        if row in first:
            continue
        for other in distinct:
            same_kind = images[row] == images[other] and kinds[row] == kinds[other]
            if same_kind and _is_same(boxes[row], boxes[other]):
                first[row] = other
                break
        else:
            distinct.append(row)


def _is_same(box: list[float], other: list[float]) -> bool:
    """Return True if the edges of two boxes (xywh) differ by no more than rounding."""
    x, y, w, h = box
    a, b, c, d = other
    shifts = (x - a, y - b, x + w - a - c, y + h - b - d)
    if max(map(abs, shifts)) > _SAME_PIXELS:
        return False
    shared = max(0.0, min(x + w, a + c) - max(x, a)) * max(0.0, min(y + h, b + d) - max(y, b))
    return shared >= _SAME_IOU * (w * h + c * d - shared)


def likely_cause(boxes_xywh: NDArray[np.float64], sizes: NDArray[np.float64]) -> str:
    """Say why so many boxes [N, 4] do not fit images of these sizes [N, 2]; empty: unknown."""
    if not len(boxes_xywh):
        return ""
    slack = 1.0 + _ROUNDING / 5 * sizes
    low, side = boxes_xywh[:, :2], boxes_xywh[:, 2:]

    def nearly_all(first: NDArray[np.float64], last: NDArray[np.float64], frame: Any) -> bool:
        inside = (first >= -slack) & (last <= frame + slack) & (last > first)
        return bool(inside.all(1).mean() >= _NEARLY_ALL)

    if nearly_all(low, side, sizes):
        return "they fit as corners [left, top, right, bottom]; write [left, top, width, height]"
    if nearly_all(low - side / 2, low + side / 2, sizes):
        return "they fit with [x, y] as their centre; write [left, top, width, height]"
    if nearly_all(low, low + side, sizes[:, ::-1]):
        return (
            "they fit with x and y swapped: the images were turned after labelling, or y was "
            "written first"
        )
    reach = float(np.quantile(((low + side) / sizes).max(1), _NEARLY_ALL))
    if reach > 1.2:
        return (
            f"they reach to {reach:.2g} times the size of the images, which were resized after "
            "labelling, or are others"
        )
    return ""
