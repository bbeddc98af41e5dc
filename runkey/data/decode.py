"""Decode image files to 8-bit RGB; checking, loading, drawing and inference all use this.

Grey images of 16 bits or more are scaled by `data.intensity_range`; without it, 32-bit integers and
floats are refused, because their value range is unknown.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops
from torch import Tensor

from runkey.data.index import IntensityRange
from runkey.errors import DataError
from runkey.files import read_plain

# PIL's own limit warns at 89 and fails at 179 megapixels. `data.max_megapixels` replaces it; it is
# checked by the header before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None
# PIL warns of odd metadata (truncated EXIF, unknown TIFF tags), which does not affect the pixels.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Not EPS or WMF: PIL runs another program for those. JPEG includes the MPO of phones.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")
# EXIF's orientations -> (clockwise degrees, mirrored before rotating).
TURNED = {
    **{2: (0, True), 3: (180, False), 4: (180, True)},
    **{5: (270, True), 6: (90, False), 7: (90, True), 8: (270, False)},
}
SIDEWAYS = (5, 6, 7, 8)
"""EXIF's orientations of images that are stored on their side."""

_WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""PIL's modes of grey images of more than 8 bits."""


class UnknownRangeError(ValueError):
    """The image has 32-bit pixels, whose value range is unknown."""


def open_image(content: bytes) -> Image.Image:
    """Read the header of an image file's bytes; OSError if it is of no format in `FORMATS`."""
    return Image.open(io.BytesIO(content), formats=FORMATS)


def exif_orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1..8; 1 if there is none or it cannot be read."""
    if image.format == "TIFF":  # PIL rotates these itself
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, struct.error):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def exif_rotation(
    orientation: int, size: tuple[int, int], stated: tuple[int, int]
) -> tuple[int, bool]:
    """Return the rotation that shows an image upright by EXIF, unless the JSON contradicts it.

    An image on its side (orientations 5 to 8) stays as stored if the JSON has the shape that is
    stored: its boxes then lie in the stored pixels. Mirror images, rotations by 180 degrees and
    squares leave no trace in the size, so they are applied. `size` and `stated` are (width, height)
    as stored and in the JSON.

    Returns:
        Clockwise degrees, and whether to mirror left-right first.
    """
    as_stored = (size[1] - size[0]) * (stated[1] - stated[0]) > 0
    if orientation in SIDEWAYS and as_stored:
        return 0, False
    return TURNED.get(orientation, (0, False))


def is_unusual(image: Image.Image) -> bool:
    """Return True unless the pixels are 8-bit RGB without transparency."""
    return image.mode != "RGB" or "transparency" in image.info or is_deep_colour(image)


def is_deep_colour(image: Image.Image) -> bool:
    """Return True for colour of 16 bits in each channel, of which PIL reads the upper 8.

    The image must not have been loaded yet.
    """
    raw_modes = (str(tile[3]) for tile in getattr(image, "tile", ()))
    return image.mode not in _WIDE_GREY and any(";16" in mode for mode in raw_modes)


def wide_values(image: Image.Image) -> NDArray[Any] | None:
    """Return the pixels [H, W] of a grey image of more than 8 bits; None for any other."""
    return np.asarray(image) if image.mode in _WIDE_GREY else None


def _scale(values: NDArray[Any], intensity_range: IntensityRange | None) -> NDArray[np.uint8]:
    """Scale black..white (None: 0..65535) to 0..255; what lies outside is clipped, NaN is black."""
    scaled: NDArray[Any]
    if intensity_range is None:
        scaled = (values.astype(np.uint32) * 255 + 32767) // 65535
    else:
        black, white = intensity_range
        scaled = (values.astype(np.float64) - black) * (255 / (white - black))
        scaled = np.nan_to_num(scaled.clip(0, 255)) + 0.5
    return np.asarray(scaled, dtype=np.uint8)


def to_rgb(image: Image.Image, intensity_range: IntensityRange | None = None) -> Image.Image:
    """Convert the first frame to 8-bit RGB.

    Grey is repeated three times; grey of more than 8 bits is scaled by `intensity_range`, (black,
    white); transparent pixels are blended with white; CMYK is read by Adobe's inverted convention
    only if the file says so.

    Raises:
        UnknownRangeError: 32-bit integer or float pixels without a range.
        OSError: the file is truncated (for damaged files PIL raises other types too).
    """
    image.load()
    values = wide_values(image)
    if values is not None:
        if image.mode in ("I", "F") and intensity_range is None:
            shown = f"mode {image.mode}, values {values.min():.6g} to {values.max():.6g}"
            raise UnknownRangeError(f"32-bit pixels ({shown}) of no known range")
        return Image.fromarray(_scale(values, intensity_range)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        # La and RGBa (premultiplied) cannot be converted to RGBA directly.
        kin = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
        clear = (image.convert(kin) if kin else image).convert("RGBA")
        ground = Image.new("RGBA", clear.size, "white")
        return Image.alpha_composite(ground, clear).convert("RGB")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # PIL treats every CMYK JPEG as Adobe's, which stores the inks inverted.
        return ImageChops.invert(image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def turn(pixels: NDArray[np.uint8], rotate: int, mirror: bool) -> NDArray[np.uint8]:
    """Mirror [H, W, 3] left-right if asked, then rotate it clockwise (multiples of 90 degrees)."""
    if mirror:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(np.rot90(pixels, k=-(rotate // 90)))


def resize(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an upright image [H, W, 3] to (height, width) as evaluation and inference do.

    PIL's bilinear filter, antialiased when shrinking. An image of that size is returned itself.
    """
    if pixels.shape[:2] == size:
        return pixels
    resized = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized)


def decode_rgb(
    path: Path, rotate: int, mirror: bool, intensity_range: IntensityRange | None = None
) -> Tensor:
    """Decode an image that `prepare` has accepted, and turn and scale it as its record says.

    Returns uint8 [3, H, W] RGB, channels last in memory (resizing is faster so); may be modified.

    Raises:
        DataError: the file is missing or has changed since `prepare`.
    """
    try:
        content = read_plain(path)
        with open_image(content) as image:
            pixels = np.array(to_rgb(image, intensity_range))
    # PIL's decoders raise almost any type (struct.error, SyntaxError, IndexError) on bad bytes.
    except Exception as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else f"unreadable ({error})"
        raise DataError(
            f"{path}: {reason}, though prepare accepted it; run `dvc repro prepare` again"
        ) from error
    return torch.from_numpy(turn(pixels, rotate, mirror)).permute(2, 0, 1)
