"""Deal an epoch's images into global batches, and split those into micro-batches.

Global batches are a pure function of (seed, epoch). Micro-batches only split a global batch that
is already ordered, so their size does not change what a step learns from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched

from runkey.data.augment import Augmentation, AugmentParams, permutation
from runkey.data.dataset import AugmentedImage
from runkey.data.shapes import is_portrait


@dataclass(frozen=True, slots=True)
class GlobalBatchSampler:
    """Deals the images of an epoch into batches of `batch_size`; the last may be smaller.

    With `group_by_aspect`, a batch holds only landscape or only portrait outputs. The remainders
    of both form the last one or two batches, so that every epoch has equally many.
    """

    augmentation: Augmentation
    ids: Sequence[int]
    """Image ids, in index order."""
    sizes: Sequence[tuple[int, int]]
    """Original (height, width) of the same images, pixels."""
    batch_size: int
    group_by_aspect: bool

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of global batches in every epoch."""
        return -(-len(self.ids) // self.batch_size)

    def global_batches(self, epoch: int) -> list[list[AugmentedImage]]:
        """Return the epoch's global batches, which hold every image once.

        Within a batch, images are sorted by output shape, so that micro-batches have less padding.
        """
        augments = self.augmentation.draw(epoch, self.ids, self.sizes)
        order = permutation(self.augmentation.seed, epoch, "order", self.ids)
        dealt = self._deal(order, augments)
        shuffled = permutation(self.augmentation.seed, epoch, "windows", range(len(dealt)))
        batches = [[(image, augments[image]) for image in dealt[i]] for i in shuffled]
        return [sorted(batch, key=_shape_key) for batch in batches]

    def _deal(self, order: list[int], augments: list[AugmentParams]) -> list[Sequence[int]]:
        if not self.group_by_aspect:
            return list(batched(order, self.batch_size))
        full: list[Sequence[int]] = []
        rest: list[int] = []
        for portrait in (False, True):
            group = [i for i in order if is_portrait(augments[i].size) is portrait]
            whole = len(group) - len(group) % self.batch_size
            full += batched(group[:whole], self.batch_size)
            rest += group[whole:]
        return [*full, *batched(rest, self.batch_size)]


def micro_batches(
    global_batch: Sequence[AugmentedImage], micro_batch: int, *, grouped: bool
) -> list[Sequence[AugmentedImage]]:
    """Split an ordered global batch into micro-batches of at most `micro_batch` images.

    With `grouped`, it is also split between landscape and portrait outputs.
    """
    landscape = 0
    if grouped:
        landscape = sum(not is_portrait(augment.size) for _, augment in global_batch)
    parts = (global_batch[:landscape], global_batch[landscape:])
    return [chunk for part in parts for chunk in batched(part, micro_batch)]


def _shape_key(image: AugmentedImage) -> tuple[bool, int, int]:
    size = image[1].size
    return is_portrait(size), *size
