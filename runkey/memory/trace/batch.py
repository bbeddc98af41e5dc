"""Batches of a given size whose content does not matter."""

from __future__ import annotations

import torch

from runkey.data.batch import Batch
from runkey.memory.trace.events import Pass


def synthetic_batch(one: Pass, num_classes: int, colour: int | None) -> Batch:
    """A batch on the CPU, of real or of fake tensors.

    The last image is smaller, as in a real batch that pads.

    Args:
        one: sizes.
        num_classes: K.
        colour: factors of an image (2, or 3 with saturation); None: colours are not changed.
    """
    boxes = one.batch * one.objects
    sizes = torch.tensor([[one.height, one.width]] * one.batch)
    if one.batch > 1:
        sizes[-1, 0] = max(1, one.height * 3 // 4)
    images = torch.zeros(one.batch, one.height, one.width, 3, dtype=torch.uint8)
    return Batch(
        images=images.permute(0, 3, 1, 2),
        sizes=sizes,
        boxes_cxcywh=torch.linspace(0.2, 0.6, boxes * 4).view(boxes, 4),
        labels=torch.arange(boxes) % num_classes,
        counts=(one.objects,) * one.batch,
        image_ids=tuple(range(one.batch)),
        original_sizes=sizes,
        colour=None if colour is None else torch.ones(one.batch, colour),
    )
