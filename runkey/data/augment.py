"""Which part of an image is trained on, at what size, mirrored or not: drawn, not yet applied.

A `View` follows from (seed, epoch, image id) and the image's size alone, so the sampler knows every
output size of an epoch before any image is read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from runkey.params import Augment, Data

# Random numbers as a pure function of (seed, epoch, purpose, image id); no state anywhere.


Purpose = Literal["order", "windows", "geometry", "colour"]

_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10


def philox(counters: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """The Philox4x32-10 bijection.

    Args:
        counters: [M, 4], each below 2^32.
        key: two words below 2^32.

    Returns:
        [M, 4] random words below 2^32.
    """
    c0, c1, c2, c3 = (counters[:, i] for i in range(4))
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _MASK, (p0 >> _HALF) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return np.stack((c0, c1, c2, c3), axis=1)


def uniforms(
    seed: int, epoch: int, purpose: Purpose, ids: Sequence[int], draws: int
) -> NDArray[np.float64]:
    """Independent uniform numbers in [0, 1), with 32 random bits each.

    Args:
        seed: the run's seed.
        epoch: from 0.
        purpose: what the numbers are for; each purpose has its own.
        ids: image ids (any integers; taken modulo 2^64).
        draws: numbers for each id.

    Returns:
        [len(ids), draws]; a row depends on its id alone, not on the other ids.
    """
    blocks = -(-draws // 4)
    wide = np.array([i & 0xFFFFFFFFFFFFFFFF for i in ids], dtype=np.uint64).repeat(blocks)
    block = np.tile(np.arange(blocks, dtype=np.uint64), len(ids))
    counters = np.stack((block, wide & _MASK, wide >> _HALF, np.zeros_like(block)), axis=1)
    words = philox(counters, _key(seed, epoch, purpose))
    return words.reshape(len(ids), blocks * 4)[:, :draws] / 2.0**32


def permutation(seed: int, epoch: int, purpose: Purpose, ids: Sequence[int]) -> list[int]:
    """Positions 0..len(ids)-1 in random order (each id's number is its own; ties by position)."""
    draws = uniforms(seed, epoch, purpose, ids, 1)[:, 0]
    return [int(i) for i in np.argsort(draws, kind="stable")]


def _key(seed: int, epoch: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


# Sizes, source regions, and the one crop-and-resize that pixels and boxes go through.


# What the output holds outside the source: ImageNet's mean colour, which becomes about 0.
OUTSIDE_RGB = (124, 116, 104)


def resized_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """Output (height, width), pixels, by the reference's rule (Carion et al. 2020, their code).

    The short side becomes `short_side`, unless the long one would exceed `long_side`; then the
    short side is rounded down to fit.  Where the reference's rounding lets the long side exceed the
    bound by a few pixels (ratios above 2), the bound holds here.
    """
    low, high = min(height, width), max(height, width)
    if high / low * short_side > long_side:
        short_side = max(1, round(long_side * low / high))
    long = min(int(short_side * high / low), max(long_side, short_side))
    return (short_side, long) if height <= width else (long, short_side)


@dataclass(frozen=True, slots=True)
class Region:
    """Left, top, width and height as parts of the source's width and height."""

    left: float = 0.0
    top: float = 0.0
    width: float = 1.0
    height: float = 1.0


@dataclass(frozen=True, slots=True)
class Span:
    """One axis of a placement: source pixels [start, stop) go to output pixels [to, to_stop)."""

    start: int
    stop: int
    to: int
    to_stop: int

    @property
    def scale(self) -> float:
        """Output pixels per source pixel."""
        return (self.to_stop - self.to) / (self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where which source pixels go in an output of `size` (height, width)."""

    x: Span
    y: Span
    size: tuple[int, int]


def place(region: Region, source: tuple[int, int], size: tuple[int, int]) -> Placement:
    """Put `region` on whole pixels.

    Args:
        region: what is to fill the output.
        source: (height, width) of the decoded image, pixels.
        size: (height, width) of the output, pixels.
    """
    return Placement(
        _span(region.left, region.width, source[1], size[1]),
        _span(region.top, region.height, source[0], size[0]),
        size,
    )


def _span(first: float, length: float, source: int, out: int) -> Span:
    """One axis: cut the region off at the source's edges, then round both ends of both."""
    last = first + length
    start = min(max(round(first * source), 0), source - 1)
    stop = min(max(round(last * source), start + 1), source)
    # An end that was cut off by the source lies inside the output; the other ends are its edges.
    to = round((start / source - first) / length * out) if first < 0 else 0
    to_stop = round((stop / source - first) / length * out) if last > 1 else out
    to = min(max(to, 0), out - 1)
    return Span(start, stop, to, min(max(to_stop, to + 1), out))


def crop_resize(image: Tensor, placement: Placement) -> Tensor:
    """Resample once, bilinear with antialias, uint8 to uint8.

    Args:
        image: uint8 [3, h, w] of the size that the placement was made for.
        placement: source pixels to output pixels.

    Returns:
        uint8 [3, *placement.size], channels last in memory for an image that is so;
        `OUTSIDE_RGB` where the source does not reach.
    """
    x, y = placement.x, placement.y
    part = image[:, y.start : y.stop, x.start : x.stop]
    target = (y.to_stop - y.to, x.to_stop - x.to)
    if part.shape[1:] != target:
        # Said to be channels last as a batch of one, which is what makes this 2.4 times faster.
        one = part.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        part = functional.interpolate(one, size=target, mode="bilinear", antialias=True)[0]
    if target == placement.size:
        return part
    colour = torch.tensor(OUTSIDE_RGB, dtype=torch.uint8)
    out = colour.repeat(*placement.size, 1).permute(2, 0, 1)
    out[:, y.to : y.to_stop, x.to : x.to_stop] = part
    return out


def carry_boxes(
    boxes_xyxy: NDArray[np.float64], placement: Placement, *, flip: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Move boxes with the pixels and cut them off at the output's edges.

    Args:
        boxes_xyxy: [N, 4] in pixels of the source that the placement was made for.
        placement: source pixels to output pixels.
        flip: whether the output is mirrored left-right after placing.

    Returns:
        Boxes [N, 4] as xyxy in output pixels (some perhaps without area), and the part of each
        box's area that is visible, [N] in 0..1.
    """
    x, y, (height, width) = placement.x, placement.y, placement.size
    scale = np.array([x.scale, y.scale] * 2)
    boxes = (boxes_xyxy - [x.start, y.start] * 2) * scale + [x.to, y.to] * 2
    if flip:
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    whole = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    boxes = boxes.clip(0, [width, height] * 2)
    seen = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return boxes, seen / np.maximum(whole, np.finfo(np.float64).tiny)


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
