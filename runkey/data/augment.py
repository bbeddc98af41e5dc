"""Augmentation: random parameters per image, and the resampling that applies them.

`AugmentParams` follow from (seed, epoch, image id) and the image's size alone, so the sampler
knows every output size of an epoch before any image is read.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from runkey.params import Augment, Data

Purpose = Literal["order", "windows", "geometry", "colour"]
"""What random numbers are for; the name is hashed. "windows" orders an epoch's global batches."""

OUTSIDE_RGB = (124, 116, 104)
"""Colour of output pixels outside the source: ImageNet's mean, which is normalised to about 0."""
UNBOUNDED = 2**31
"""A long side without effect, for the reference's resize before its crop."""
_GEOMETRY_DRAWS = 8

_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10


def philox(counters: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Apply the Philox4x32-10 bijection (Salmon et al. 2011) to counters [M, 4].

    Counters, both words of the key and the returned random words [M, 4] are below 2^32.
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
    """Draw independent uniform numbers in [0, 1), with 32 random bits each.

    They are a pure function of the arguments; there is no random state. Each seed, epoch, purpose
    and image id (modulo 2^64) has numbers of its own: a row of the returned [len(ids), draws].
    """
    blocks = -(-draws // 4)
    wide = np.array([i & 0xFFFFFFFFFFFFFFFF for i in ids], dtype=np.uint64).repeat(blocks)
    block = np.tile(np.arange(blocks, dtype=np.uint64), len(ids))
    counters = np.stack((block, wide & _MASK, wide >> _HALF, np.zeros_like(block)), axis=1)
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    words = philox(counters, struct.unpack("<2I", digest))
    return words.reshape(len(ids), blocks * 4)[:, :draws] / 2.0**32


def permutation(seed: int, epoch: int, purpose: Purpose, ids: Sequence[int]) -> list[int]:
    """Return positions 0..len(ids)-1 in random order: sorted by one `uniforms` number per id."""
    draws = uniforms(seed, epoch, purpose, ids, 1)[:, 0]
    return [int(i) for i in np.argsort(draws, kind="stable")]


def resized_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """Return the output (height, width), pixels, by the rule of the reference DETR's code.

    The short side becomes `short_side`, unless the long side would exceed `long_side`; then the
    short side is reduced to fit. The reference's rounding can exceed the bound by a few pixels
    (at ratios above 2); this function does not.
    """
    low, high = min(height, width), max(height, width)
    if high / low * short_side > long_side:
        short_side = max(1, round(long_side * low / high))
    long = min(int(short_side * high / low), max(long_side, short_side))
    return (short_side, long) if height <= width else (long, short_side)


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of the source image, as fractions of its width and height."""

    left: float = 0.0
    top: float = 0.0
    width: float = 1.0
    height: float = 1.0


WHOLE = Region()


@dataclass(frozen=True, slots=True)
class Span:
    """One axis of an augmented image: source pixels [start, stop) become output [to, to_stop)."""

    start: int
    stop: int
    to: int
    to_stop: int

    @property
    def scale(self) -> float:
        """Return output pixels per source pixel."""
        return (self.to_stop - self.to) / (self.stop - self.start)


@dataclass(frozen=True, slots=True)
class AugmentParams:
    """The geometry of one image in a batch."""

    size: tuple[int, int]
    """Output (height, width), pixels."""
    region: Region = WHOLE
    """The part of the image that fills the output; it may extend beyond the image."""
    flip: bool = False
    """Mirror left-right after resizing."""

    def spans(self, source: tuple[int, int]) -> tuple[Span, Span]:
        """Round the region to whole pixels of a source (height, width); return (x, y)."""
        region = self.region
        return (
            _span(region.left, region.width, source[1], self.size[1]),
            _span(region.top, region.height, source[0], self.size[0]),
        )


def _span(first: float, length: float, source: int, out: int) -> Span:
    """One axis: clip the region to the source, then round its ends in source and output."""
    last = first + length
    start = min(max(round(first * source), 0), source - 1)
    stop = min(max(round(last * source), start + 1), source)
    # A clipped end lies inside the output; the other ends are the output's edges.
    to = round((start / source - first) / length * out) if first < 0 else 0
    to_stop = round((stop / source - first) / length * out) if last > 1 else out
    to = min(max(to, 0), out - 1)
    return Span(start, stop, to, min(max(to_stop, to + 1), out))


def augment_image(image: Tensor, augment: AugmentParams) -> Tensor:
    """Crop and resize in one resampling, bilinear with antialiasing, then mirror.

    From uint8 [3, h, w] to uint8 [3, *augment.size], in the memory format of `image`; the output is
    `OUTSIDE_RGB` outside the source.
    """
    x, y = augment.spans((image.shape[1], image.shape[2]))
    part = image[:, y.start : y.stop, x.start : x.stop]
    target = (y.to_stop - y.to, x.to_stop - x.to)
    if part.shape[1:] != target:
        # As a batch of one that torch recognises as channels last: 2.4 times faster.
        one = part.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        part = functional.interpolate(one, size=target, mode="bilinear", antialias=True)[0]
    if target != augment.size:
        colour = torch.tensor(OUTSIDE_RGB, dtype=torch.uint8)
        out = colour.repeat(*augment.size, 1).permute(2, 0, 1)
        out[:, y.to : y.to_stop, x.to : x.to_stop] = part
        part = out
    return part.flip(-1) if augment.flip else part


def augment_boxes(
    boxes_xyxy: NDArray[np.float64], source: tuple[int, int], augment: AugmentParams
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Move boxes xyxy [N, 4] with a source's pixels (height, width), and clip them to the output.

    Returns:
        Boxes xyxy [N, 4] in output pixels (some may have no area), and the visible fraction of
        each box's area, [N] in 0..1.
    """
    (x, y), (height, width) = augment.spans(source), augment.size
    scale = np.array([x.scale, y.scale] * 2)
    boxes = (boxes_xyxy - [x.start, y.start] * 2) * scale + [x.to, y.to] * 2
    if augment.flip:
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    whole = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    boxes = boxes.clip(0, [width, height] * 2)
    visible = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return boxes, visible / np.maximum(whole, np.finfo(np.float64).tiny)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Draws the random parameters of training images; see `params.Data`."""

    seed: int
    data: Data

    def draw(
        self, epoch: int, ids: Sequence[int], sizes: Sequence[tuple[int, int]]
    ) -> list[AugmentParams]:
        """Draw the geometry of the images `ids`, whose original (height, width) are `sizes`."""
        draws = uniforms(self.seed, epoch, "geometry", ids, _GEOMETRY_DRAWS)
        return [self._params(u, size) for u, size in zip(draws.tolist(), sizes, strict=True)]

    def draw_colour(self, epoch: int, ids: Sequence[int]) -> NDArray[np.float32] | None:
        """Draw factors of brightness, contrast and, if it varies, saturation.

        Returns:
            [len(ids), 2 or 3], around 1; None if no factor varies.
        """
        augment = self.data.augment
        spread = np.array([augment.brightness, augment.contrast, augment.saturation])
        if not spread.any():
            return None
        if not augment.saturation:
            spread = spread[:2]
        draws = uniforms(self.seed, epoch, "colour", ids, len(spread))
        return (1.0 + spread * (2.0 * draws - 1.0)).astype(np.float32)

    def _params(self, u: list[float], size: tuple[int, int]) -> AugmentParams:
        """Parameters from eight uniform numbers, each with one fixed meaning."""
        data, augment = self.data, self.data.augment
        short_side = data.short_sides[_below(u[1], len(data.short_sides))]
        region = _zoomed(augment, u[3:7])
        if u[2] < augment.crop_probability:
            region, size = _cropped(augment, size, u[3:])
        out = resized_size(*size, short_side, data.long_side)
        return AugmentParams(out, region, flip=u[0] < augment.flip_probability)


def _below(u: float, count: int) -> int:
    """A uniform number in [0, 1) as an integer in [0, count)."""
    return min(int(u * count), count - 1)


def _zoomed(augment: Augment, u: Sequence[float]) -> Region:
    """The region that shows the image enlarged by exp(+-zoom), stretched and shifted."""
    zoom, aspect, right, down = (2.0 * value - 1.0 for value in u)
    scale, stretch = math.exp(augment.zoom * zoom), math.exp(augment.aspect * aspect / 2.0)
    width, height = 1.0 / (scale * stretch), stretch / scale
    left = (1.0 - width) / 2.0 + augment.shift * right
    top = (1.0 - height) / 2.0 + augment.shift * down
    return Region(left, top, width, height)


def _cropped(
    augment: Augment, size: tuple[int, int], u: Sequence[float]
) -> tuple[Region, tuple[int, int]]:
    """DETR's random crop (resize, then cut a rectangle of random sides) as a region of the source.

    The reference resizes before the crop and again after it; here both are one resampling. The
    output size is computed from the returned crop's (height, width), in intermediate pixels.
    """
    short_side = augment.crop_short_sides[_below(u[0], len(augment.crop_short_sides))]
    height, width = resized_size(*size, short_side, UNBOUNDED)
    crop_width = _side(augment, width, u[1])
    crop_height = _side(augment, height, u[2])
    left, top = _below(u[3], width - crop_width + 1), _below(u[4], height - crop_height + 1)
    region = Region(left / width, top / height, crop_width / width, crop_height / height)
    return region, (crop_height, crop_width)


def crop_sides(augment: Augment, side: int) -> tuple[int, int]:
    """Return the smallest and largest side of the random crop along a side of `side` pixels.

    A side shorter than `crop_min` is kept whole; the reference fails there.
    """
    high = min(side, augment.crop_max)
    return min(augment.crop_min, high), high


def _side(augment: Augment, side: int, u: float) -> int:
    low, high = crop_sides(augment, side)
    return low + _below(u, high - low + 1)


def evaluation_size(data: Data, height: int, width: int) -> tuple[int, int]:
    """Return an image's output (height, width) in evaluation: with the largest short side."""
    return resized_size(height, width, max(data.short_sides), data.long_side)
