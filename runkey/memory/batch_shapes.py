"""Which padded batches training can meet, from annotations and parameters alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runkey.data.augment import build_augmentation
from runkey.data.dataset import BatchMaker, image_table
from runkey.data.index import Record
from runkey.data.sampler import AugmentedImage, GlobalBatchSampler, micro_batches
from runkey.data.shapes import (
    Shape,
    most_objects,
    padded_shapes,
    reachable_shapes,
    worst_batch_shape,
)
from runkey.errors import DataError
from runkey.memory.trace.tracker import Pass
from runkey.params import Data

# From two images on, a batch can pad to the largest height and the largest width at once.
_PADDED_TOGETHER = 2


@dataclass(frozen=True, slots=True)
class Census:
    """What the training loader can produce."""

    shapes: int
    """Different (height, width) of single images."""
    padded_shapes: int
    """Different padded (height, width) of batches of two images or more."""
    largest: Shape
    """(height, width) of the single image with the most pixels."""
    worst: Shape
    """Padded (height, width) of the worst batch of two images or more."""
    worst_ungrouped: Shape
    """The same if landscape and portrait images came in one batch."""
    worst_grouped: Shape
    """The same if they never did (`data.group_by_aspect`); one of the two is `worst`."""
    objects: tuple[int, ...]
    """Most boxes of a batch of 1, 2, ... images."""

    def worst_of(self, images: int) -> Shape:
        """Padded (height, width) of the worst batch of that many images."""
        return self.largest if images == 1 else self.worst

    def lines(self) -> list[str]:
        """The census in words."""
        lines = [
            f"census: {_count(self.shapes, 'output shape')}, the largest {_text(self.largest)}; "
            f"up to {self.objects[0]} objects an image",
            f"  once padded {_count(self.padded_shapes, 'shape')}, the worst {_text(self.worst)}",
        ]
        if self.worst_ungrouped != self.worst:
            times = _pixels(self.worst_ungrouped) / _pixels(self.worst)
            lines.append(
                f"  grouping by aspect pays: mixed batches would pad to "
                f"{_text(self.worst_ungrouped)}, {times:.2f} times the pixels"
            )
        if self.worst != self.worst_grouped:
            times = _pixels(self.worst) / _pixels(self.worst_grouped)
            lines.append(
                f"  data.group_by_aspect: true would pad to {_text(self.worst_grouped)} at most, "
                f"1/{times:.2f} of the pixels"
            )
        return lines


def take_census(
    data: Data, records: Sequence[Record], *, batch_size: int, max_objects: int
) -> Census:
    """Count what `runkey.data`'s real transforms can make of the training images.

    Args:
        data: section `data` of params.yaml.
        records: the training split.
        batch_size: images of an optimizer step.
        max_objects: boxes that the loader keeps of an image at most; 0: all.

    Raises:
        DataError: there are no training images.
    """
    if not records:
        raise DataError("prepared/train.json: no training images; see prepared/report.json")
    shapes = reachable_shapes(data, records)
    grouped = data.group_by_aspect
    return Census(
        shapes=len(shapes),
        padded_shapes=len(padded_shapes(shapes, _PADDED_TOGETHER, grouped=grouped)),
        largest=worst_batch_shape(shapes, 1, grouped=grouped),
        worst=worst_batch_shape(shapes, _PADDED_TOGETHER, grouped=grouped),
        worst_ungrouped=worst_batch_shape(shapes, _PADDED_TOGETHER, grouped=False),
        worst_grouped=worst_batch_shape(shapes, _PADDED_TOGETHER, grouped=True),
        objects=tuple(most_objects(records, n + 1, max_objects) for n in range(batch_size)),
    )


def census_of_shape(shape: Shape, *, batch_size: int, objects: int) -> Census:
    """The census of a training that only ever sees one shape, each image with `objects` boxes."""
    counts = tuple(objects * (n + 1) for n in range(batch_size))
    return Census(1, 1, shape, shape, shape, shape, counts)


def sample_windows(
    data: Data,
    records: Sequence[Record],
    *,
    seed: int,
    batch_size: int,
    micro_batch: int,
    max_objects: int,
    batches: int,
) -> list[tuple[Pass, ...]]:
    """The first optimizer steps that the real sampler deals, as shapes; no image is opened.

    Args:
        data: section `data` of params.yaml.
        records: the training split, not empty.
        seed: the run's seed.
        batch_size: images of an optimizer step.
        micro_batch: images of a forward pass, at most.
        max_objects: as for `take_census`.
        batches: forward passes to return, at least; the last step is whole.

    Returns:
        The forward passes of each step.
    """
    table = image_table(records)
    augmentation = build_augmentation(data, seed)
    sampler = GlobalBatchSampler(
        augmentation, table.ids, table.sizes, batch_size, data.group_by_aspect
    )
    maker = BatchMaker(table, Path(), None, augmentation, data.augment.min_visible, max_objects)
    windows: list[tuple[Pass, ...]] = []
    count = epoch = 0
    while count < batches:
        for window in sampler.global_batches(epoch):
            runs = micro_batches(window, micro_batch, grouped=data.group_by_aspect)
            windows.append(tuple(_shape_of(maker, run) for run in runs))
            count += len(runs)
            if count >= batches:
                break
        epoch += 1
    return windows


def _shape_of(maker: BatchMaker, run: Sequence[AugmentedImage]) -> Pass:
    sizes = maker.table.sizes
    objects = [
        len(maker.visible_objects(index, augment, sizes[index])[1]) for index, augment in run
    ]
    return Pass(
        batch=len(run),
        height=max(augment.size[0] for _, augment in run),
        width=max(augment.size[1] for _, augment in run),
        objects=max(objects),
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _text(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]}"


def _pixels(shape: Shape) -> int:
    return shape[0] * shape[1]
