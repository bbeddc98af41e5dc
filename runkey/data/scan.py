"""Read an image file once for `prepare`: its pixels, how to turn it, and what is wrong with it.

`scan_image` runs in several threads, as PIL decodes without Python's lock.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runkey.data import box_format, decode
from runkey.data.coco import CocoImage
from runkey.data.pixel_range import FLAT_VARIANCE, WIDE_VALUES, is_flat, spread_bytes
from runkey.files import read_plain
from runkey.params import Checks, Data

# No format uses more bytes per pixel than 16-bit RGBA; a larger file is no such image.
_BYTES_PER_PIXEL = 8
_BYTES_OF_METADATA = 1 << 26

Fault = tuple[str, str, str]
"""Name of the check, the fault, and what `fix` does."""


class FileError(Exception):
    """A file that is no usable image; args: name of the check, the fault."""


@dataclass(frozen=True, slots=True)
class Scan:
    """The content of an image file, and its faults."""

    faults: list[Fault]
    frame: tuple[int, int]
    """(width, height) after rotation, pixels: what boxes must fit into."""
    rotation: tuple[int, bool]
    """What decoding will apply; see `exif_rotation`."""
    digest: bytes
    """SHA-256 of the file."""
    sums: NDArray[np.int64]
    """[2, 3]: sum and sum of squares of the stored pixels, 0..255, in each channel."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Of boxes, from the JSON's size to the file's."""
    values: NDArray[np.int64] | None = None
    """[65536]: pixels of each value, of a 16-bit image; of colour see `PixelRange.deep_values`."""
    is_wide: bool = False
    """Grey of more than 8 bits, which `data.intensity_range` applies to."""
    is_flat: bool = False
    """Its 8-bit pixels use a small part of 0..255."""


def scan_image(path: Path, listed: CocoImage, data: Data) -> Scan:
    """Read an image file and compare it with its entry in the JSON.

    Args:
        path: of the file.
        listed: the entry, with its annotations.
        data: limits and checks.

    Raises:
        FileError: it is no usable image.
    """
    content, rgb, orientation, mode, values, is_deep = _decode(path, data)
    frame, rotation, scale, faults = _orient(listed, rgb.size, orientation, data.checks)
    if mode:
        faults.insert(
            int(orientation != 1), ("unusual_mode", f"is of mode {mode}", "converted to RGB")
        )
    counts = np.array(rgb.histogram(), dtype=np.int64).reshape(3, 256)
    levels = np.arange(256, dtype=np.int64)
    sums = np.stack((counts @ levels, counts @ levels**2))
    digest = hashlib.sha256(content).digest()
    wide = values is not None
    histogram = None
    if values is not None and values.dtype.kind == "u":
        histogram = np.bincount(values.ravel(), minlength=WIDE_VALUES)
    elif is_deep:
        histogram = spread_bytes(counts.sum(0))
    total, squares = sums.sum(1).tolist()
    size = 3 * rgb.width * rgb.height
    flat = squares / size - (total / size) ** 2 < FLAT_VARIANCE and is_flat(counts.sum(0))
    return Scan(faults, frame, rotation, digest, sums, scale, histogram, wide, flat)


def _orient(
    listed: CocoImage, size: tuple[int, int], orientation: int, checks: Checks
) -> tuple[tuple[int, int], tuple[int, bool], tuple[float, float], list[Fault]]:
    """Decide how to turn an image of the stored `size`, by EXIF, the JSON's size and the boxes.

    Returns:
        Size after rotation, rotation, scale of the boxes, and faults.
    """
    stated = (listed.width, listed.height)
    faults: list[Fault] = []
    rotation, against = (0, False), False
    boxes = []
    if size != stated or orientation in decode.SIDEWAYS:
        boxes = box_format.sound_boxes([a.bbox for a in listed.annotations])
    if checks.exif_rotation == "fix":
        against = orientation in decode.SIDEWAYS and box_format.contradicts(stated, boxes)
        believed = stated[::-1] if against else stated
        rotation = decode.exif_rotation(orientation, size, believed)
    frame = size[::-1] if rotation[0] % 180 else size
    if orientation != 1:
        what = f"is to be turned by EXIF (orientation {orientation})"
        reason = "EXIF says"
        if orientation in decode.SIDEWAYS and size[0] != size[1]:
            reason = "its boxes fit" if against else "its size in the JSON says"
        faults.append(("exif_rotation", what, f"{_turned(*rotation)}, as {reason}"))
    if against:
        stated = stated[::-1]
        what = (
            f"is {listed.width}x{listed.height} in the JSON, but its boxes fit only "
            f"{stated[0]}x{stated[1]}, as the image {'' if rotation[0] else 'not '}turned by EXIF"
        )
        faults.append(("size_mismatch", what, "width and height swapped, boxes kept"))
    wrong = box_format.compare_sizes(frame, stated, boxes)
    if wrong is None:
        return frame, rotation, (1.0, 1.0), faults
    faults.append(("size_mismatch", wrong.what, wrong.fixed))
    return frame, rotation, wrong.scale, faults


def _decode(
    path: Path, data: Data
) -> tuple[bytes, Image.Image, int, str, NDArray[Any] | None, bool]:
    """Read an image file.

    Returns:
        Its bytes, pixels as RGB, EXIF orientation, mode if unusual, values [H, W] of wide grey,
        and whether it is 16-bit colour.
    """
    most_pixels = data.max_megapixels * 1e6
    try:
        size = path.stat().st_size
        if size > most_pixels * _BYTES_PER_PIXEL + _BYTES_OF_METADATA:
            what = f"has {size} bytes, more than data.max_megapixels allows"
            raise FileError("too_large_image", what)
        content = read_plain(path)
    except OSError as error:
        raise FileError("unreadable_image", f"cannot be read ({error.strerror})") from None
    fault = "is no image of a known format" if content else "is empty"
    try:
        with decode.open_image(content) as image:
            if image.width * image.height > most_pixels:
                limit = f"more than data.max_megapixels: {data.max_megapixels:g}"
                raise FileError("too_large_image", f"is {image.width}x{image.height}, {limit}")
            fault = "is cut short or damaged"
            mode = image.mode if decode.is_unusual(image) else ""
            is_deep = decode.is_deep_colour(image)
            orientation = decode.exif_orientation(image)
            rgb, values = decode.to_rgb(image, data.intensity_range), decode.wide_values(image)
            if values is not None:
                mode += f", values {values.min():.6g} to {values.max():.6g}"
            if is_deep:
                lows, highs = zip(*rgb.getextrema(), strict=True)
                mode += f" with 16 bits, upper bytes {min(lows)} to {max(highs)}"
            return content, rgb, orientation, mode, values, is_deep
    except decode.UnknownRangeError as error:
        what = f"has {error}, which data.intensity_range can name"
        raise FileError("unreadable_image", what) from None
    except (MemoryError, FileError):
        raise
    except Exception:  # noqa: BLE001 - PIL raises almost any type on bad bytes
        raise FileError("unreadable_image", fault) from None


def _turned(rotate: int, mirror: bool) -> str:
    """Say how an image is turned."""
    steps = ["mirrored"] * mirror + [f"turned clockwise by {rotate} degrees"] * (rotate > 0)
    return " and ".join(steps) or "not turned"
