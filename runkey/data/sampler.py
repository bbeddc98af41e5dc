"""Which images an optimizer step sees, and how a step is cut into micro-batches.

A *window* is the images of one optimizer step.  Windows are a pure function of (seed, epoch); the
micro-batch only cuts a window that is already ordered, so it never changes what a step learns from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runkey.data.augment import View, Views, permutation
from runkey.data.shapes import is_portrait

# One image of a window: its position in the index, and how it is seen.
Seen = tuple[int, View]


@dataclass(frozen=True, slots=True)
class WindowSampler:
    """Deals the images of an epoch into windows of `batch_size`; the last may be smaller.

    With `group_by_aspect` a window holds landscape or portrait outputs only; what is left of both
    makes up the last one or two windows, so every epoch has the same number of windows.
    """

    views: Views
    ids: Sequence[int]
    """Image ids, in index order."""
    sizes: Sequence[tuple[int, int]]
    """Original (height, width) of the same images."""
    batch_size: int
    group_by_aspect: bool

    @property
    def steps_per_epoch(self) -> int:
        """Windows in an epoch, of any epoch."""
        return -(-len(self.ids) // self.batch_size)

    def windows(self, epoch: int) -> list[list[Seen]]:
        """The epoch's windows; every image is in one of them, once.

        Inside a window images are ordered by output shape, so that micro-batches pad little.
        """
        views = self.views.draw(epoch, self.ids, self.sizes)
        order = permutation(self.views.seed, epoch, "order", self.ids)
        dealt = self._deal(order, views)
        shuffled = permutation(self.views.seed, epoch, "windows", range(len(dealt)))
        windows = [[(image, views[image]) for image in dealt[i]] for i in shuffled]
        return [sorted(window, key=_shape_key) for window in windows]

    def _deal(self, order: list[int], views: list[View]) -> list[Sequence[int]]:
        if not self.group_by_aspect:
            return _chunks(order, self.batch_size)
        full: list[Sequence[int]] = []
        rest: list[int] = []
        for portrait in (False, True):
            group = [i for i in order if is_portrait(views[i].size) is portrait]
            whole = len(group) - len(group) % self.batch_size
            full += _chunks(group[:whole], self.batch_size)
            rest += group[whole:]
        return full + _chunks(rest, self.batch_size)


def micro_batches(
    window: Sequence[Seen], micro_batch: int, *, grouped: bool
) -> list[Sequence[Seen]]:
    """Cut an ordered window into runs of at most `micro_batch` images.

    With `grouped`, a run never holds landscape and portrait outputs together: a window of both is
    cut there too.
    """
    landscape = sum(not is_portrait(view.size) for _, view in window) if grouped else 0
    parts = (window[:landscape], window[landscape:])
    return [run for part in parts for run in _chunks(part, micro_batch)]


def _shape_key(seen: Seen) -> tuple[bool, int, int]:
    size = seen[1].size
    return is_portrait(size), *size


def _chunks[T](items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
