"""The checks of `prepare`: ids and file names of a JSON, image files, boxes.

A check calls `_mend(NAME, ...)`, or `_leave_out` if there is no fix; NAME is a field of
`params.Checks`. Images are decoded once, in one thread per core, as PIL decodes and resizes without
Python's lock; the same pass shrinks the pixels for the cache and sums them for the mean.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runkey.data import decode
from runkey.data.cache import Place, Scratch, cached_size, shrink
from runkey.data.coco import Coco, CocoAnnotation, CocoImage
from runkey.data.index import ImageRecord
from runkey.data.report import Findings
from runkey.params import Data
from runkey.progress import progress
from runkey.units import GIB

# No format uses more bytes per pixel than 16-bit RGBA; a larger file is no such image.
_BYTES_PER_PIXEL = 8
_BYTES_OF_METADATA = 1 << 26
_ABSOLUTE = re.compile("/|[A-Za-z]:")
# A box that overhangs the image by less is rounding, clipped without a finding.
TOLERANCE_PIXELS = 1.0

_Box = tuple[float, float, float, float]
"""xywh, pixels."""
_Fault = tuple[str, str, str]
"""Name of the check, the fault, and what `fix` does."""


class _FileError(Exception):
    """A file that is no usable image; args: name of the check, the fault."""


class _LeftOut(Exception):  # noqa: N818 - no error: the fault is recorded
    """An image or an annotation does not stay."""


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """An accepted image on its way into a split."""

    record: ImageRecord
    digest: bytes
    """SHA-256 of the file."""
    sums: NDArray[np.int64]
    """[2, 3]: sum and sum of squares of the stored pixels, 0..255, in each channel."""
    place: Place | None
    """Of its pixels in the scratch file; None: it is not cached."""

    @property
    def classes(self) -> frozenset[int]:
        """Return the classes of its objects, without crowd regions."""
        return frozenset(label for _, label, _ in self.record.objects())


@dataclass(frozen=True, slots=True)
class _Scan:
    """The content of an image file."""

    faults: list[_Fault]
    frame: tuple[int, int]
    """(width, height) after rotation, pixels: what boxes must fit into."""
    rotation: tuple[int, bool]
    """What decoding will apply; see `exif_rotation`."""
    digest: bytes
    sums: NDArray[np.int64]
    pixels: NDArray[np.uint8] | None
    """[h, w, 3], rotated and shrunk for the cache; None without a cache."""


@dataclass(frozen=True, slots=True)
class SourceChecks:
    """The checks of one JSON and its images."""

    coco: Coco
    data: Data
    labels: Mapping[int, int]
    """Class index of each category id."""
    findings: Findings
    scratch: Scratch

    def accepted_images(self) -> Iterator[CheckedImage]:
        """Check the entries, then every file against the JSON, then its boxes against the image.

        Yields the accepted images in order. Their pixels are in the scratch file, unless they
        would need more than `data.cache_gib`; only some are in memory at a time.
        """
        data, images = self.data, self._listed_images()
        # One JSON holds both splits; the limit applies to each.
        split = self.coco.source.split
        share = 1.0 if split != "data" else max(data.val_fraction, 1 - data.val_fraction)
        sizes = (cached_size(i.width, i.height, data.short_sides, data.long_side) for i in images)
        size = sum(width * height * 3 for width, height in sizes) * share
        for image, future in self._scan_images(images, cached=size <= data.cache_gib * GIB):
            with suppress(_LeftOut):
                yield self._accept(image, future)

    def _mend(self, kind: str, what: str, image_id: int, file: str = "", **more: Any) -> None:
        """Record a fault; raise `_LeftOut` unless its policy is `fix`."""
        file = file or self.coco.source.shown_json
        if not self.findings.add(kind, file, what, image_id=image_id, **more):
            raise _LeftOut

    def _leave_out(self, *fault: Any, **more: Any) -> NoReturn:
        """Record a fault that has no fix, and raise `_LeftOut`."""
        self._mend(*fault, **more)
        raise _LeftOut

    def _listed_images(self) -> list[CocoImage]:
        """The images that exist under a safe name, with their annotations.

        Annotations of unknown classes are left out, and some are given new ids.
        """
        images: dict[int, CocoImage] = {}
        files: dict[str, CocoImage] = {}
        for image in self.coco.images:
            with suppress(_LeftOut):
                image.file = self._locate(image)
                if twin := images.get(image.id) or files.get(image.file):
                    same = "id" if image.id in images else "file"
                    what = f"{image.item} has the same {same} as {twin.item}"
                    kept = "left out, the first kept"
                    self._leave_out("duplicate_image", what, image.id, dropped=kept)
                images[image.id] = files[image.file] = image
        self._assign_annotations(images)
        self._check_units(images.values())
        return list(images.values())

    def _locate(self, image: CocoImage) -> str:
        """The image's file, relative to the data folder."""
        source = self.coco.source
        absolute = _ABSOLUTE.match(image.name)
        if absolute or ".." in image.name.split("/"):
            fault = "is an absolute path" if absolute else "has `..` in it"
            self._leave_out("unsafe_path", f"{image.item}: its name {fault}", image.id)
        file = source.find(image.name)
        if file is None:
            looked = ", ".join(source.show(folder) for folder in source.folders)
            self._leave_out("missing_image", f"{image.item} not found in {looked}", image.id)
        if source.leaves(file):
            what = f"{image.item} is a link that leaves {source.shown_data}"
            # Not `drop`, as all images may be such links. DVC keeps nothing of a linked folder.
            way_out = "put the file itself there, or see docs/your-data.md#data-on-another-drive"
            self._leave_out("unsafe_path", what, image.id, source.show(file), way_out=way_out)
        return file

    def _assign_annotations(self, images: dict[int, CocoImage]) -> None:
        seen: set[int] = set()
        free = max((a.id for a in self.coco.annotations), default=0)
        for annotation in self.coco.annotations:
            number, owner = annotation.id, annotation.image_id
            if owner in self.coco.listed and owner not in images:
                continue  # dropped with its image, which has been reported
            with suppress(_LeftOut):
                if owner not in images:
                    what = f"annotation {number} is of image {owner}, which `images` does not list"
                    self._leave_out("unknown_image", what, owner, annotation_id=number)
                image = images[owner]
                if annotation.category_id not in self.labels:
                    category = (
                        f"category {annotation.category_id}, which `categories` does not list"
                    )
                    what = f"{image.item}, annotation {number} is of {category}"
                    self._leave_out("unknown_category", what, owner, annotation_id=number)
                if number in seen:
                    what = f"{image.item}, annotation {number}: its id occurs before"
                    fault, fixed = "duplicate_annotation", f"given the id {free + 1}"
                    self._mend(fault, what, owner, annotation_id=number, fixed=fixed)
                    annotation.id = free = free + 1
                seen.add(annotation.id)
                image.annotations.append(annotation)

    def _check_units(self, images: Iterable[CocoImage]) -> None:
        """Refuse boxes in fractions of the image's size, as in YOLO's files.

        One box within 0..1 may be a tiny object; if all are, no object is larger than a pixel.
        """
        boxes = [annotation.bbox for image in images for annotation in image.annotations]
        sound = [box for box in boxes if all(map(_finite, box)) and min(box[2:]) > 0]
        if sound and all(0 <= value <= 1 for box in sound for value in box):
            self.findings.refuse(
                self.coco.source.shown_json,
                f"all {len(sound)} boxes lie between 0 and 1, such as {_show(sound[0])}: parts of "
                "the image's size, as in YOLO's files",
                "write [left, top, width, height] in pixels",
            )

    def _scan_images(
        self, images: list[CocoImage], *, cached: bool
    ) -> Iterator[tuple[CocoImage, Future[_Scan]]]:
        """Scan each image once, in order, some of them ahead of the consumer."""
        source = self.coco.source

        def submit(image: CocoImage) -> tuple[CocoImage, Future[_Scan]]:
            path = source.data / image.file
            return image, pool.submit(_scan_image, path, image, self.data, cached)

        threads = len(os.sched_getaffinity(0))
        with (
            warnings.catch_warnings(),
            ThreadPoolExecutor(threads) as pool,
            progress(f"check {source.split}", len(images), "images") as steps,
        ):
            # What PIL warns of is harmless or found by a check.
            warnings.simplefilter("ignore")
            rest = iter(images)
            waiting = deque(map(submit, islice(rest, 4 * threads)))
            while waiting:
                yield waiting.popleft()
                waiting.extend(map(submit, islice(rest, 1)))
                steps.advance()

    def _accept(self, image: CocoImage, future: Future[_Scan]) -> CheckedImage:
        """Check a file against the JSON, then its boxes; keep those that are valid or mended."""
        file, item = self.coco.source.show(image.file), f"image {image.id}"
        try:
            scan = future.result()
        except _FileError as error:
            kind, what = error.args
            self._leave_out(kind, f"{item} {what}", image.id, file)
        for kind, what, fixed in scan.faults:
            self._mend(kind, f"{item} {what}", image.id, file, fixed=fixed)
        place = None if scan.pixels is None else self.scratch.append(scan.pixels)
        rows = []
        for annotation in image.annotations:
            with suppress(_LeftOut):
                box, area = self._check_box(image, annotation, scan.frame)
                label = self.labels[annotation.category_id]
                rows.append((box, label, area, annotation.crowd, annotation.id))
        columns = zip(*rows, strict=True) if rows else ((),) * 5
        record = ImageRecord(image.id, image.file, *scan.frame, *scan.rotation, *columns)
        return CheckedImage(record, scan.digest, scan.sums, place)

    def _check_box(
        self, image: CocoImage, annotation: CocoAnnotation, frame: tuple[int, int]
    ) -> tuple[_Box, float]:
        """The box and COCO's area in pixels of the file."""

        def mend(kind: str, what: str, fixed: str = "") -> None:
            what = f"{image.item}, annotation {annotation.id}: {what}"
            self._mend(kind, what, image.id, annotation_id=annotation.id, fixed=fixed)

        # Not 1 if `size_mismatch` was fixed.
        scale = (frame[0] / image.width, frame[1] / image.height)
        box = _inside(_sound_box(annotation.bbox, scale, mend), frame, mend)
        area = annotation.area
        if area is not None and not (_finite(area) and area > 0):
            mend("bad_area", f"area {_show(area)} is no positive number", "taken from the box")
            area = None
        return box, box[2] * box[3] if area is None else float(area) * scale[0] * scale[1]


def _scan_image(path: Path, listed: CocoImage, data: Data, cached: bool) -> _Scan:
    content, rgb, orientation, unusual_mode = _decode(path, data.max_megapixels)
    stated = (listed.width, listed.height)
    rotate, mirror = 0, False
    if data.checks.exif_rotation == "fix":
        rotate, mirror = decode.exif_rotation(orientation, rgb.size, stated)
    frame = rgb.size[::-1] if rotate else rgb.size
    faults = []
    if orientation != 1:
        what = f"is to be turned by EXIF (orientation {orientation})"
        faults.append(("exif_rotation", what, _turned(rotate, mirror)))
    if unusual_mode:
        faults.append(("unusual_mode", f"is of mode {unusual_mode}", "converted to RGB"))
    if frame != stated:
        scales = f"{frame[0] / stated[0]:.6g} and {frame[1] / stated[1]:.6g}"
        what = f"is {frame[0]}x{frame[1]}, but {stated[0]}x{stated[1]} in the JSON"
        faults.append(("size_mismatch", what, f"boxes scaled by {scales}"))
    pixels = None
    if cached:
        small = shrink(rgb, data.short_sides, data.long_side)
        pixels = decode.turn(np.asarray(small), rotate, mirror)
    counts = np.array(rgb.histogram(), dtype=np.int64).reshape(3, 256)
    values = np.arange(256, dtype=np.int64)
    sums = np.stack((counts @ values, counts @ values**2))
    digest = hashlib.sha256(content).digest()
    return _Scan(faults, frame, (rotate, mirror), digest, sums, pixels)


def _decode(path: Path, max_megapixels: float) -> tuple[bytes, Image.Image, int, str]:
    """The file's bytes, pixels as RGB, EXIF orientation, and mode if it is unusual."""
    most_pixels = max_megapixels * 1e6
    try:
        size = path.stat().st_size
        if size > most_pixels * _BYTES_PER_PIXEL + _BYTES_OF_METADATA:
            what = f"has {size} bytes, more than data.max_megapixels allows"
            raise _FileError("too_large_image", what)
        content = path.read_bytes()
    except OSError as error:
        raise _FileError("unreadable_image", f"cannot be read ({error.strerror})") from None
    fault = "is no image of a known format" if content else "is empty"
    try:
        with decode.open_image(content) as image:
            if image.width * image.height > most_pixels:
                limit = f"more than data.max_megapixels: {max_megapixels:g}"
                raise _FileError("too_large_image", f"is {image.width}x{image.height}, {limit}")
            fault = "is cut short or damaged"
            mode = image.mode if decode.is_unusual(image) else ""
            orientation = decode.exif_orientation(image)
            return content, decode.to_rgb(image), orientation, mode
    except decode.UnknownRangeError as error:
        raise _FileError("unreadable_image", f"has {error}") from None
    except (MemoryError, _FileError):
        raise
    except Exception:  # noqa: BLE001 - PIL raises almost any type on bad bytes
        raise _FileError("unreadable_image", fault) from None


def _turned(rotate: int, mirror: bool) -> str:
    if rotate or mirror:
        first = "mirrored and " if mirror else ""
        return f"{first}turned clockwise by {rotate} degrees, as its size in the JSON says"
    return "not turned, as its size in the JSON does not ask for it"


def _sound_box(bbox: list[Any], scale: tuple[float, float], mend: Callable[..., None]) -> _Box:
    """The box in pixels of the file, with sides above 0."""
    if not all(map(_finite, bbox)):
        mend("not_finite_box", f"box {_show(bbox)} is not four finite numbers")
    left, top, width, height = map(float, bbox)
    if width < 0 or height < 0:
        mend("negative_box", f"box {_show(bbox)} has a negative side", "its corners swapped")
        left, width = min(left, left + width), abs(width)
        top, height = min(top, top + height), abs(height)
    # Not only size 0: 100 + 1e-20 is 100.
    if left + width == left or top + height == top:
        mend("empty_box", f"box {_show(bbox)} has no area")
    return left * scale[0], top * scale[1], width * scale[0], height * scale[1]


def _inside(box: _Box, frame: tuple[int, int], mend: Callable[..., None]) -> _Box:
    """The part of the box that is in the image."""
    left, top, width, height = box
    right, bottom = left + width, top + height
    size = f"the image of {frame[0]}x{frame[1]}"
    x0, x1 = max(left, 0.0), min(right, float(frame[0]))
    y0, y1 = max(top, 0.0), min(bottom, float(frame[1]))
    if x1 <= x0 or y1 <= y0:
        mend("outside_box", f"box {_show(box)} is outside {size}")
    if (x0, y0, x1, y1) == (left, top, right, bottom):
        return box
    overhang = max(-left, -top, right - frame[0], bottom - frame[1])
    if overhang > TOLERANCE_PIXELS:
        what = f"box {_show(box)} reaches over {size} by {overhang:.6g} pixels"
        mend("overhanging_box", what, "clipped")
    return x0, y0, x1 - x0, y1 - y0


def _finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int larger than any float
        return False


def _show(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_show(v) for v in value) + "]"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = ascii(value)
    return text if len(text) <= 40 else text[:40] + "..."
