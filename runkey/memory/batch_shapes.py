"""The padded batches that training can produce, from annotations and parameters alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runkey.data.augment import Augmentation
from runkey.data.dataset import AugmentedImage, BatchMaker
from runkey.data.index import ImageRecord, Index, index_file, read_classes, read_index
from runkey.data.sampler import (
    GlobalBatchSampler,
    Shape,
    max_objects,
    micro_batches,
    most_objects,
    padded_shapes,
    reachable_shapes,
    worst_batch_shape,
)
from runkey.errors import DataError
from runkey.memory.trace.events import MicroBatch
from runkey.params import Params
from runkey.units import counted

# From two images on, a batch can pad to the largest height and the largest width at once.
_PADDED_TOGETHER = 2

_SEEDS = (0, 1, 2)
"""Of the sampled steps, whatever `seed` a training has: the prediction holds for every seed."""

Step = tuple[MicroBatch, ...]
"""The micro-batches of an optimizer step."""


@dataclass(frozen=True, slots=True)
class ShapeStatistics:
    """The shapes and object counts that the training loader can produce."""

    shapes: int
    """Number of different (height, width) of single images."""
    padded_shapes: int
    """Number of different padded (height, width) of batches of two images or more."""
    largest: Shape
    """(height, width) of the single image with the most pixels."""
    worst: Shape
    """Padded (height, width) of the largest batch of two images or more."""
    worst_ungrouped: Shape
    """The same if landscape and portrait images came in one batch."""
    worst_grouped: Shape
    """The same if they never did (`data.group_by_aspect`); one of the two is `worst`."""
    objects: tuple[int, ...]
    """Most boxes of a batch of 1, 2, ... images."""

    def worst_of(self, images: int) -> Shape:
        """Return the padded (height, width) of the largest batch of that many images."""
        return self.largest if images == 1 else self.worst

    def lines(self) -> list[str]:
        """Describe the shapes, one line each."""
        lines = [
            f"image shapes after resizing: {self.shapes:,} (largest {_text(self.largest)}); "
            f"up to {counted(self.objects[0], 'object')} per image",
            f"padded batch shapes: {self.padded_shapes:,} (largest {_text(self.worst)})",
        ]
        if self.worst_ungrouped != self.worst:
            times = math.prod(self.worst_ungrouped) / math.prod(self.worst)
            lines.append(
                f"  data.group_by_aspect helps: mixed batches would pad to "
                f"{_text(self.worst_ungrouped)}, {times:.2f} times the pixels"
            )
        if self.worst != self.worst_grouped:
            times = math.prod(self.worst) / math.prod(self.worst_grouped)
            lines.append(
                f"  data.group_by_aspect: true would pad to {_text(self.worst_grouped)} at most, "
                f"1/{times:.2f} of the pixels"
            )
        return lines


def shape_statistics(params: Params, records: Sequence[ImageRecord]) -> ShapeStatistics:
    """Count what the training transforms can make of `records`, the training split.

    Raises:
        DataError: there are no training images.
    """
    if not records:
        raise DataError("prepared/train.safetensors: no training images; see prepared/report.json")
    shapes = reachable_shapes(params.data, records)
    grouped = params.data.group_by_aspect
    sizes = range(1, params.training.batch_size + 1)
    limit, mosaic = max_objects(params), params.data.augment.mosaic_probability > 0
    return ShapeStatistics(
        shapes=len(shapes),
        padded_shapes=len(padded_shapes(shapes, _PADDED_TOGETHER, grouped=grouped)),
        largest=worst_batch_shape(shapes, 1, grouped=grouped),
        worst=worst_batch_shape(shapes, _PADDED_TOGETHER, grouped=grouped),
        worst_ungrouped=worst_batch_shape(shapes, _PADDED_TOGETHER, grouped=False),
        worst_grouped=worst_batch_shape(shapes, _PADDED_TOGETHER, grouped=True),
        objects=tuple(most_objects(records, n, limit, mosaic=mosaic) for n in sizes),
    )


def sample_steps(
    params: Params, records: Sequence[ImageRecord], micro_batch: int, count: int, seed: int
) -> list[Step]:
    """Return the first optimizer steps of the training sampler, as shapes; opens no image.

    Args:
        params: of the training.
        records: the training split, not empty.
        micro_batch: most images of a micro-batch.
        count: least number of micro-batches; the last step is whole.
        seed: in place of `params.seed`.
    """
    data = params.data
    index = Index.of(records)
    # With zoom-out and mosaic to the end: `training.epochs` is no parameter of the prediction.
    augmentation = Augmentation(seed, data)
    sampler = GlobalBatchSampler(augmentation, index.ids, index.sizes, params.training.batch_size)
    maker = BatchMaker(index, Path(), None, augmentation, max_objects(params))
    steps: list[Step] = []
    every = itertools.chain.from_iterable(map(sampler.global_batches, itertools.count()))
    while sum(map(len, steps)) < count:
        runs = micro_batches(next(every), micro_batch, grouped=data.group_by_aspect)
        steps.append(tuple(_sizes_of(maker, run) for run in runs))
    return steps


def _sizes_of(maker: BatchMaker, run: Sequence[AugmentedImage]) -> MicroBatch:
    objects = [len(maker.visible_objects(index, augment)[1]) for index, augment in run]
    return MicroBatch(
        images=len(run),
        height=max(augment.size[0] for _, augment in run),
        width=max(augment.size[1] for _, augment in run),
        objects=max(objects),
    )


@dataclass(frozen=True, slots=True)
class BatchShapes:
    """The batches that a training step is predicted for."""

    statistics: ShapeStatistics
    statistics_under: Callable[[Params], ShapeStatistics]
    """The same under other parameters."""
    sample: Callable[[int, int], list[Step]]
    """(most images of a micro-batch, least number of micro-batches) to sampled steps."""
    num_classes: int

    def worst(self, images: int) -> MicroBatch:
        """Return the largest micro-batch of that many images."""
        return MicroBatch(images, *self.statistics.worst_of(images), self.statistics.objects[0])

    def steps(self, images: int, count: int) -> list[Step]:
        """Return what `sample` returns, with two of the largest micro-batches in the middle."""
        steps = self.sample(images, count)
        middle = len(steps) // 2
        return [*steps[:middle], (self.worst(images),) * 2, *steps[middle:]]


def prepared_shapes(params: Params, prepared: Path) -> BatchShapes:
    """Return the batches of the data in `prepared`, prepare's output folder.

    Raises:
        DataError: prepare has not run, or left no image.
    """
    records = read_index(index_file(prepared, "train"))

    def sample(images: int, count: int) -> list[Step]:
        part = -(-count // len(_SEEDS))
        return [s for seed in _SEEDS for s in sample_steps(params, records, images, part, seed)]

    return BatchShapes(
        statistics=shape_statistics(params, records),
        statistics_under=lambda other: shape_statistics(other, records),
        sample=sample,
        num_classes=len(read_classes(prepared / "classes.json")),
    )


def single_shape(params: Params, shape: Shape, *, objects: int, num_classes: int) -> BatchShapes:
    """Return batches of one padded `shape`, each image with `objects` boxes, without any data."""

    def statistics(other: Params) -> ShapeStatistics:
        part = max(other.data.short_sides) / max(params.data.short_sides)
        height, width = (max(1, round(side * part)) for side in shape)
        if not other.data.group_by_aspect:
            height = width = max(height, width)
        one = (height, width)
        counts = tuple(objects * (n + 1) for n in range(other.training.batch_size))
        return ShapeStatistics(1, 1, one, one, one, one, counts)

    def sample(images: int, _: int) -> list[Step]:
        return [(MicroBatch(images, *shape, objects),) * 2] * 2

    return BatchShapes(statistics(params), statistics, sample, num_classes)


def _text(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]}"
