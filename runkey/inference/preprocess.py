"""Preprocess an image file exactly as evaluation does: same functions, same pixels.

If `prepare` cached decoded images, evaluation resizes the cached ones, so this does both steps.
"""

from __future__ import annotations

import numpy as np
import torch

from runkey.data.augment import AugmentParams, augment_image, resized_size
from runkey.data.cache import shrink
from runkey.data.dataset import Batch
from runkey.data.decode import exif_orientation, exif_rotation, open_image, to_rgb, turn
from runkey.model.weights import Sizes


def preprocess(content: bytes, sizes: Sizes, image_id: int = 0) -> Batch:
    """Decode an image file and resize it as evaluation does.

    EXIF rotations by 90 and 270 degrees are applied (orientations 5 to 8), as `prepare` applies
    them if the JSON has the rotated size. Orientations 2 to 4 (mirrored, upside down) are not
    applied, here or in `prepare`: a phone photo with orientation 3 stays upside down.

    Returns:
        A batch of one image without objects; its original size is that of the rotated image.

    Raises:
        OSError: not an image, or truncated (for damaged files PIL raises other types too).
        UnknownRangeError: 32-bit pixels, and the model was trained without an intensity range.
    """
    with open_image(content) as opened:
        orientation = exif_orientation(opened)
        image = to_rgb(opened, sizes.intensity_range)
    rotate, mirror = exif_rotation(orientation, image.size, image.size[::-1])
    width, height = image.size[::-1] if rotate else image.size
    if sizes.cached:
        image = shrink(image, (sizes.short_side,), sizes.long_side)
    pixels = torch.from_numpy(turn(np.array(image), rotate, mirror)).permute(2, 0, 1)
    size = resized_size(height, width, sizes.short_side, sizes.long_side)
    return Batch(
        images=augment_image(pixels, AugmentParams(size))[None],
        sizes=torch.tensor([size]),
        boxes_cxcywh=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        counts=(0,),
        image_ids=(image_id,),
        original_sizes=torch.tensor([[height, width]]),
    )
