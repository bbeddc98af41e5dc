"""Checks of the image files: each is opened and decoded once, in a thread for each core.

Decoding finds files that are cut short; the same pass shrinks the pixels for the cache and adds up
their mean.  Threads do, because PIL decodes and resizes without Python's lock.
"""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runkey.data.cache import shrink
from runkey.data.check_boxes import Frame
from runkey.data.checks import Item
from runkey.data.decode import (
    ORIENTATIONS,
    UnknownRangeError,
    is_unusual,
    open_image,
    to_rgb,
    turn,
)
from runkey.data.report import Findings
from runkey.progress import progress

_ORIENTATION_TAG = 0x0112
# No format stores a pixel in more bytes than 16-bit RGBA does; a larger file is no such image.
_BYTES_PER_PIXEL = 8
_BYTES_OF_METADATA = 1 << 26


@dataclass(frozen=True, slots=True)
class ScanSettings:
    """What the pass over the files needs to know."""

    max_pixels: float
    """Largest image that is decoded."""
    turn: bool
    """Whether EXIF rotation is applied where the JSON's size says so."""
    cache: tuple[tuple[int, ...], int] | None
    """(short_sides, long_side) to shrink pixels for; None: pixels are not wanted."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What a file holds.  With a fault, only the fault counts."""

    fault: tuple[str, str] | None = None
    """(check's name, what is wrong)."""
    width: int = 0
    height: int = 0
    """Size as stored, before any turning, pixels."""
    mode: str = ""
    unusual: bool = False
    orientation: int = 1
    """EXIF's, 1..8."""
    rotate: int = 0
    mirror: bool = False
    """What decoding will apply, if EXIF rotation is to be mended."""
    digest: bytes = b""
    """SHA-256 of the file."""
    sums: tuple[tuple[int, ...], tuple[int, ...]] = ((0, 0, 0), (0, 0, 0))
    """For each channel, the sum and the sum of squares of the stored pixels, 0..255."""
    pixels: NDArray[np.uint8] | None = None
    """[h, w, 3], turned and shrunk for the cache."""

    @property
    def frame(self) -> tuple[int, int]:
        """(width, height) after turning."""
        swapped = self.rotate in (90, 270)
        return (self.height, self.width) if swapped else (self.width, self.height)


def scan_images(
    data: Path, items: list[Item], settings: ScanSettings, name: str
) -> Iterator[tuple[Item, Scan]]:
    """Read and decode each image once, in the order of `items`.

    Args:
        data: the data folder.
        items: the images.
        settings: limits, and whether pixels are wanted.
        name: what the progress line calls them.

    Yields:
        Each item with what its file holds; only some are in memory at a time.
    """

    def work(item: Item) -> Scan:
        return scan_image(data / item.file, (item.image.width, item.image.height), settings)

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(threads) as pool,
        progress(f"check {name}", len(items), "images") as steps,
    ):
        # What PIL warns of is either found by our own checks or harmless.
        warnings.simplefilter("ignore")
        results = _in_order(pool, work, items, ahead=4 * (threads or 1))
        for item, scan in results:
            yield item, scan
            steps.advance()


def scan_image(path: Path, stated: tuple[int, int], settings: ScanSettings) -> Scan:
    """Read and decode one image.

    Args:
        path: the file.
        stated: (width, height) that the JSON has.
        settings: limits, and whether pixels are wanted.
    """
    try:
        if path.stat().st_size > settings.max_pixels * _BYTES_PER_PIXEL + _BYTES_OF_METADATA:
            what = f"has {path.stat().st_size} bytes, more than data.max_megapixels allows"
            return Scan(fault=("too_large_image", what))
        content = path.read_bytes()
    except OSError as error:
        return Scan(fault=("unreadable_image", f"cannot be read ({error.strerror})"))
    try:
        image = open_image(content)
    except Exception as error:  # noqa: BLE001 - PIL's readers raise nearly anything on bad bytes
        return _unreadable(error, "is no image of a known format" if content else "is empty")
    with image:
        if image.width * image.height > settings.max_pixels:
            limit = f"more than data.max_megapixels: {settings.max_pixels / 1e6:g}"
            return Scan(fault=("too_large_image", f"is {image.width}x{image.height}, {limit}"))
        unusual, mode, orientation = is_unusual(image), image.mode, exif_orientation(image)
        try:
            rgb = to_rgb(image)
        except UnknownRangeError as error:
            return Scan(fault=("unreadable_image", f"has {error}"))
        except Exception as error:  # noqa: BLE001 - as above
            return _unreadable(error, "is cut short or damaged")
    rotate, mirror = orient(orientation, rgb.size, stated) if settings.turn else (0, False)
    return Scan(
        width=rgb.width,
        height=rgb.height,
        mode=mode,
        unusual=unusual,
        orientation=orientation,
        rotate=rotate,
        mirror=mirror,
        digest=hashlib.sha256(content).digest(),
        sums=_sums(rgb),
        pixels=_shrunk(rgb, rotate, mirror, settings),
    )


def orient(orientation: int, size: tuple[int, int], stated: tuple[int, int]) -> tuple[int, bool]:
    """(clockwise degrees, mirrored first) to apply, if the JSON's size says that boxes are turned.

    It says so where stored and turned image differ in being upright, and it sides with the turned.
    Half turns, mirror images and squares leave no trace in the size: they are not applied.

    Args:
        orientation: EXIF's, 1..8.
        size: (width, height) as stored.
        stated: (width, height) in the JSON.
    """
    rotate, mirror = ORIENTATIONS[orientation]
    stored_upright, stated_upright = size[1] - size[0], stated[1] - stated[0]
    if rotate in (90, 270) and stored_upright * stated_upright < 0:
        return rotate, mirror
    return 0, False


def check_scan(item: Item, scan: Scan, shown: str, findings: Findings) -> Frame | None:
    """Hold a file against what the JSON says of it.

    Args:
        item: the image as the JSON has it.
        scan: what the file holds.
        shown: the image as messages name it.
        findings: takes the faults.

    Returns:
        The frame that boxes must fit, or None where the image is left out.
    """
    image = item.image

    def found(kind: str, what: str, fixed: str = "") -> bool:
        what = f"image {image.id} {what}"
        return findings.add(kind, shown, what, image_id=image.id, fixed=fixed)

    if scan.fault:
        found(*scan.fault)
        return None
    if scan.orientation != 1:
        what = f"is to be turned by EXIF (orientation {scan.orientation})"
        if not found("exif_rotation", what, _turned(scan)):
            return None
    if scan.unusual and not found("unusual_mode", f"is of mode {scan.mode}", "converted to RGB"):
        return None
    width, height = scan.frame
    if (width, height) == (image.width, image.height):
        return Frame(width, height, scan.rotate, scan.mirror)
    scale_x, scale_y = width / image.width, height / image.height
    what = f"is {width}x{height}, but {image.width}x{image.height} in the JSON"
    if not found("size_mismatch", what, f"boxes scaled by {scale_x:.6g} and {scale_y:.6g}"):
        return None
    return Frame(width, height, scan.rotate, scan.mirror, scale_x, scale_y)


def _turned(scan: Scan) -> str:
    if scan.rotate or scan.mirror:
        first = "mirrored and " if scan.mirror else ""
        return f"{first}turned clockwise by {scan.rotate} degrees, as its size in the JSON says"
    return "not turned, as its size in the JSON does not ask for it"


def _unreadable(error: Exception, what: str) -> Scan:
    if isinstance(error, MemoryError):
        raise error
    return Scan(fault=("unreadable_image", what))


def exif_orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1..8; 1 where there is none, or none that can be read."""
    if image.format == "TIFF":  # PIL turns these itself
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, struct.error):
        return 1
    return value if isinstance(value, int) and value in ORIENTATIONS else 1


def _sums(rgb: Image.Image) -> tuple[tuple[int, ...], tuple[int, ...]]:
    counts = np.array(rgb.histogram(), dtype=np.int64).reshape(3, 256)
    values = np.arange(256, dtype=np.int64)
    return tuple((counts @ values).tolist()), tuple((counts @ values**2).tolist())


def _shrunk(
    rgb: Image.Image, rotate: int, mirror: bool, settings: ScanSettings
) -> NDArray[np.uint8] | None:
    if settings.cache is None:
        return None
    return turn(np.asarray(shrink(rgb, *settings.cache)), rotate, mirror)


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Item], Scan], items: Iterable[Item], ahead: int
) -> Iterator[tuple[Item, Scan]]:
    """Results in the order of the items, with at most `ahead` of them begun and not yet taken."""
    waiting: deque[tuple[Item, Future[Scan]]] = deque()
    rest = iter(items)
    try:
        for item in islice(rest, ahead):
            waiting.append((item, pool.submit(work, item)))
        while waiting:
            item, future = waiting.popleft()
            scan = future.result()
            for following in islice(rest, 1):
                waiting.append((following, pool.submit(work, following)))
            yield item, scan
    finally:
        for _, future in waiting:
            future.cancel()
