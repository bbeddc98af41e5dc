"""Image files to what the model sees in evaluation: the same pixels, made of the same functions.

Where `prepare` keeps decoded images, evaluation resizes what it kept, so an image goes by way of
that size here too.
"""

from __future__ import annotations

import numpy as np
import torch

from runkey.data.augment import WHOLE
from runkey.data.batch import Batch
from runkey.data.cache import shrink
from runkey.data.check_images import exif_orientation, orient
from runkey.data.decode import ORIENTATIONS, open_image, to_rgb, turn
from runkey.data.geometry import crop_resize, place, resized_size
from runkey.model.model_files import Sizes


def preprocess(content: bytes, sizes: Sizes, image_id: int = 0) -> Batch:
    """Decode an image file and resize it as evaluation does.

    An image that EXIF says to turn by 90 or 270 degrees is turned, as `prepare` turns one whose
    size in the JSON is the turned one.  Like there, half turns and mirror images are not applied.

    Args:
        content: bytes of an image file.
        sizes: of the model's card.
        image_id: what the batch calls it.

    Returns:
        A batch of one image without objects; its original size is that of the turned image.

    Raises:
        OSError: it is no image, or cut short (PIL raises other types too for damaged files).
        UnknownRangeError: 32-bit pixels.
    """
    with open_image(content) as opened:
        orientation = exif_orientation(opened)
        image = to_rgb(opened)
    width, height = image.size if ORIENTATIONS[orientation][0] in (0, 180) else image.size[::-1]
    rotate, mirror = orient(orientation, image.size, (width, height))
    if sizes.cached:
        image = shrink(image, (sizes.short_side,), sizes.long_side)
    pixels = torch.from_numpy(turn(np.array(image), rotate, mirror)).permute(2, 0, 1)
    size = resized_size(height, width, sizes.short_side, sizes.long_side)
    source = (pixels.shape[1], pixels.shape[2])
    return Batch(
        images=crop_resize(pixels, place(WHOLE, source, size))[None],
        sizes=torch.tensor([size]),
        boxes_cxcywh=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        counts=(0,),
        image_ids=(image_id,),
        original_sizes=torch.tensor([[height, width]]),
    )
