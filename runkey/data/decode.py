"""Decode image files to 8-bit RGB; checking, loading, drawing and inference all use this.

Grey images of 16 bits or more are scaled by `data.intensity_range`; without it, 32-bit integers and
floats are refused, because their value range is unknown.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops

from runkey.data.index import IntensityRange
from runkey.errors import DataError
from runkey.files import read_plain

if TYPE_CHECKING:
    from torch import Tensor

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


_SKIPPED = frozenset((0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)))
"""JPEG segments before the frame's header: tables, restart interval, comment, applications."""


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
    path: Path,
    rotate: int,
    mirror: bool,
    intensity_range: IntensityRange | None = None,
    shrunk: tuple[int, int] | None = None,
) -> Tensor:
    """Decode an image that `prepare` has accepted, and turn and scale it as its record says.

    It is resized to `shrunk`, (height, width) after turning, as `cache.CachePlan` says.

    Returns uint8 [3, H, W] RGB, channels last in memory (resizing is faster so); may be modified.

    Raises:
        DataError: the file is missing or has changed since `prepare`.
    """
    import torch  # here, since the other functions do without

    pixels = _accepted(path, intensity_range, _decode_plain_jpeg)
    if shrunk is not None:
        pixels = _shrink(pixels, shrunk[::-1] if rotate % 180 else shrunk)
    return torch.from_numpy(turn(pixels, rotate, mirror)).permute(2, 0, 1)


def decode_pixels(
    path: Path, rotate: int, mirror: bool, intensity_range: IntensityRange | None = None
) -> NDArray[np.uint8]:
    """Return what `decode_rgb` does, [H, W, 3], without torch."""
    return turn(_accepted(path, intensity_range, lambda _: None), rotate, mirror)


def _accepted(
    path: Path,
    intensity_range: IntensityRange | None,
    decode: Callable[[bytes], NDArray[np.uint8] | None],
) -> NDArray[np.uint8]:
    """Decode a file that `prepare` has accepted, by PIL where `decode` returns None."""
    try:
        content = read_plain(path)
        pixels = decode(content)
        if pixels is None:
            with open_image(content) as image:
                pixels = np.array(to_rgb(image, intensity_range))
        return pixels
    # PIL's decoders raise almost any type (struct.error, SyntaxError, IndexError) on bad bytes.
    except Exception as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else f"unreadable ({error})"
        raise DataError(
            f"{path}: {reason}, though prepare accepted it; run `dvc repro prepare` again"
        ) from error


def _shrink(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if pixels.shape[:2] == size:
        return pixels
    small = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.array(small)  # PIL's shrinking is antialiased


def _decode_plain_jpeg(content: bytes) -> NDArray[np.uint8] | None:
    """Decode by torchvision's libjpeg-turbo, which copies less than PIL; None: PIL has to do it."""
    import torch

    decode = _jpeg_decoder() if _is_plain_jpeg(content) else None
    if decode is None:
        return None
    try:
        return decode(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    except RuntimeError:  # a damaged file, of which PIL knows more
        return None


def _is_plain_jpeg(content: bytes) -> bool:
    """Return True for a baseline or progressive JPEG of 8 bits, grey or of three components."""
    at = 2
    while content.startswith(b"\xff\xd8\xff") and at + 9 < len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in (0xC0, 0xC2):
            return content[at + 4] == 8 and content[at + 9] in (1, 3)
        if marker not in _SKIPPED:
            return False
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return False


@cache
def _jpeg_decoder() -> Callable[[Tensor], NDArray[np.uint8]] | None:
    """Return torchvision's decoder of JPEG bytes, if its pixels are PIL's here.

    Only its library is loaded: importing torchvision takes seconds.
    """
    import torch

    found = find_spec("torchvision")
    library = Path(found.origin or "").with_name("image.so") if found else None
    if library is None or not library.is_file():
        return None

    def decode(data: Tensor) -> NDArray[np.uint8]:
        pixels: Tensor = torch.ops.image.decode_jpeg(data, 3, False)  # 3: as RGB
        return pixels.permute(1, 2, 0).numpy()

    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        pattern = (np.arange(61 * 43 * 3, dtype=np.uint32) ** 2 % 251).astype(np.uint8)
        image = Image.fromarray(pattern.reshape(43, 61, 3))
        for one in (image, image.convert("L")):
            for subsampling, progressive in ((0, False), (1, True), (2, False)):
                file = io.BytesIO()
                one.save(file, "JPEG", subsampling=subsampling, progressive=progressive)
                data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
                if not np.array_equal(decode(data), np.asarray(Image.open(file).convert("RGB"))):
                    return None
    except (OSError, RuntimeError, AttributeError):  # of another torch, or without libjpeg
        return None
    return decode
