"""Normalise a batch's uint8 pixels for the model, on the batch's device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from runkey.data.dataset import IMAGENET_MEAN, IMAGENET_STD, Batch

GREY_WEIGHTS = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey value (ITU-R BT.601), as in PIL and torchvision."""


def normalise(batch: Batch, *, channels_last: bool = False) -> tuple[Tensor, Tensor]:
    """Apply the batch's colour factors, then (x / 255 - mean) / std with ImageNet's numbers.

    For brightness b, contrast c and saturation s of an image with mean m (over its valid pixels
    and channels): y = c b x + (1 - c) b m, then s y + (1 - s) grey(y). Values are not clipped, so
    the order of the three does not matter. An image's result does not depend on its batch, to the
    last bit. There is no device sync.

    Args:
        batch: on the device to compute on.
        channels_last: memory format of the result.

    Returns:
        Images float32 [B, 3, H, W], exactly 0 in the padding, and the padding mask
        bool [B, H, W], True in the padding.
    """
    count, _, height, width = batch.images.shape
    device = batch.images.device
    rows = torch.arange(height, device=device) < batch.sizes[:, :1]
    columns = torch.arange(width, device=device) < batch.sizes[:, 1:]
    scale, offset = _affine(batch)
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


def _affine(batch: Batch) -> tuple[Tensor, Tensor]:
    """Factor and summand, [B, 3] each, that normalise a uint8 value."""
    mean, std = constants(batch.images.device)
    if batch.colour is None:
        return (1.0 / std).expand(len(batch), 3), (-mean / std).expand(len(batch), 3)
    brightness, contrast = batch.colour[:, 0:1], batch.colour[:, 1:2]
    # In integers the sum is exact: padding and summation order do not change it.
    total = batch.images.sum(dim=(1, 2, 3), dtype=torch.int64)
    mean_pixel = (total / (3 * batch.sizes.prod(dim=1)))[:, None]
    neutral = (1.0 - contrast) * brightness * mean_pixel
    return contrast * brightness / std, (neutral - mean) / std


@cache
def constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ImageNet's mean and std on a 0..255 scale, [3] each; cached, as copying syncs."""
    mean, std = torch.tensor(IMAGENET_MEAN) * 255.0, torch.tensor(IMAGENET_STD) * 255.0
    return mean.to(device), std.to(device)


def _saturate(pixels: Tensor, saturation: Tensor) -> None:
    """Move pixels [B, H, W, 3] in place towards, or away from, their grey value."""
    red, green, blue = (pixels[..., i] * GREY_WEIGHTS[i] for i in range(3))
    grey = red.add_(green).add_(blue)
    factor = saturation[:, None, None, None]
    pixels.mul_(factor).add_((1.0 - factor) * grey[..., None])
