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
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
from numpy.typing import NDArray

from runkey.params import Augment, Data, Params

if TYPE_CHECKING:
    from torch import Tensor

Purpose = Literal["order", "windows", "geometry", "colour", "zoom_out", "mosaic"]
"""What random numbers are for; the name is hashed. "windows" orders an epoch's global batches."""

Ids = Sequence[int] | NDArray[np.int64]
"""Image ids."""
Sizes = Sequence[tuple[int, int]] | NDArray[np.int64]
"""(height, width) of images, pixels."""

OUTSIDE_RGB = (124, 116, 104)
"""Colour of output pixels outside the source: ImageNet's mean, which is normalised to about 0."""
UNBOUNDED = 2**31
"""A long side without effect, for the reference's resize before its crop."""
CROP_STEPS = 10
"""A crop by fractions has sides of n/10 of the image's, so that its possible shapes are few."""
MOSAIC_IMAGES = 4
_MOSAIC_CENTRE = (0.3, 0.7)
"""Range of the point where a mosaic's images meet, as a fraction of width and height."""
_GEOMETRY_DRAWS, _ZOOM_OUT_DRAWS, _MOSAIC_DRAWS = 8, 4, 32

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


def uniforms(seed: int, epoch: int, purpose: Purpose, ids: Ids, draws: int) -> NDArray[np.float64]:
    """Draw independent uniform numbers in [0, 1), with 32 random bits each.

    They are a pure function of the arguments; there is no random state. Each seed, epoch, purpose
    and image id (modulo 2^64) has numbers of its own: a row of the returned [len(ids), draws].
    """
    blocks = -(-draws // 4)
    if not isinstance(ids, np.ndarray):
        ids = np.array([i & 0xFFFFFFFFFFFFFFFF for i in ids], dtype=np.uint64)
    wide = ids.astype(np.uint64).repeat(blocks)
    block = np.tile(np.arange(blocks, dtype=np.uint64), len(ids))
    counters = np.stack((block, wide & _MASK, wide >> _HALF, np.zeros_like(block)), axis=1)
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    words = philox(counters, struct.unpack("<2I", digest))
    return words.reshape(len(ids), blocks * 4)[:, :draws] / 2.0**32


def permutation(seed: int, epoch: int, purpose: Purpose, ids: Ids) -> NDArray[np.int64]:
    """Return positions 0..len(ids)-1 in random order: sorted by one `uniforms` number per id."""
    return np.argsort(uniforms(seed, epoch, purpose, ids, 1)[:, 0], kind="stable")


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


def resized_sizes(
    sizes: NDArray[np.int64], short_side: NDArray[np.int64], long_side: int
) -> NDArray[np.int64]:
    """Return `resized_size` of many (height, width), [N, 2], each with its short side, [N]."""
    low, high = sizes.min(axis=1), sizes.max(axis=1)
    fitting = np.maximum(1, np.rint(long_side * low / high).astype(np.int64))
    short = np.where(high / low * short_side > long_side, fitting, short_side)
    long = np.minimum((short * high / low).astype(np.int64), np.maximum(long_side, short))
    upright = sizes[:, 0] <= sizes[:, 1]
    return np.stack((np.where(upright, short, long), np.where(upright, long, short)), axis=1)


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
    """Mirror the output left-right."""
    tiles: tuple[Tile, ...] = ()
    """The images of a mosaic, which fill the output; `region` and `flip` then mean nothing."""

    def images(self, index: int) -> tuple[Tile, ...]:
        """Return the images that fill the output: the tiles, or the one at `index`."""
        return self.tiles or (Tile(index, self),)

    def spans(self, source: tuple[int, int]) -> tuple[Span, Span]:
        """Round the region to whole pixels of a source (height, width); return (x, y)."""
        region = self.region
        return (
            _span(region.left, region.width, source[1], self.size[1]),
            _span(region.top, region.height, source[0], self.size[0]),
        )


@dataclass(frozen=True, slots=True)
class Tile:
    """An image, or a part of one, in an output."""

    index: int
    """The image's position in the index."""
    augment: AugmentParams
    """Its geometry; the size is the tile's."""
    left: int = 0
    top: int = 0
    """Of its upper left corner in the output, pixels."""


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


def augment_image(image: Tensor, augment: AugmentParams, out: Tensor | None = None) -> Tensor:
    """Crop, mirror and resize in one resampling, bilinear with antialiasing.

    From uint8 [3, h, w] to uint8 [3, *augment.size], in `out` if it is given; the output is
    `OUTSIDE_RGB` outside the source. Channels last in memory is fast.
    """
    import torch  # here, since `prepare` does without
    from torch.nn import functional

    if out is None:
        out = torch.empty(*augment.size, 3, dtype=torch.uint8).permute(2, 0, 1)
    x, y = augment.spans((image.shape[1], image.shape[2]))
    part = image[:, y.start : y.stop, x.start : x.stop]
    target = (y.to_stop - y.to, x.to_stop - x.to)
    grows = math.prod(target) > part.shape[1] * part.shape[2]
    if augment.flip and grows:  # mirroring first gives the same bits, of fewer pixels
        part = part.flip(-1)
    if part.shape[1:] != target:
        # As a batch of one that torch recognises as channels last: 2.4 times faster.
        one = part.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        part = functional.interpolate(one, size=target, mode="bilinear", antialias=True)[0]
    if augment.flip and not grows:
        part = part.flip(-1)
    if target != augment.size:
        out.copy_(torch.tensor(OUTSIDE_RGB, dtype=torch.uint8)[:, None, None])
        left = augment.size[1] - x.to_stop if augment.flip else x.to
        out[:, y.to : y.to_stop, left : left + target[1]] = part
    else:
        out.copy_(part)
    return out


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


@dataclass(frozen=True, slots=True, eq=False)
class Draws(Sequence["AugmentParams"]):
    """The geometry of an epoch's images: all output sizes, the rest when it is asked for."""

    augmentation: Augmentation
    originals: NDArray[np.int64]
    """[N, 2]: (height, width) of the images, pixels."""
    sizes: NDArray[np.int64]
    """[N, 2]: output (height, width), pixels."""
    geometry: NDArray[np.float64]
    """[N, 8] uniform numbers; each has one fixed meaning."""
    zoom_outs: NDArray[np.float64] | None
    """[N, 4] uniform numbers; None: no zoom-out."""
    mosaics: NDArray[np.float64] | None
    """[N, 32] uniform numbers; None: no mosaic."""

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> AugmentParams: ...
    @overload
    def __getitem__(self, index: slice) -> list[AugmentParams]: ...
    def __getitem__(self, index: int | slice) -> AugmentParams | list[AugmentParams]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.augmentation.params(self, range(len(self))[index])


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Draws the random parameters of training images; see `params.Data`."""

    seed: int
    data: Data
    plain_from: int | None = None
    """First epoch without zoom-out and mosaic; None: they never end."""

    def draw(self, epoch: int, ids: Ids, sizes: Sizes) -> Draws:
        """Draw the geometry of the images `ids`, whose original (height, width) are `sizes`.

        A mosaic takes its other images from `ids`, so these must be the whole training split.
        """
        augment, plain = self.data.augment, self._is_plain(epoch)
        zoom_outs = mosaics = None
        if augment.zoom_out_probability and not plain:
            zoom_outs = uniforms(self.seed, epoch, "zoom_out", ids, _ZOOM_OUT_DRAWS)
        if augment.mosaic_probability and not plain and len(ids) >= MOSAIC_IMAGES:
            mosaics = uniforms(self.seed, epoch, "mosaic", ids, _MOSAIC_DRAWS)
        geometry = uniforms(self.seed, epoch, "geometry", ids, _GEOMETRY_DRAWS)
        originals = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
        outputs = self._output_sizes(geometry, originals)
        return Draws(self, originals, outputs, geometry, zoom_outs, mosaics)

    def params(self, drawn: Draws, index: int) -> AugmentParams:
        """Compute the geometry of one image of a draw."""
        canvas = WHOLE
        if drawn.zoom_outs is not None:
            canvas = self._canvas(drawn.zoom_outs[index].tolist())
        size = tuple(drawn.originals[index].tolist())
        params = self._params(drawn.geometry[index].tolist(), size, canvas)
        if drawn.mosaics is None or min(params.size) == 1:
            return params
        chance, *mosaic = drawn.mosaics[index].tolist()
        if chance >= self.data.augment.mosaic_probability:
            return params
        return self._mosaic(mosaic, index, drawn.originals, params.size)

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

    def _is_plain(self, epoch: int) -> bool:
        return self.plain_from is not None and epoch >= self.plain_from

    def _canvas(self, u: list[float]) -> Region:
        """What an image is shown on: itself, or by zoom-out a larger canvas around it.

        SSD's expansion (Liu et al. 2016, arXiv:1512.02325, section 3.6): the canvas's sides are
        the image's times a uniform number, the place of the image on it is uniform too.
        """
        augment, (chance, size, right, down) = self.data.augment, u
        if chance >= augment.zoom_out_probability:
            return WHOLE
        ratio = 1.0 + (augment.zoom_out_max - 1.0) * size
        return Region((1.0 - ratio) * right, (1.0 - ratio) * down, ratio, ratio)

    def _output_sizes(
        self, u: NDArray[np.float64], originals: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return the output (height, width) that `_params` computes, of all images, [N, 2]."""
        data, augment = self.data, self.data.augment
        sizes = originals.copy()
        rows = np.flatnonzero(u[:, 2] < augment.crop_probability)
        if len(rows):
            crop = _crop_sizes_by_fraction if augment.crop_fraction else _crop_sizes
            sizes[rows] = crop(augment, originals[rows], u[rows, 3:])
        short_sides = np.array(data.short_sides)
        chosen = short_sides[_all_below(u[:, 1], len(short_sides))]
        return resized_sizes(sizes, chosen, data.long_side)

    def _params(self, u: list[float], size: tuple[int, int], canvas: Region) -> AugmentParams:
        """Parameters from eight uniform numbers, each with one fixed meaning."""
        data, augment = self.data, self.data.augment
        short_side = data.short_sides[_below(u[1], len(data.short_sides))]
        region = _inside(canvas, _zoomed(augment, u[3:7]))
        if u[2] < augment.crop_probability:
            crop = _cropped_by_fraction if augment.crop_fraction else _cropped
            region, size = crop(augment, size, u[3:])
        out = resized_size(*size, short_side, data.long_side)
        return AugmentParams(out, region, flip=u[0] < augment.flip_probability)

    def _mosaic(
        self, u: list[float], index: int, sizes: NDArray[np.int64], out: tuple[int, int]
    ) -> AugmentParams:
        """Four images around a random point of an output of unchanged size, from 31 numbers.

        Mosaic of YOLOv4 (Bochkovskiy et al. 2020, arXiv:2004.10934, section 3.4). Each image is
        reduced until it just covers its tile, then zoomed, stretched, shifted and mirrored like a
        single image. The image at `index` comes into any of the tiles.
        """
        low, high = _MOSAIC_CENTRE
        y, x = (round(side * (low + (high - low) * v)) for side, v in zip(out, u, strict=False))
        images = _with_others(index, len(sizes), u[2:5])
        first = _below(u[5], MOSAIC_IMAGES)
        tiles = []
        for number in range(MOSAIC_IMAGES):
            lower, right = divmod(number, 2)
            size = (out[0] - y if lower else y, out[1] - x if right else x)
            image = images[(first + number) % MOSAIC_IMAGES]
            own = u[6 + 6 * number :][:6]
            region = _inside(
                _cover(sizes[image].tolist(), size, own[0]), _zoomed(self.data.augment, own[2:])
            )
            flip = own[1] < self.data.augment.flip_probability
            augment = AugmentParams(size, region, flip)
            tiles.append(Tile(image, augment, x if right else 0, y if lower else 0))
        return AugmentParams(out, tiles=tuple(tiles))


def build_augmentation(params: Params) -> Augmentation:
    """Build the augmentation of a training."""
    plain = params.data.augment.plain_epochs
    return Augmentation(params.seed, params.data, max(0, params.training.epochs - plain))


def _all_below(u: NDArray[np.float64], count: int | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.minimum((u * count).astype(np.int64), count - 1)


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


def _inside(outer: Region, inner: Region) -> Region:
    """The region `inner`, given as fractions of the region `outer`, in those of the image."""
    return Region(
        outer.left + outer.width * inner.left,
        outer.top + outer.height * inner.top,
        outer.width * inner.width,
        outer.height * inner.height,
    )


def _cover(source: Sequence[int], tile: tuple[int, int], u: float) -> Region:
    """The largest region of a source (height, width) with the tile's ratio, at a random place."""
    ratio = (tile[1] * source[0]) / (tile[0] * source[1])
    width, height = min(1.0, ratio), min(1.0, 1.0 / ratio)
    return Region(u * (1.0 - width), u * (1.0 - height), width, height)


def _with_others(index: int, count: int, u: Sequence[float]) -> list[int]:
    """`index`, and for each uniform number another integer in [0, count); all are different."""
    chosen = [index]
    for value in u:
        other = _below(value, count - len(chosen))
        for one in sorted(chosen):  # the other-th of those that are not chosen yet
            other += other >= one
        chosen.append(other)
    return chosen


def _cropped_by_fraction(
    augment: Augment, size: tuple[int, int], u: Sequence[float]
) -> tuple[Region, tuple[int, int]]:
    """A random crop whose sides are fractions of the image's; also return its (height, width).

    As in SSD (see `_canvases`), but no overlap with an object is asked for, so that a crop does
    not depend on the boxes.
    """
    sides = crop_fractions(augment)
    width, height = sides[_below(u[1], len(sides))], sides[_below(u[2], len(sides))]
    region = Region(u[3] * (1.0 - width), u[4] * (1.0 - height), width, height)
    return region, crop_size(size, height, width)


def crop_fractions(augment: Augment) -> list[float]:
    """Return every side that a crop by fractions can have, as a fraction of the image's."""
    low = max(1, math.ceil(augment.crop_fraction * CROP_STEPS - 1e-9))
    return [n / CROP_STEPS for n in range(low, CROP_STEPS + 1)]


def crop_size(size: tuple[int, int], height: float, width: float) -> tuple[int, int]:
    """Return the (height, width) in pixels of a crop by fractions of an image of `size`."""
    return max(1, round(size[0] * height)), max(1, round(size[1] * width))


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


def _crop_sizes(
    augment: Augment, sizes: NDArray[np.int64], u: NDArray[np.float64]
) -> NDArray[np.int64]:
    """The (height, width) of `_cropped`, of many images, [N, 2]."""
    short_sides = np.array(augment.crop_short_sides)
    chosen = short_sides[_all_below(u[:, 0], len(short_sides))]
    high = np.minimum(resized_sizes(sizes, chosen, UNBOUNDED), augment.crop_max)
    low = np.minimum(augment.crop_min, high)
    sides: NDArray[np.int64] = low + _all_below(u[:, [2, 1]], high - low + 1)
    return sides


def _crop_sizes_by_fraction(
    augment: Augment, sizes: NDArray[np.int64], u: NDArray[np.float64]
) -> NDArray[np.int64]:
    """The (height, width) of `_cropped_by_fraction`, of many images, [N, 2]."""
    sides = np.array(crop_fractions(augment))
    parts = sides[_all_below(u[:, [2, 1]], len(sides))]
    cropped: NDArray[np.int64] = np.maximum(1, np.rint(sizes * parts).astype(np.int64))
    return cropped


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
