"""Micro-batches that are too large for the memory: cut, and the window tried again.

How much fits is a number of padded pixels, images x height x width, of one forward pass.  It only
goes down, is kept in the training's state, and a resumed training starts with it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from runkey.data.dataset import Batch, GlobalBatch
from runkey.errors import StoppedError

# What a CPU's allocator, cuBLAS and cuDNN say in a RuntimeError of no special kind.
_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


@dataclass(frozen=True, slots=True)
class Split:
    """A micro-batch for which memory ran out, and what came of it."""

    images: int
    height: int
    """Padded, pixels."""
    width: int
    limit: int
    """Most padded pixels of a forward pass from here on."""

    @property
    def text(self) -> str:
        """In words, for the log and the terminal."""
        fits = max(1, self.limit // (self.height * self.width))
        return (
            f"memory ran out with {self.images} x {self.height} x {self.width} (images x height"
            f" x width); such a batch is computed in parts of at most {fits} from here on, with the"
            " same result up to rounding"
        )


def pixels(batch: Batch) -> int:
    """Padded pixels of a batch: what its memory grows with."""
    return len(batch) * batch.images.shape[2] * batch.images.shape[3]


def cut(window: GlobalBatch, limit: int | None) -> GlobalBatch:
    """The same images in batches of at most `limit` padded pixels, or of one image.

    The padding stays as it is: convolutions see its edge, so cutting it would change the result.
    """
    if limit is None:
        return window
    return tuple(part for batch in window for part in _parts(batch, limit))


def _smaller(batch: Batch) -> Split:
    """What to try after memory ran out with `batch`: the larger half of it."""
    images, (height, width) = len(batch), batch.images.shape[2:]
    if images == 1:
        raise StoppedError(
            f"memory ran out with a single image, {batch.image_ids[0]}, of {height} x {width}"
            " pixels; that needs a device with more memory, or a training with a lower"
            " data.long_side or with model.checkpointing: true"
        )
    return Split(images, height, width, -(-images // 2) * height * width)


@dataclass(frozen=True, slots=True)
class Pieces[T]:
    """What came of a window, and what had to be cut for it."""

    result: T
    splits: tuple[Split, ...]


def in_pieces[T](
    attempt: Callable[[GlobalBatch], T | Batch],
    undo: Callable[[], None],
    window: GlobalBatch,
    limit: int | None,
) -> Pieces[T]:
    """Attempt a window, cut smaller each time that memory runs out.

    Args:
        attempt: computes a window; the batch for which memory ran out, if it did.  Nothing may
            refer to what it computed by then.
        undo: what has to be done before another attempt.
        window: the micro-batches.
        limit: most padded pixels of one, if known.

    Raises:
        StoppedError: one image does not fit.
    """
    splits: list[Split] = []
    while True:
        result = attempt(cut(window, limit))
        if not isinstance(result, Batch):
            return Pieces(result, tuple(splits))
        undo()
        _free_memory()
        splits.append(_smaller(result))
        limit = splits[-1].limit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def _free_memory() -> None:
    """Give back what nothing refers to any more, cycles and the allocator's cache included."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def _parts(batch: Batch, limit: int) -> Iterator[Batch]:
    """Halves of halves, in order: the same cuts as if memory had run out with each."""
    if pixels(batch) <= limit or len(batch) == 1:
        yield batch
        return
    half = -(-len(batch) // 2)
    yield from _parts(_some(batch, 0, half), limit)
    yield from _parts(_some(batch, half, len(batch)), limit)


def _some(batch: Batch, start: int, stop: int) -> Batch:
    """Images `start` to `stop` with their targets; views, so pinned memory stays pinned."""
    first, last = sum(batch.counts[:start]), sum(batch.counts[:stop])

    def rows(tensor: Tensor) -> Tensor:
        return tensor[start:stop]

    return replace(
        batch,
        images=rows(batch.images),
        sizes=rows(batch.sizes),
        boxes_cxcywh=batch.boxes_cxcywh[first:last],
        labels=batch.labels[first:last],
        counts=batch.counts[start:stop],
        image_ids=batch.image_ids[start:stop],
        original_sizes=rows(batch.original_sizes),
        colour=None if batch.colour is None else rows(batch.colour),
    )
