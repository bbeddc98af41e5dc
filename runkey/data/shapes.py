"""Which image and batch shapes the loader can produce, and the largest of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from runkey.data.augment import UNBOUNDED, crop_sides, resized_size
from runkey.data.index import ImageRecord
from runkey.params import Data, Params

Shape = tuple[int, int]
"""(height, width), pixels."""


def reachable_shapes(data: Data, records: Iterable[ImageRecord]) -> set[Shape]:
    """Return every shape that an image of `records` can have in a training batch."""
    sizes = {(record.height, record.width) for record in records}
    augment, shapes = data.augment, set[Shape]()
    if augment.crop_probability < 1.0:
        shapes |= _resized(data, sizes)
    if augment.crop_probability > 0.0:
        shapes |= _resized(data, _crops(data, sizes))
    return shapes


def _crops(data: Data, sizes: set[Shape]) -> set[Shape]:
    """Every shape that the random crop can cut out of images of `sizes`."""
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
    """Return True for portrait shapes; squares belong to landscape in `group_by_aspect`."""
    return shape[0] > shape[1]


def worst_batch_shape(shapes: Iterable[Shape], batch_size: int, *, grouped: bool) -> Shape:
    """Return the shape of `padded_shapes` with the most pixels, without computing the others."""
    worst = (
        group if batch_size == 1 else [(max(h for h, _ in group), max(w for _, w in group))]
        for group in _groups(shapes, grouped=grouped)
    )
    return max((shape for group in worst for shape in group), key=lambda s: (s[0] * s[1], s))


def padded_shapes(shapes: Iterable[Shape], batch_size: int, *, grouped: bool) -> set[Shape]:
    """Return every padded shape that a batch of up to `batch_size` images can have.

    Two images are enough to reach them all: one determines the height, the other the width.

    Args:
        shapes: of single images, in training or evaluation.
        batch_size: images in the batch; a single image is not padded.
        grouped: `data.group_by_aspect`: no batch holds landscape and portrait images together.
    """
    if batch_size == 1:
        return set(shapes)
    padded = set[Shape]()
    for group in _groups(shapes, grouped=grouped):
        heights, least_width = _least(np.array([(h, w) for h, w in group]))
        widths, least_height = _least(np.array([(w, h) for h, w in group]))
        # (h, w) is reached if an image of height h is at most w wide, and the reverse.
        fits = (least_width[:, None] <= widths) & (least_height <= heights[:, None])
        rows, columns = fits.nonzero()
        padded |= set(zip(heights[rows].tolist(), widths[columns].tolist(), strict=True))
    return padded


def _least(pairs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct first numbers of pairs [N, 2], and the least second number of each."""
    order = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    first, at = np.unique(order[:, 0], return_index=True)
    return first, order[at, 1]


def _groups(shapes: Iterable[Shape], *, grouped: bool) -> list[list[Shape]]:
    """The sets of shapes that a batch can combine; none is empty."""
    shapes = list(shapes)
    if not grouped:
        return [shapes] if shapes else []
    both = [[s for s in shapes if is_portrait(s) is portrait] for portrait in (False, True)]
    return [group for group in both if group]


def most_objects(records: Sequence[ImageRecord], batch_size: int, max_objects: int) -> int:
    """Return the most boxes that a training batch of `batch_size` different images can hold.

    Of one image there are at most `max_objects`; 0: no limit. Crowd regions do not count.
    """
    counts = sorted((len(r.objects()) for r in records), reverse=True)[:batch_size]
    return sum(min(count, max_objects) if max_objects else count for count in counts)


def max_objects(params: Params) -> int:
    """Return the most boxes of a training image: `data.max_objects` or `model.num_queries`."""
    return min(n for n in (params.data.max_objects, params.model.num_queries) if n)
