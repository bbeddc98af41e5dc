"""Which padded shapes training can meet, from annotations and parameters alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runkey.data.index import Record
from runkey.data.shapes import Shape, most_objects, reachable_shapes, worst_batch_shape
from runkey.errors import DataError
from runkey.params.data import Data

# From two images on, a batch can pad to the largest height and the largest width at once.
_PADDED_TOGETHER = 2


@dataclass(frozen=True, slots=True)
class Census:
    """What the training loader can produce."""

    shapes: int
    """Different (height, width) of single images."""
    largest: Shape
    """(height, width) of the single image with the most pixels."""
    worst: Shape
    """Padded (height, width) of the worst batch of two images or more."""
    worst_ungrouped: Shape
    """The same if landscape and portrait images came in one batch."""
    worst_grouped: Shape
    """The same if they never did (`data.group_by_aspect`); one of the two is `worst`."""
    objects: int
    """Most boxes of an image."""

    def lines(self) -> list[str]:
        """The census in words."""
        lines = [
            f"census: {self.shapes} output shape{'s' if self.shapes > 1 else ''}, the largest "
            f"{_text(self.largest)}; worst batch {_text(self.worst)}; up to {self.objects} objects"
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


def take_census(data: Data, records: Sequence[Record], max_objects: int) -> Census:
    """Count what `runkey.data`'s real transforms can make of the training images.

    Args:
        data: section `data` of params.yaml.
        records: the training split.
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
        largest=worst_batch_shape(shapes, 1, grouped=grouped),
        worst=worst_batch_shape(shapes, _PADDED_TOGETHER, grouped=grouped),
        worst_ungrouped=worst_batch_shape(shapes, _PADDED_TOGETHER, grouped=False),
        worst_grouped=worst_batch_shape(shapes, _PADDED_TOGETHER, grouped=True),
        objects=most_objects(records, 1, max_objects),
    )


def _text(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]}"


def _pixels(shape: Shape) -> int:
    return shape[0] * shape[1]
