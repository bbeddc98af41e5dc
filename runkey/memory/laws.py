"""How each block's bytes depend on images and padded shape: three traces stand for all batches.

A block of a detector's training step is proportional to one of few quantities: images, images times
the cells of a feature map, images times cells squared (attention), ...  Which one follows from the
bytes that it has in traces of different batches; a block that follows none is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runkey.data.shapes import Shape
from runkey.memory.trace.events import Pass

_STRIDES = (1, 2, 4, 8, 16, 32)
# Attention kernels round the number of tokens up to these.
_PADS = (8, 16, 32)


def quantities(one: Pass, stride: int) -> NDArray[np.int64]:
    """What a block's bytes can be proportional to: constant first, then simple before composed.

    Args:
        one: the forward and backward pass.
        stride: pixels from token to token.
    """
    cells = _cells(one.height, one.width)
    tokens = cells[stride]
    padded = [-(-tokens // pad) * pad for pad in _PADS]
    rows, columns = -(-one.height // stride), -(-one.width // stride)
    plain = [1, one.height, one.width, rows, columns, *cells.values()]
    plain += [*padded, tokens * tokens, *(tokens * number for number in padded)]
    # The second half begins with the images alone.
    return np.array([*plain, *(one.batch * number for number in plain)], dtype=np.int64)


def _cells(height: int, width: int) -> dict[int, int]:
    """Cells of a feature map by stride: every halving rounds up, as convolutions' sizes do."""
    cells = {}
    for stride in _STRIDES:
        cells[stride] = height * width
        height, width = -(-height // 2), -(-width // 2)
    return cells


def other_shape(worst: Shape, stride: int) -> Shape:
    """A smaller shape that tells quantities apart, and that kernels treat like `worst`.

    Attention pads masks whose rows are no multiple of 8 or 16 tokens, by extra allocations, so both
    shapes must be multiples or neither.
    """
    height, width = worst
    wanted = _alignment(worst, stride)
    best, most = worst, 0
    for part in (0.8, 0.75, 0.7, 0.65, 0.6, 0.55):
        for less in range(0, 2 * stride, 3):
            shape = (max(1, round(height * part) - less), max(1, round(width * part * 0.87) - less))
            if _alignment(shape, stride) == wanted:
                told_apart = _told_apart(worst, shape, stride)
                best, most = max((best, most), (shape, told_apart), key=lambda pair: pair[1])
    return best


def _alignment(shape: Shape, stride: int) -> list[bool]:
    tokens = _cells(*shape)[stride]
    return [tokens % pad == 0 for pad in (8, 16)]


def _told_apart(worst: Shape, shape: Shape, stride: int) -> int:
    """How many quantities grow differently from one shape to the other."""
    one, other = (quantities(Pass(1, *s, 0), stride).astype(float) for s in (worst, shape))
    return len(np.unique(one / other))


@dataclass(frozen=True, slots=True)
class Laws:
    """Bytes of every block of a trace, for a pass of any shape."""

    stride: int
    """Pixels from token to token."""
    index: NDArray[np.int64]
    """Which of `quantities` each block is proportional to."""
    share: NDArray[np.float64]
    """Bytes a unit of it."""
    constant: NDArray[np.float64]
    """Bytes on top."""
    loose: int
    """Blocks that follow no law exactly, and are bounded instead."""

    def bytes(self, one: Pass) -> NDArray[np.int64]:
        """Bytes of each block in such a pass."""
        values = self.constant + self.share * quantities(one, self.stride)[self.index]
        return np.rint(values).astype(np.int64)


def find_laws(sizes: NDArray[np.int64], passes: Sequence[Pass], stride: int) -> Laws:
    """The law of each block.

    Args:
        sizes: [traces, blocks] bytes.
        passes: what was traced, [traces]; the first two differ in the images alone.
        stride: pixels from token to token.
    """
    known = np.stack([quantities(one, stride) for one in passes]).astype(np.float64)
    index = np.zeros(sizes.shape[1], dtype=np.int64)
    share, constant = np.zeros(len(index)), np.zeros(len(index))
    unknown = np.ones(len(index), dtype=bool)
    for number, unit in enumerate(known.T):
        a_unit = sizes / unit[:, None]
        fits = unknown & (a_unit == a_unit[0]).all(0)
        index[fits], share[fits] = number, a_unit[0, fits]
        unknown &= ~fits
    loose = np.flatnonzero(unknown)
    # Affine in the images whatever the shape: too much for all shapes below the worst.
    images = np.array([[one.batch] for one in passes])
    rise = np.maximum(0, sizes[1, loose] - sizes[0, loose]) / (images[1] - images[0])
    index[loose], share[loose] = known.shape[1] // 2, rise
    constant[loose] = (sizes[:, loose] - rise * images).max(0)
    return Laws(stride, index, share, constant, len(loose))
