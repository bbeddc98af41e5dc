"""Deal an epoch's images into global batches, split those, and list the shapes that this can give.

Global batches are a pure function of (seed, epoch). Micro-batches only split a global batch that
is already ordered, so their size does not change what a step learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import batched, product
from typing import overload

import numpy as np
from numpy.typing import NDArray

from runkey.data.augment import (
    MOSAIC_IMAGES,
    UNBOUNDED,
    Augmentation,
    Draws,
    Ids,
    Sizes,
    crop_fractions,
    crop_sides,
    crop_size,
    permutation,
    resized_size,
)
from runkey.data.dataset import AugmentedImage
from runkey.data.index import ImageRecord, Index
from runkey.params import Data, Params

Shape = tuple[int, int]
"""(height, width), pixels."""


def is_portrait(shape: Shape) -> bool:
    """Return True for portrait shapes; squares belong to landscape in `group_by_aspect`."""
    return shape[0] > shape[1]


def _by_aspect[T](items: Iterable[T], shape: Callable[[T], Shape], grouped: bool) -> list[list[T]]:
    """Landscape and portrait items apart if `grouped`, else together; no list is empty."""
    groups: tuple[list[T], list[T]] = [], []
    for item in items:
        groups[grouped and is_portrait(shape(item))].append(item)
    return [group for group in groups if group]


@dataclass(frozen=True, slots=True)
class GlobalBatchSampler:
    """Deals the images of an epoch into batches of `batch_size`; the last may be smaller.

    With `data.group_by_aspect`, a batch holds only landscape or only portrait outputs, all of about
    one of `data.short_sides`. What is left of these groups is dealt in their order, so that every
    epoch has equally many batches.
    """

    augmentation: Augmentation
    ids: Ids
    """Image ids, in index order."""
    sizes: Sizes
    """Original (height, width) of the same images, pixels."""
    batch_size: int

    def global_batches(self, epoch: int) -> EpochPlan:
        """Return the epoch's global batches, which hold every image once.

        Within a batch, images are sorted by output shape, so that micro-batches have less padding.
        """
        seed, grouped = self.augmentation.seed, self.augmentation.data.group_by_aspect
        draws = self.augmentation.draw(epoch, self.ids, self.sizes)
        order = permutation(seed, epoch, "order", self.ids)
        dealt: list[NDArray[np.int64]] = []
        rest: list[NDArray[np.int64]] = []
        for group in self._groups(order, draws.sizes) if grouped else [order]:
            whole = len(group) - len(group) % self.batch_size
            dealt += list(group[:whole].reshape(-1, self.batch_size))
            rest.append(group[whole:])
        left = np.concatenate(rest)
        dealt += [left[i : i + self.batch_size] for i in range(0, len(left), self.batch_size)]
        shuffled = permutation(seed, epoch, "windows", range(len(dealt)))
        return EpochPlan(draws, [dealt[i] for i in shuffled])

    def _groups(
        self, order: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> list[NDArray[np.int64]]:
        """Images by orientation and, smallest first, by the short side that holds their output."""
        steps = np.sort(np.array(self.augmentation.data.short_sides))
        of_step = np.searchsorted(steps, sizes.min(axis=1))
        portrait = sizes[:, 0] > sizes[:, 1]
        groups = (portrait * (len(steps) + 1) + of_step)[order]
        ordered = np.argsort(groups, kind="stable")
        ends = np.flatnonzero(np.diff(groups[ordered])) + 1
        return np.split(order[ordered], ends)


@dataclass(frozen=True, slots=True, eq=False)
class EpochPlan(Sequence["list[AugmentedImage]"]):
    """The global batches of an epoch; each is made when it is asked for."""

    draws: Draws
    batches: Sequence[NDArray[np.int64]]
    """Positions in the index of each batch's images."""

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> list[AugmentedImage]: ...
    @overload
    def __getitem__(self, index: slice) -> EpochPlan: ...
    def __getitem__(self, index: int | slice) -> list[AugmentedImage] | EpochPlan:
        if isinstance(index, slice):
            return EpochPlan(self.draws, self.batches[index])
        batch = [(image, self.draws[image]) for image in self.batches[index].tolist()]
        batch.sort(key=lambda image: (is_portrait(image[1].size), *image[1].size))
        return batch


def micro_batches(
    global_batch: Sequence[AugmentedImage], micro_batch: int, *, grouped: bool
) -> list[Sequence[AugmentedImage]]:
    """Split an ordered global batch into micro-batches of at most `micro_batch` images.

    With `grouped`, it is also split between landscape and portrait outputs.
    """
    parts = _by_aspect(global_batch, lambda image: image[1].size, grouped)
    return [chunk for part in parts for chunk in batched(part, micro_batch)]


def reachable_shapes(data: Data, records: Sequence[ImageRecord]) -> set[Shape]:
    """Return every shape that an image of `records` can have in a training batch."""
    distinct = np.unique(Index.of(records).sizes, axis=0)
    sizes = {(height, width) for height, width in distinct.tolist()}
    augment, shapes = data.augment, set[Shape]()
    if augment.crop_probability < 1.0:
        shapes |= _resized(data, sizes)
    if augment.crop_probability > 0.0:
        shapes |= _resized(data, _crops(data, sizes))
    return shapes


def _crops(data: Data, sizes: set[Shape]) -> set[Shape]:
    """Every shape that the random crop can cut out of images of `sizes`."""
    if data.augment.crop_fraction:
        sides = crop_fractions(data.augment)
        return {
            crop_size(size, height, width)
            for size in sizes
            for height, width in product(sides, sides)
        }
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


def worst_batch_shape(shapes: Iterable[Shape], batch_size: int, *, grouped: bool) -> Shape:
    """Return the shape of `padded_shapes` with the most pixels, without computing the others."""
    worst = (
        group if batch_size == 1 else [(max(h for h, _ in group), max(w for _, w in group))]
        for group in _by_aspect(shapes, lambda shape: shape, grouped)
    )
    return max((shape for group in worst for shape in group), key=lambda s: (s[0] * s[1], s))


def padded_shapes(shapes: Iterable[Shape], batch_size: int, *, grouped: bool) -> set[Shape]:
    """Return every padded shape that a batch of up to `batch_size` images can have.

    Two images are enough to reach them all: one determines the height, the other the width. A
    single image is not padded. If `grouped`, no batch holds landscape and portrait images together.
    """
    if batch_size == 1:
        return set(shapes)
    padded = set[Shape]()
    for group in _by_aspect(shapes, lambda shape: shape, grouped):
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


def most_objects(
    records: Sequence[ImageRecord], batch_size: int, max_objects: int, *, mosaic: bool = False
) -> int:
    """Return the most boxes that a training batch of `batch_size` different images can hold.

    Of one image there are at most `max_objects`; 0: no limit. Crowd regions do not count. With
    `mosaic`, every image may be one of the four images that have the most boxes.
    """
    counts = np.sort(Index.of(records).object_counts())[::-1].tolist()
    if mosaic and len(counts) >= MOSAIC_IMAGES:
        counts = [sum(counts[:MOSAIC_IMAGES])] * len(counts)
    return sum(min(n, max_objects) if max_objects else n for n in counts[:batch_size])


def max_objects(params: Params) -> int:
    """Return the most boxes of a training image: `data.max_objects` or `model.num_queries`."""
    return min(n for n in (params.data.max_objects, params.model.num_queries) if n)
