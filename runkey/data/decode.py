"""Image files to 8-bit RGB: the one decoder that checking, loading and drawing share.

Every mode that a photograph comes in is brought to RGB by a stated rule; what has no such rule
(32-bit integers and floats: nobody knows their range) is refused.  Transparent pixels lie on white.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops
from torch import Tensor

from runkey.errors import DataError

# PIL's own limit warns at 89 and stops at 179 megapixels, whatever the user allows.  Ours is
# `data.max_megapixels`, judged by the header before a pixel is decoded.
Image.MAX_IMAGE_PIXELS = None
# What PIL says about odd metadata (EXIF cut short, unknown TIFF tags) is nothing to a detector.
warnings.filterwarnings("ignore", module=r"PIL\.")

# No EPS or WMF: PIL hands those to an outside program.  JPEG includes the MPO of phones.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")
BACKGROUND = (255, 255, 255)
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_NO_KNOWN_RANGE = ("I", "F")

# EXIF orientation -> (clockwise degrees, mirrored left-right before turning).
ORIENTATIONS = {
    1: (0, False),
    2: (0, True),
    3: (180, False),
    4: (180, True),
    5: (270, True),
    6: (90, False),
    7: (90, True),
    8: (270, False),
}


class UnknownRangeError(ValueError):
    """Pixels of 32 bits, whose black and white nobody states."""


def open_image(content: bytes) -> Image.Image:
    """Read the header of an image file's bytes; no pixel is decoded.

    Raises:
        OSError: it is no image of a format in `FORMATS`.
    """
    return Image.open(io.BytesIO(content), formats=FORMATS)


def is_unusual(image: Image.Image) -> bool:
    """Whether the pixels are anything but 8-bit RGB without transparency."""
    raw_modes = (str(tile[3]) for tile in getattr(image, "tile", ()))
    return image.mode != "RGB" or "transparency" in image.info or any(";16" in m for m in raw_modes)


def to_rgb(image: Image.Image) -> Image.Image:
    """The first frame as 8-bit RGB.

    Grey is repeated three times; 16-bit grey is scaled from 0..65535 to 0..255; transparency is
    laid on white; CMYK is read by Adobe's inverted convention only where the file says so.

    Raises:
        UnknownRangeError: 32-bit integer or float pixels.
        OSError: the file is cut short (PIL raises other types too for damaged files).
    """
    image.load()
    if image.mode in _NO_KNOWN_RANGE:
        raise UnknownRangeError(f"32-bit pixels (mode {image.mode}) of no known range")
    if image.mode in _SIXTEEN_BITS:
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        # La and RGBa (premultiplied) convert to RGBA only by way of their own kin.
        kin = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
        clear = (image.convert(kin) if kin else image).convert("RGBA")
        ground = Image.new("RGBA", clear.size, (*BACKGROUND, 255))
        return Image.alpha_composite(ground, clear).convert("RGB")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # PIL takes every CMYK JPEG for Adobe's, which stores the inks inverted.
        return ImageChops.invert(image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def turn(pixels: NDArray[np.uint8], rotate: int, mirror: bool) -> NDArray[np.uint8]:
    """Mirror [H, W, 3] left-right if asked, then turn it clockwise by 0, 90, 180 or 270 degrees."""
    if mirror:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(np.rot90(pixels, k=-(rotate // 90)))


def decode_rgb(path: Path, rotate: int, mirror: bool) -> Tensor:
    """Decode an image that `prepare` has accepted.

    Args:
        path: the file.
        rotate: clockwise degrees, 0, 90, 180 or 270, as `Record.rotate` has it.
        mirror: whether to mirror left-right before turning, as `Record.mirror` has it.

    Returns:
        uint8 [3, H, W] RGB, channels last in memory (as resizing likes it), free to be written to.

    Raises:
        DataError: the file is gone, or no longer what `prepare` saw.
    """
    try:
        content = path.read_bytes()
        with open_image(content) as image:
            pixels = np.array(to_rgb(image))
    # PIL's decoders raise nearly anything (struct.error, SyntaxError, IndexError) on bad bytes.
    except Exception as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else f"unreadable ({error})"
        raise DataError(
            f"{path}: {reason}, though prepare accepted it; run `dvc repro prepare` again"
        ) from error
    if rotate or mirror:
        pixels = turn(pixels, rotate, mirror)
    return torch.from_numpy(pixels).permute(2, 0, 1)
