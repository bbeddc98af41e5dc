"""Batches: the requests for them, their maker in loader processes, their normalisation for models.

A request holds all that is random, so every process makes the same bytes of it.
Shapes: B images, H x W padded pixels, N boxes of all images.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from runkey.data.augment import (
    Augmentation,
    AugmentParams,
    Tile,
    augment_boxes,
    augment_image,
)
from runkey.data.cache import CachePlan, ImageCache
from runkey.data.decode import decode_rgb, resize
from runkey.data.index import Index
from runkey.errors import RunkeyError


class Normalisation(NamedTuple):
    """Mean and standard deviation of RGB in 0..1; `runkey.model.backbones` says a body's."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY_WEIGHTS = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey value (ITU-R BT.601), as in PIL and torchvision."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Images of one forward pass and their targets, padded to one shape."""

    images: Tensor
    """uint8 [B, 3, H, W] RGB, channels last in memory; zero right of and below each image's valid
    area."""
    sizes: Tensor
    """int64 [B, 2]: valid (height, width) of each image, pixels."""
    boxes_cxcywh: Tensor
    """float32 [N, 4], fractions of the valid width and height."""
    labels: Tensor
    """int64 [N], class indices 0..K-1."""
    counts: tuple[int, ...]
    """Boxes of each image; they sum to N. On the host, so that no device sync is needed."""
    image_ids: tuple[int, ...]
    """COCO image ids."""
    original_sizes: Tensor
    """int64 [B, 2]: (height, width) of the original image, pixels; on the host."""
    colour: Tensor | None = None
    """float32 [B, 2 or 3]: factors of brightness, contrast and, if it varies, saturation; None:
    colours do not change."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device) -> Batch:
        """Copy the tensors that model and criterion read to a device, without waiting."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy the same tensors to page-locked memory; torch's loader calls this by name."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            images=function(self.images),
            sizes=function(self.sizes),
            boxes_cxcywh=function(self.boxes_cxcywh),
            labels=function(self.labels),
            colour=None if self.colour is None else function(self.colour),
        )


AugmentedImage = tuple[int, AugmentParams]
"""An image's position in the index, and its augmentation."""
GlobalBatch = tuple[Batch, ...]
"""The micro-batches of one optimizer step. The loader yields them together, so that a step knows
its number of boxes before the first forward pass."""


@dataclass(frozen=True, slots=True)
class Request:
    """A batch to make."""

    images: Sequence[AugmentedImage]
    epoch: int | None = None
    """Epoch of the colour factors; None: colours do not change."""


@dataclass(frozen=True, slots=True)
class BatchMaker(Dataset["Batch | RunkeyError"]):
    """Makes the batches of one split; in a loader process, torch calls it by `[request]`."""

    index: Index
    folder: Path
    """The data folder, which the names of files are relative to."""
    cache: ImageCache | None
    augmentation: Augmentation | None
    """Draws the colour factors and says how much of a box must stay visible; None (evaluation):
    colours do not change, every box is kept that has area, and `decode.resize` makes the size."""
    max_objects: int
    """Most boxes of an image, the largest ones are kept; 0: no limit."""
    plan: CachePlan | None = None
    """Of the cache; says what is made of images from files too."""

    def make(self, request: Request) -> Batch:
        """Read, resample and pad the images of a request; a DataError names an unreadable one."""
        height = max(augment.size[0] for _, augment in request.images)
        width = max(augment.size[1] for _, augment in request.images)
        images = _empty_images(len(request.images), height, width)
        objects = []
        for i, (index, augment) in enumerate(request.images):
            images[i, :, augment.size[0] :].zero_()
            images[i, :, : augment.size[0], augment.size[1] :].zero_()
            sources = []
            for tile in augment.images(index):
                image = self.image(tile.index, tile.augment.size)
                rows = slice(tile.top, tile.top + tile.augment.size[0])
                columns = slice(tile.left, tile.left + tile.augment.size[1])
                augment_image(image, tile.augment, images[i, :, rows, columns])
                sources.append((image.shape[1], image.shape[2]))
            objects.append(self.visible_objects(index, augment, sources))
        boxes_cxcywh, labels = zip(*objects, strict=True)
        chosen = [index for index, _ in request.images]
        ids = tuple(self.index.ids[chosen].tolist())
        colour = None
        if self.augmentation is not None and request.epoch is not None:
            colour = self.augmentation.draw_colour(request.epoch, ids)
        return Batch(
            images=images,
            sizes=torch.tensor([augment.size for _, augment in request.images]),
            boxes_cxcywh=torch.from_numpy(np.concatenate(boxes_cxcywh).astype(np.float32)),
            labels=torch.from_numpy(np.concatenate(labels)),
            counts=tuple(map(len, labels)),
            image_ids=ids,
            original_sizes=torch.from_numpy(self.index.sizes[chosen]),
            colour=None if colour is None else torch.from_numpy(colour),
        )

    def __getitem__(self, request: Request) -> Batch | RunkeyError:
        """Make a batch; return a `RunkeyError` as a value, as torch would add its traceback."""
        try:
            return self.make(request)
        except RunkeyError as error:
            return error

    def visible_objects(
        self,
        index: int,
        augment: AugmentParams,
        sources: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Compute the boxes and labels of an augmented image; no pixel is read.

        `sources` are the (height, width) of the decoded images, pixels, one or those of a mosaic;
        None: the originals' sizes. Returns boxes cxcywh [n, 4], fractions of the output, and
        labels [n].
        """
        tiles = augment.images(index)
        if sources is None:
            sources = [self.index.size(tile.index) for tile in tiles]
        kept, kept_labels = [], []
        for tile, source in zip(tiles, sources, strict=True):
            boxes, labels = self._visible_in(tile, source)
            kept.append(boxes + [tile.left, tile.top] * 2)
            kept_labels.append(labels)
        boxes_xyxy, labels = np.concatenate(kept), np.concatenate(kept_labels)
        if self.max_objects and len(labels) > self.max_objects:
            sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
            largest = np.argsort(-sides.prod(axis=1), kind="stable")[: self.max_objects]
            keep = np.sort(largest)
            boxes_xyxy, labels = boxes_xyxy[keep], labels[keep]
        boxes_xyxy = boxes_xyxy / (augment.size[::-1] * 2)
        low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
        return np.concatenate(((low + high) / 2.0, high - low), axis=1), labels

    def _visible_in(
        self, tile: Tile, source: tuple[int, int]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Boxes xyxy in pixels of the tile, and labels, of the objects that are seen in it."""
        fractions, labels = self.index.objects(tile.index)
        source_xyxy = fractions * (source[::-1] * 2)
        boxes_xyxy, visible = augment_boxes(source_xyxy, source, tile.augment)
        least = self.augmentation.data.augment.min_visible if self.augmentation else 0.0
        keep = np.flatnonzero(visible > least)
        return boxes_xyxy[keep], labels[keep]

    def image(self, index: int, size: tuple[int, int]) -> Tensor:
        """Read an image, uint8 [3, h, w]; without augmentation in an output (height, width)."""
        if self.cache is not None and index < len(self.cache):
            image = self.cache.image(index)
        else:
            shrunk = None
            if self.plan is not None and self.plan.shrinks:
                shrunk = _shape(self.plan.shapes[index])
            path = self.folder / self.index.file(index)
            image = decode_rgb(path, *self.index.decoding(index), shrunk)
        if self.augmentation is None and image.shape[1:] != size:
            pixels = np.array(resize(image.permute(1, 2, 0).numpy(), size))
            return torch.from_numpy(pixels).permute(2, 0, 1)
        return image


def _shape(pair: NDArray[np.int64]) -> tuple[int, int]:
    height, width = pair.tolist()
    return height, width


def _empty_images(count: int, height: int, width: int) -> Tensor:
    """Return uint8 [count, 3, height, width], channels last, for a batch.

    In a loader process it is in shared memory, where torch would copy it. Elsewhere it is in the
    memory of a batch that is gone: the first write to new pages takes longer than a resize.
    """
    shape = (count, height, width, 3)
    if get_worker_info() is not None:
        with suppress(RuntimeError):  # no room, which `loader._start_worker` deals with
            size = math.prod(shape)
            shared = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
            return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape).permute(0, 3, 1, 2)
    size = math.prod(shape)
    fitting = sum(len(buffer) >= size for buffer in _FREE)
    buffer = _FREE.pop(fitting - 1) if fitting else np.empty(size, np.uint8)
    part = buffer[:size]  # lives as long as a tensor of this memory
    weakref.finalize(part, _give_back, buffer).atexit = False
    return torch.from_numpy(part).view(shape).permute(0, 3, 1, 2)


_FREE: list[NDArray[np.uint8]] = []
"""Memory of batches that are gone, the largest first."""
_MOST_FREE = 2


def _give_back(buffer: NDArray[np.uint8]) -> None:
    _FREE.append(buffer)
    _FREE.sort(key=len, reverse=True)
    del _FREE[_MOST_FREE:]


def normalise(
    batch: Batch, by: Normalisation = IMAGENET, *, channels_last: bool = False
) -> tuple[Tensor, Tensor]:
    """Apply the batch's colour factors, then (x / 255 - mean) / std.

    For brightness b, contrast c and saturation s of an image with mean m (over its valid pixels
    and channels): y = c b x + (1 - c) b m, then s y + (1 - s) grey(y). Values are not clipped, so
    the order of the three does not matter. An image's result does not depend on its batch, to the
    last bit. It is computed on the batch's device, without a sync.

    Returns:
        Images float32 [B, 3, H, W], exactly 0 in the padding, and the padding mask
        bool [B, H, W], True in the padding.
    """
    count, _, height, width = batch.images.shape
    device = batch.images.device
    rows = torch.arange(height, device=device) < batch.sizes[:, :1]
    columns = torch.arange(width, device=device) < batch.sizes[:, 1:]
    scale, offset = _affine(batch, by)
    nhwc = batch.images.permute(0, 2, 3, 1)
    pixels = nhwc.to(torch.float32, memory_format=torch.contiguous_format)
    if batch.colour is not None and batch.colour.shape[1] == 3:
        _saturate(pixels, batch.colour[:, 2])
    # On rows of W * 3 numbers: broadcasting over an innermost axis of 3 is 20 times slower.
    # The offset is added as a product of valid rows and columns, so the padding stays exactly 0.
    lines = pixels.view(count, height, width * 3)
    lines.mul_(scale.repeat(1, width)[:, None])
    offsets = (columns[:, :, None] * offset[:, None]).view(count, 1, width * 3)
    lines.addcmul_(rows[:, :, None].to(torch.float32), offsets)
    images = pixels.permute(0, 3, 1, 2)
    padding = ~(rows[:, :, None] & columns[:, None, :])
    return (images if channels_last else images.contiguous()), padding


def _affine(batch: Batch, by: Normalisation) -> tuple[Tensor, Tensor]:
    """Factor and summand, [B, 3] each, that normalise a uint8 value."""
    mean, std = colour_constants(batch.images.device, by)
    if batch.colour is None:
        return (1.0 / std).expand(len(batch), 3), (-mean / std).expand(len(batch), 3)
    brightness, contrast = batch.colour[:, 0:1], batch.colour[:, 1:2]
    # In integers the sum is exact: padding and summation order do not change it.
    total = batch.images.sum(dim=(1, 2, 3), dtype=torch.int64)
    mean_pixel = (total / (3 * batch.sizes.prod(dim=1)))[:, None]
    neutral = (1.0 - contrast) * brightness * mean_pixel
    return contrast * brightness / std, (neutral - mean) / std


@cache
def colour_constants(device: torch.device, by: Normalisation = IMAGENET) -> tuple[Tensor, Tensor]:
    """Return mean and std on a 0..255 scale, [3] each; cached, as copying syncs."""
    mean, std = torch.tensor(by.mean) * 255.0, torch.tensor(by.std) * 255.0
    return mean.to(device), std.to(device)


def _saturate(pixels: Tensor, saturation: Tensor) -> None:
    """Move pixels [B, H, W, 3] in place towards, or away from, their grey value."""
    red, green, blue = (pixels[..., i] * GREY_WEIGHTS[i] for i in range(3))
    grey = red.add_(green).add_(blue)
    factor = saturation[:, None, None, None]
    pixels.mul_(factor).add_((1.0 - factor) * grey[..., None])
