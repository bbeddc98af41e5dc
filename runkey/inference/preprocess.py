"""Read images from anywhere, and resize them exactly as `evaluate` does: same functions and pixels.

    image = read_image("a.jpg")                 # uint8 [H, W, 3], upright
    pixels = Preprocess(card.sizes)(image)      # uint8 [3, h, w], what a network takes

An image is decoded, turned upright by EXIF, converted to 8-bit RGB and resized once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from runkey.data import decode
from runkey.data.augment import resized_size
from runkey.data.index import IntensityRange
from runkey.errors import DataError
from runkey.files import read_plain
from runkey.model.weights import Sizes

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[Any]
"""An image: a path, a file's bytes, a PIL image, an array [H, W], [H, W, 1], [H, W, 3] (RGB) or
[H, W, 4] (RGBA); a torch tensor [3, H, W], [1, H, W] or [H, W] works too. Integers of 8 bits, grey
of 16 bits, or floats in 0..1."""
MAX_MEGAPIXELS = 500.0
"""A larger file is refused before it is decoded (a decompression bomb)."""
_STRIP = 2**22
"""Pixels that are copied at once."""
_SHAPES = "an array is [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], a torch tensor [3, H, W]"


def read_image(
    source: Any,
    intensity_range: IntensityRange | None = None,
    *,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> NDArray[np.uint8]:
    """Read an image of any kind of `Source` as 8-bit RGB, turned upright by EXIF.

    Args:
        source: see `Source`. A file's or PIL image's EXIF orientation is applied.
        intensity_range: values of grey images of more than 8 bits that become black and white;
            None: the whole range of 16 bits.
        max_megapixels: largest file that is decoded, in 10^6 pixels.

    Returns:
        uint8 [H, W, 3].

    Raises:
        DataError: it is no image, damaged, too large, or its value range is not known.
    """
    name = source_name(source)
    if isinstance(source, Image.Image):
        return _upright(source, name, intensity_range)
    if isinstance(source, np.ndarray | torch.Tensor):
        return _upright(_from_array(source, name, intensity_range), name, intensity_range)
    if isinstance(source, bytes | bytearray | memoryview):
        content = bytes(source)
    elif isinstance(source, str | os.PathLike):
        content = _read(Path(source), name)
    else:
        raise DataError(
            f"{type(source).__name__}: no image; give a path, bytes, a PIL image, an array"
            " [H, W, 3] or a torch tensor [3, H, W]"
        )
    fault = "is no image of a known format" if content else "is empty"
    try:
        with decode.open_image(content) as image:
            if image.width * image.height > max_megapixels * 1e6:
                raise DataError(
                    f"{name}: {image.width}x{image.height} is more than {max_megapixels:g}"
                    " megapixels; scale it down"
                )
            fault = "is cut short or damaged"
            return _upright(image, name, intensity_range)
    except (DataError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 - PIL raises almost any type on bad bytes
        known = ", ".join(decode.FORMATS)
        raise DataError(f"{name}: {fault}; runkey reads {known}") from None


def source_name(source: Any) -> str:
    """Name a source in messages: its path, or what it is."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "")) or "PIL image"
    if isinstance(source, np.ndarray | torch.Tensor):
        kind = "array" if isinstance(source, np.ndarray) else "tensor"
        return f"{kind} of shape {tuple(source.shape)}"
    return "image bytes"


def _read(path: Path, name: str) -> bytes:
    if "://" in name:
        raise DataError(f"{name}: a URL; download it, and give the file or its bytes")
    try:
        return read_plain(path)
    except OSError as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else error.strerror or error
        raise DataError(f"{name}: {reason}") from None


def _upright(
    image: Image.Image, name: str, intensity_range: IntensityRange | None
) -> NDArray[np.uint8]:
    """Convert to 8-bit RGB [H, W, 3], and turn as EXIF says."""
    orientation = decode.exif_orientation(image)
    try:
        rgb = decode.to_rgb(image, intensity_range)
    except decode.UnknownRangeError as error:
        raise DataError(
            f"{name}: {error}; the model was trained without data.intensity_range: give 8 or 16"
            " bits, or floats in 0..1"
        ) from None
    rotation = decode.TURNED.get(orientation, (0, False))
    return decode.turn(_pixels(rgb), *rotation)


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels [H, W, 3]; in strips, as PIL would hold them twice beside the image."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = np.asarray(strip)
    return pixels


def _from_array(source: Any, name: str, intensity_range: IntensityRange | None) -> Image.Image:
    array = _channels_last(source, name)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    is_grey = array.ndim == 2
    if not is_grey and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise DataError(f"{name}: {_SHAPES}")
    if 0 in array.shape:
        raise DataError(f"{name}: holds no pixel")
    if is_grey and intensity_range and array.dtype.kind in "iuf" and array.dtype.itemsize > 1:
        return Image.fromarray(array.astype(np.float32))
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):
            shown = f"{array.min():.6g} to {array.max():.6g}"
            raise DataError(f"{name}: floats from {shown}; scale them to 0..1, or give uint8")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif not (array.dtype == np.uint8 or (is_grey and array.dtype == np.uint16)):
        raise DataError(f"{name}: {array.dtype}; give uint8, grey of uint16, or floats in 0..1")
    return Image.fromarray(np.ascontiguousarray(array))


def _channels_last(source: Any, name: str) -> NDArray[Any]:
    if isinstance(source, np.ndarray):
        return source
    tensor = source.detach().cpu()
    if tensor.ndim == 3 and tensor.shape[0] not in (1, 3, 4):
        raise DataError(f"{name}: {_SHAPES}")
    tensor = tensor.permute(1, 2, 0) if tensor.ndim == 3 else tensor
    return np.asarray(tensor.float() if tensor.is_floating_point() else tensor)


@dataclass(frozen=True, slots=True)
class Preprocess:
    """Resizes images to the sizes that a model was evaluated at."""

    sizes: Sizes

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize an image of `read_image`, [H, W, 3], to a network's input, uint8 [3, h, w]."""
        height, width = image.shape[:2]
        size = resized_size(height, width, self.sizes.short_side, self.sizes.long_side)
        return np.ascontiguousarray(decode.resize(image, size).transpose(2, 0, 1))
