"""Which part of an image is trained on, at what size, mirrored or not: drawn, not yet applied.

A `View` follows from (seed, epoch, image id) and the image's size alone, so the sampler knows every
output size of an epoch before any image is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runkey.data.geometry import Region, resized_size
from runkey.data.random import uniforms
from runkey.params import Augment, Data

_GEOMETRY_DRAWS = 8
WHOLE = Region()
UNBOUNDED = 2**31
"""A long side that never binds: the reference's resize before its crop has none."""


@dataclass(frozen=True, slots=True)
class View:
    """How one image goes into a batch."""

    size: tuple[int, int]
    """Output (height, width), pixels."""
    region: Region = WHOLE
    flip: bool = False


@dataclass(frozen=True, slots=True)
class Views:
    """Draws views and colour factors of training images; see `params.data.Augment`."""

    seed: int
    short_sides: tuple[int, ...]
    long_side: int
    augment: Augment

    def draw(self, epoch: int, ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[View]:
        """Views of the images `ids`, whose original (height, width) are `sizes`."""
        draws = uniforms(self.seed, epoch, "geometry", ids, _GEOMETRY_DRAWS)
        return [self._view(u, size) for u, size in zip(draws.tolist(), sizes, strict=True)]

    def draw_colour(self, epoch: int, ids: Sequence[int]) -> NDArray[np.float32] | None:
        """Factors of brightness, contrast and, where it varies, saturation.

        Returns:
            [len(ids), 2 or 3] around 1; None when nothing varies.
        """
        augment = self.augment
        spread = np.array([augment.brightness, augment.contrast, augment.saturation])
        if not spread.any():
            return None
        if not augment.saturation:
            spread = spread[:2]
        draws = uniforms(self.seed, epoch, "colour", ids, len(spread))
        return (1.0 + spread * (2.0 * draws - 1.0)).astype(np.float32)

    def _view(self, u: list[float], size: tuple[int, int]) -> View:
        """The view that eight uniform numbers stand for; each number has one fixed meaning."""
        augment, (height, width) = self.augment, size
        short_side = self.short_sides[_below(u[1], len(self.short_sides))]
        flip = u[0] < augment.flip_probability
        if u[2] >= augment.crop_probability:
            out = resized_size(height, width, short_side, self.long_side)
            return View(out, _zoomed(augment, u[3:7]), flip)
        region, cropped = _cropped(augment, size, u[3:])
        return View(resized_size(*cropped, short_side, self.long_side), region, flip)


def _below(u: float, count: int) -> int:
    """A uniform number in [0, 1) as an integer in [0, count)."""
    return min(int(u * count), count - 1)


def _zoomed(augment: Augment, u: Sequence[float]) -> Region:
    """The region that shows the image enlarged by exp(+-zoom), stretched and moved."""
    zoom, aspect, right, down = (2.0 * value - 1.0 for value in u)
    scale, stretch = math.exp(augment.zoom * zoom), math.exp(augment.aspect * aspect / 2.0)
    width, height = 1.0 / (scale * stretch), stretch / scale
    left = (1.0 - width) / 2.0 + augment.shift * right
    top = (1.0 - height) / 2.0 + augment.shift * down
    return Region(left, top, width, height)


def _cropped(
    augment: Augment, size: tuple[int, int], u: Sequence[float]
) -> tuple[Region, tuple[int, int]]:
    """DETR's random crop: resize, cut a rectangle of random sides, as a region of the source.

    The reference resizes here and once more to the output size; the two are one resample here.

    Returns:
        The region, and the (height, width) of the crop in pixels of the intermediate size, from
        which the output size follows.
    """
    short_side = augment.crop_short_sides[_below(u[0], len(augment.crop_short_sides))]
    height, width = resized_size(*size, short_side, UNBOUNDED)
    crop_width = _side(augment, width, u[1])
    crop_height = _side(augment, height, u[2])
    left, top = _below(u[3], width - crop_width + 1), _below(u[4], height - crop_height + 1)
    region = Region(left / width, top / height, crop_width / width, crop_height / height)
    return region, (crop_height, crop_width)


def crop_sides(augment: Augment, side: int) -> tuple[int, int]:
    """Smallest and largest side of the random crop along an image side of `side` pixels.

    An image smaller than `crop_min` (which stops the reference) is kept whole along that side.
    """
    high = min(side, augment.crop_max)
    return min(augment.crop_min, high), high


def _side(augment: Augment, side: int, u: float) -> int:
    low, high = crop_sides(augment, side)
    return low + _below(u, high - low + 1)


def build_views(data: Data, seed: int) -> Views:
    """The training views that `data` asks for."""
    return Views(seed, data.short_sides, data.long_side, data.augment)


def evaluation_size(data: Data, height: int, width: int) -> tuple[int, int]:
    """Output (height, width) of an image in evaluation: the largest short side."""
    return resized_size(height, width, max(data.short_sides), data.long_side)
