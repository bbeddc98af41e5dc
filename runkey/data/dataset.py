"""Requests in, batches out: what runs in a loader process.

A request says which images, how they are seen and which epoch's colours they get, so answering it
needs no state: any process gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runkey.data.augment import View, Views, carry_boxes, crop_resize, place
from runkey.data.cache import ImageCache
from runkey.data.decode import decode_rgb
from runkey.data.index import Record
from runkey.errors import RunkeyError

# A batch: uint8 pixels and targets, padded to one shape, as it travels to the device.


# Mean and standard deviation of ImageNet in [0, 1], what torchvision's weights were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Batch:
    """Images of one forward pass with their targets, in one order."""

    images: Tensor
    """uint8 [B, 3, H, W] RGB; zero right of and below each image's valid area.  Channels last in
    memory, as the decoder, the resize and the GPU's convolutions like it."""
    sizes: Tensor
    """int64 [B, 2]: valid (height, width) of each image, pixels."""
    boxes_cxcywh: Tensor
    """float32 [N, 4], as parts of the valid width and height."""
    labels: Tensor
    """int64 [N], class indices 0..K-1."""
    counts: tuple[int, ...]
    """Boxes of each image; they sum to N.  On the host, so that nobody has to ask the device."""
    image_ids: tuple[int, ...]
    """COCO image ids."""
    original_sizes: Tensor
    """int64 [B, 2]: (height, width) of the original image, on the host."""
    colour: Tensor | None = None
    """float32 [B, 2 or 3]: brightness, contrast and (where it varies) saturation factors, or None
    for no change."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device) -> Batch:
        """Copy the tensors that the model and the criterion read, without waiting."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            images=move(self.images),
            sizes=move(self.sizes),
            boxes_cxcywh=move(self.boxes_cxcywh),
            labels=move(self.labels),
            colour=None if self.colour is None else move(self.colour),
        )

    def pin_memory(self) -> Batch:
        """Page-locked copies of the same tensors; the loader calls this by name."""
        return replace(
            self,
            images=self.images.pin_memory(),
            sizes=self.sizes.pin_memory(),
            boxes_cxcywh=self.boxes_cxcywh.pin_memory(),
            labels=self.labels.pin_memory(),
            colour=None if self.colour is None else self.colour.pin_memory(),
        )


# One optimizer step's images: micro-batches of at most `micro_batch` images each, the effective
# batch together.  The loader yields windows, so a step knows all its counts before it starts.
GlobalBatch = tuple[Batch, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One batch to make."""

    indices: tuple[int, ...]
    """Positions in the split's index."""
    views: tuple[View, ...]
    epoch: int | None = None
    """Which epoch's colour factors to use; None: unchanged colours."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A user's error as it comes out of a worker process: its one line, without a traceback."""

    line: str


@dataclass(frozen=True, slots=True)
class ImageTable:
    """A split's index as arrays: a tenth of the memory of records, and quick to send to workers.

    Crowd regions are left out: nothing is ever trained on them.
    """

    ids: tuple[int, ...]
    files: tuple[str, ...]
    turns: tuple[tuple[int, bool], ...]
    """(rotate, mirror) of each record."""
    sizes: tuple[tuple[int, int], ...]
    """Original (height, width), pixels."""
    starts: NDArray[np.int64]
    """[images + 1]: boxes of image i are starts[i] to starts[i + 1]."""
    boxes_xyxy: NDArray[np.float64]
    """[N, 4] as parts of the image's width and height."""
    labels: NDArray[np.int64]
    """[N] class indices."""

    def __len__(self) -> int:
        return len(self.ids)

    def objects(self, index: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Boxes [n, 4], xyxy as parts of the image, and labels [n] of one image."""
        part = slice(self.starts[index], self.starts[index + 1])
        return self.boxes_xyxy[part], self.labels[part]


def image_table(records: Sequence[Record]) -> ImageTable:
    """Make the table of an index."""
    kept = [[i for i, crowd in enumerate(r.crowd) if not crowd] for r in records]
    boxes = [r.boxes_xywh[i] for r, some in zip(records, kept, strict=True) for i in some]
    scale = [(r.width, r.height) * 2 for r, some in zip(records, kept, strict=True) for _ in some]
    labels = [r.labels[i] for r, some in zip(records, kept, strict=True) for i in some]
    xyxy = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    xyxy[:, 2:] += xyxy[:, :2]
    return ImageTable(
        ids=tuple(r.id for r in records),
        files=tuple(r.file for r in records),
        turns=tuple((r.rotate, r.mirror) for r in records),
        sizes=tuple((r.height, r.width) for r in records),
        starts=np.cumsum([0, *map(len, kept)], dtype=np.int64),
        boxes_xyxy=xyxy / np.array(scale, dtype=np.float64).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
    )


@dataclass(frozen=True, slots=True)
class BatchMaker:
    """Makes the batches of one split."""

    table: ImageTable
    folder: Path
    """The data folder, which `table.files` are relative to."""
    cache: ImageCache | None
    views: Views | None
    """Where colour factors come from; None: colours are never changed."""
    min_visible: float
    """A box is kept if more than this part of its area is in the picture."""
    max_objects: int
    """Boxes kept of an image, the largest ones; 0: all."""

    def make(self, request: Request) -> Batch:
        """Read, resample and pad the images of `request`.

        Raises:
            DataError: an image cannot be read.
        """
        height = max(view.size[0] for view in request.views)
        width = max(view.size[1] for view in request.views)
        padded = torch.zeros(len(request.views), height, width, 3, dtype=torch.uint8)
        images = padded.permute(0, 3, 1, 2)
        boxes, labels = [], []
        for i, (index, view) in enumerate(zip(request.indices, request.views, strict=True)):
            some_boxes, some_labels = self._place(index, view, images[i])
            boxes.append(some_boxes)
            labels.append(some_labels)
        ids = tuple(self.table.ids[index] for index in request.indices)
        colour = None
        if self.views is not None and request.epoch is not None:
            colour = self.views.draw_colour(request.epoch, ids)
        return Batch(
            images=images,
            sizes=torch.tensor([view.size for view in request.views]),
            boxes_cxcywh=torch.from_numpy(np.concatenate(boxes).astype(np.float32)),
            labels=torch.from_numpy(np.concatenate(labels)),
            counts=tuple(map(len, labels)),
            image_ids=ids,
            original_sizes=torch.tensor([self.table.sizes[index] for index in request.indices]),
            colour=None if colour is None else torch.from_numpy(colour),
        )

    def make_or_fail(self, request: Request) -> Batch | Failure:
        """`make`, with a user's error as a value: torch would wrap it into a page of text."""
        try:
            return self.make(request)
        except RunkeyError as error:
            return Failure(str(error))

    def objects_seen(
        self, index: int, view: View, source: tuple[int, int]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Boxes [n, 4] (cxcywh, 0..1) and labels [n] that a view of one image shows.

        Args:
            index: position of the image.
            view: how it is seen.
            source: (height, width) of the decoded image, pixels; no pixel is looked at.
        """
        height, width = source
        placement = place(view.region, source, view.size)
        parts_xyxy, labels = self.table.objects(index)
        source_xyxy = parts_xyxy * [width, height, width, height]
        boxes_xyxy, visible = carry_boxes(source_xyxy, placement, flip=view.flip)
        keep = self._keep(boxes_xyxy, visible)
        return _cxcywh(boxes_xyxy[keep] / ([*view.size[::-1]] * 2)), labels[keep]

    def _place(
        self, index: int, view: View, out: Tensor
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Put one image into the top left of `out`; give its boxes (cxcywh, 0..1) and labels."""
        image = self._image(index)
        height, width = image.shape[1:]
        pixels = crop_resize(image, place(view.region, (height, width), view.size))
        out[:, : view.size[0], : view.size[1]] = pixels.flip(-1) if view.flip else pixels
        return self.objects_seen(index, view, (height, width))

    def _keep(
        self, boxes_xyxy: NDArray[np.float64], visible: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Positions of the boxes that are trained on, in order."""
        keep = np.flatnonzero(visible > self.min_visible)
        if self.max_objects and len(keep) > self.max_objects:
            sides = boxes_xyxy[keep, 2:] - boxes_xyxy[keep, :2]
            largest = np.argsort(-sides.prod(axis=1), kind="stable")[: self.max_objects]
            keep = keep[np.sort(largest)]
        return keep

    def _image(self, index: int) -> Tensor:
        if self.cache is not None:
            return self.cache.image(index)
        return decode_rgb(self.folder / self.table.files[index], *self.table.turns[index])


def _cxcywh(boxes_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    return np.concatenate(((low + high) / 2.0, high - low), axis=1)
