"""Box formats and overlaps. The format is in the name: `boxes_cxcywh` or `boxes_xyxy`."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """Convert half and bfloat16 to float32; leave float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Convert [..., 4] (centre x, centre y, width, height) to (left, top, right, bottom)."""
    centre, size = boxes_cxcywh.chunk(2, dim=-1)
    return torch.cat((centre - 0.5 * size, centre + 0.5 * size), dim=-1)


def overlaps(boxes_xyxy: Tensor, other_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Compute IoU and generalised IoU (Rezatofighi et al. 2019) of boxes that broadcast together.

    IoU = intersection / union; GIoU = IoU - (hull - union) / hull, with hull the area of the
    smallest box around both.

    Args:
        boxes_xyxy: [..., 4], any unit.
        other_xyxy: [..., 4], broadcastable, same unit; [N, 1, 4] and [M, 4] give all pairs.

    Returns:
        IoU in 0..1 and GIoU in -1..1, each of the broadcast shape without its last dimension.
        Two boxes without area give NaN.
    """
    low_a, high_a = boxes_xyxy.chunk(2, dim=-1)
    low_b, high_b = other_xyxy.chunk(2, dim=-1)
    inner = _area((torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0))
    hull = _area((torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).clamp(min=0))
    union = _area(high_a - low_a) + _area(high_b - low_b) - inner
    iou = inner / union
    return iou, iou - (hull - union) / hull


def _area(sizes: Tensor) -> Tensor:
    # Not prod(-1): its backward pass asks the device whether a factor is zero.
    width, height = sizes.unbind(-1)
    return width * height
