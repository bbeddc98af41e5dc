"""A batch: uint8 pixels and targets, padded to one shape, as it travels to the device.

Shapes: B images, H x W padded pixels, N boxes of all images together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
Window = tuple[Batch, ...]
