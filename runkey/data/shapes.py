"""The shape census: which output sizes the loader can produce, and the worst batch of them.

Read off the index and the parameters alone; no image is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from runkey.data.augment import UNBOUNDED, crop_sides, evaluation_size
from runkey.data.geometry import resized_size
from runkey.data.index import Record
from runkey.params import Data

Shape = tuple[int, int]


def reachable_shapes(data: Data, records: Iterable[Record]) -> set[Shape]:
    """Every (height, width), pixels, that an image of `records` can have in a training batch."""
    sizes = {(record.height, record.width) for record in records}
    augment, shapes = data.augment, set[Shape]()
    if augment.crop_probability < 1.0:
        shapes |= _resized(data, sizes)
    if augment.crop_probability > 0.0:
        shapes |= _resized(data, _crops(data, sizes))
    return shapes


def evaluation_shapes(data: Data, records: Iterable[Record]) -> set[Shape]:
    """Every (height, width), pixels, that an image of `records` has in evaluation."""
    sizes = {(record.height, record.width) for record in records}
    return {evaluation_size(data, *size) for size in sizes}


def _crops(data: Data, sizes: set[Shape]) -> set[Shape]:
    """Every (height, width) that the random crop can cut out of images of `sizes`."""
    ranges = set()
    for size in sizes:
        for short_side in data.augment.crop_short_sides:
            height, width = resized_size(*size, short_side, UNBOUNDED)
            ranges.add((crop_sides(data.augment, height), crop_sides(data.augment, width)))
    return {
        (height, width)
        for (low, high), (left, right) in ranges
        for height in range(low, high + 1)
        for width in range(left, right + 1)
    }


def _resized(data: Data, sizes: set[Shape]) -> set[Shape]:
    return {
        resized_size(*size, short_side, data.long_side)
        for size in sizes
        for short_side in data.short_sides
    }


def is_portrait(shape: Shape) -> bool:
    """Whether an output belongs to the portrait batches of `group_by_aspect` (squares do not)."""
    return shape[0] > shape[1]


def worst_batch_shape(shapes: Iterable[Shape], batch_size: int, *, grouped: bool) -> Shape:
    """The largest padded (height, width) of a batch of images with these shapes.

    Args:
        shapes: what single images can have, from `reachable_shapes` or `evaluation_shapes`.
        batch_size: images in the batch; one image pads to nothing but itself.
        grouped: `data.group_by_aspect`: no batch holds landscape and portrait images together.
    """
    worst = [
        max(group, key=_pixels)
        if batch_size == 1
        else (max(h for h, _ in group), max(w for _, w in group))
        for group in _groups(shapes, grouped=grouped)
    ]
    return max(worst, key=_pixels)


def padded_shapes(shapes: Iterable[Shape], batch_size: int, *, grouped: bool) -> set[Shape]:
    """Every padded (height, width) that a batch of up to `batch_size` images can have.

    Two images reach all that more can: one gives the height, the other the width.

    Args:
        shapes: what single images can have, from `reachable_shapes` or `evaluation_shapes`.
        batch_size: images in the batch, at most.
        grouped: `data.group_by_aspect`: no batch holds landscape and portrait images together.
    """
    if batch_size == 1:
        return set(shapes)
    padded = set[Shape]()
    for group in _groups(shapes, grouped=grouped):
        heights, least_width = _least(np.array([(h, w) for h, w in group]))
        widths, least_height = _least(np.array([(w, h) for h, w in group]))
        # (h, w) is reached if some image of height h is at most w wide, and the other way round.
        fits = (least_width[:, None] <= widths) & (least_height <= heights[:, None])
        rows, columns = fits.nonzero()
        padded |= set(zip(heights[rows].tolist(), widths[columns].tolist(), strict=True))
    return padded


def _least(pairs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different first numbers of pairs [N, 2], and the least second number of each."""
    order = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    first, at = np.unique(order[:, 0], return_index=True)
    return first, order[at, 1]


def _groups(shapes: Iterable[Shape], *, grouped: bool) -> list[list[Shape]]:
    """The shapes that can meet in a batch; no group is empty."""
    shapes = list(shapes)
    if not grouped:
        return [shapes] if shapes else []
    both = [[s for s in shapes if is_portrait(s) is portrait] for portrait in (False, True)]
    return [group for group in both if group]


def _pixels(shape: Shape) -> tuple[int, Shape]:
    return shape[0] * shape[1], shape


def most_objects(records: Sequence[Record], batch_size: int, max_objects: int) -> int:
    """The most boxes that a training batch of `batch_size` different images can hold.

    Args:
        records: the split's index; crowd regions do not count.
        batch_size: images in the batch.
        max_objects: boxes kept of one image; 0: all.
    """
    counts = sorted((r.crowd.count(False) for r in records), reverse=True)[:batch_size]
    return sum(min(count, max_objects) if max_objects else count for count in counts)
