"""The checks of `prepare`: ids and file names of a JSON, image files, boxes.

A check calls `findings.add(NAME, ...)` with the item and its fault; NAME is a field of
`params.Checks` that sets whether the item is fixed, dropped or an error.
Images are decoded once, in one thread per core, because PIL decodes and resizes without Python's
lock. The same pass shrinks the pixels for the cache and sums them for the mean.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runkey.data.cache import shrink
from runkey.data.coco import Coco, CocoAnnotation, CocoImage
from runkey.data.decode import (
    UnknownRangeError,
    exif_orientation,
    exif_rotation,
    is_unusual,
    open_image,
    to_rgb,
    turn,
)
from runkey.data.index import ClassName, Record
from runkey.data.layout import Source, path_fault
from runkey.data.report import Findings
from runkey.progress import progress

# No format uses more bytes per pixel than 16-bit RGBA; a larger file is no such image.
_BYTES_PER_PIXEL = 8
_BYTES_OF_METADATA = 1 << 26
# A box that overhangs the image by less is rounding, clipped without a finding.
TOLERANCE_PIXELS = 1.0

Box = tuple[float, float, float, float]
"""xywh, pixels."""


@dataclass(slots=True)
class Item:
    """An image of the JSON whose file exists, with its annotations."""

    image: CocoImage
    file: str
    """Relative to the data folder, with forward slashes."""
    annotations: list[CocoAnnotation]


@dataclass(frozen=True, slots=True)
class Frame:
    """The decoded image that boxes must fit into."""

    width: int
    """Pixels, after rotation."""
    height: int
    rotate: int
    """Clockwise degrees."""
    mirror: bool
    """Mirrored left-right before rotating."""
    scale_x: float = 1.0
    """Pixels of the file per pixel of the JSON's width; not 1 if `size_mismatch` was fixed."""
    scale_y: float = 1.0


def check_ids(
    coco: Coco, source: Source, classes: list[ClassName], findings: Findings
) -> list[Item]:
    """Return the images that exist under a safe name, with their annotations of known classes.

    Args:
        coco: the JSON's entries; annotations may be given new ids.
        source: the JSON and its folders.
        classes: the classes that annotations may have.
        findings: collects the faults.
    """
    items: dict[int, Item] = {}
    files: dict[str, int] = {}
    for image in coco.images:
        file = _locate(image, source, findings)
        if file is None:
            continue
        twin = image.id if image.id in items else files.get(file)
        if twin is not None:
            first = items[twin].image
            same = "id" if image.id in items else "file"
            findings.add(
                "duplicate_image",
                source.shown_json,
                f"{image.item} has the same {same} as {first.item}",
                image_id=image.id,
                dropped="left out, the first kept",
            )
            continue
        items[image.id] = Item(image, file, [])
        files[file] = image.id
    _assign_annotations(coco, items, source, classes, findings)
    return list(items.values())


def _locate(image: CocoImage, source: Source, findings: Findings) -> str | None:
    shown = source.shown_json
    fault = path_fault(image.name)
    if fault:
        findings.add("unsafe_path", shown, f"{image.item}: its name {fault}", image_id=image.id)
        return None
    file = source.find(image.name)
    if file is None:
        looked = ", ".join(source.show(folder) for folder in source.folders)
        findings.add(
            "missing_image", shown, f"{image.item} not found in {looked}", image_id=image.id
        )
        return None
    if source.leaves(file):
        findings.add(
            "unsafe_path",
            source.show(file),
            f"{image.item} is a link that leaves {source.shown_data}",
            image_id=image.id,
        )
        return None
    return file


def _assign_annotations(
    coco: Coco,
    items: dict[int, Item],
    source: Source,
    classes: list[ClassName],
    findings: Findings,
) -> None:
    shown = source.shown_json
    known = {entry.id for entry in classes}
    seen: set[int] = set()
    free = max((a.id for a in coco.annotations), default=0)
    for annotation in coco.annotations:
        number, owner = annotation.id, annotation.image_id
        if owner not in coco.listed:
            what = f"annotation {number} is of image {owner}, which `images` does not list"
            findings.add("unknown_image", shown, what, image_id=owner, annotation_id=number)
            continue
        if owner not in items:  # dropped with its image, which has been reported
            continue
        item = items[owner]
        if annotation.category_id not in known:
            what = (
                f"{item.image.item}, annotation {number} is of category "
                f"{annotation.category_id}, which `categories` does not list"
            )
            findings.add("unknown_category", shown, what, image_id=owner, annotation_id=number)
            continue
        if number in seen:
            what = f"{item.image.item}, annotation {number}: its id occurs before"
            kept = findings.add(
                "duplicate_annotation",
                shown,
                what,
                fixed=f"given the id {free + 1}",
                image_id=owner,
                annotation_id=number,
            )
            if not kept:
                continue
            free += 1
            annotation.id = free
        seen.add(annotation.id)
        item.annotations.append(annotation)


@dataclass(frozen=True, slots=True)
class ScanSettings:
    """Settings of the pass over the image files."""

    max_pixels: float
    """Largest image that is decoded."""
    turn: bool
    """Apply EXIF rotation; see `exif_rotation`."""
    cache: tuple[tuple[int, ...], int] | None
    """(short_sides, long_side) to shrink images for, pixels; None: no cache."""


@dataclass(frozen=True, slots=True)
class Scan:
    """The content of an image file, or its fault."""

    fault: tuple[str, str] | None = None
    """(name of the check, fault); the other fields are then not set."""
    width: int = 0
    height: int = 0
    """Size as stored, before rotation, pixels."""
    mode: str = ""
    unusual: bool = False
    orientation: int = 1
    """EXIF's, 1..8."""
    rotate: int = 0
    mirror: bool = False
    """The rotation that decoding will apply; see `exif_rotation`."""
    digest: bytes = b""
    """SHA-256 of the file."""
    sums: tuple[tuple[int, ...], tuple[int, ...]] = ((0, 0, 0), (0, 0, 0))
    """Sum and sum of squares of the stored pixels, 0..255, in each channel."""
    pixels: NDArray[np.uint8] | None = None
    """[h, w, 3], rotated and shrunk for the cache."""

    @property
    def frame(self) -> tuple[int, int]:
        """Return (width, height) after rotation, pixels."""
        swapped = self.rotate in (90, 270)
        return (self.height, self.width) if swapped else (self.width, self.height)


def scan_images(
    data: Path, items: list[Item], settings: ScanSettings, name: str
) -> Iterator[tuple[Item, Scan]]:
    """Read and decode each image once, in the order of `items`.

    Args:
        data: the data folder.
        items: the images.
        settings: limits and sizes.
        name: their name in the progress report.

    Yields:
        Each item with its scan; only some are in memory at a time.
    """

    def work(item: Item) -> Scan:
        return scan_image(data / item.file, (item.image.width, item.image.height), settings)

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(threads) as pool,
        progress(f"check {name}", len(items), "images") as steps,
    ):
        # What PIL warns of is harmless or found by a check.
        warnings.simplefilter("ignore")
        results = _in_order(pool, work, items, ahead=4 * (threads or 1))
        for item, scan in results:
            yield item, scan
            steps.advance()


def scan_image(path: Path, stated: tuple[int, int], settings: ScanSettings) -> Scan:
    """Read and decode one image.

    Args:
        path: the file.
        stated: (width, height) in the JSON, pixels.
        settings: limits and sizes.
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
    except Exception as error:  # noqa: BLE001 - PIL raises almost any type on bad bytes
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
    rotate, mirror = exif_rotation(orientation, rgb.size, stated) if settings.turn else (0, False)
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


def check_scan(item: Item, scan: Scan, shown: str, findings: Findings) -> Frame | None:
    """Compare an image file with its entry in the JSON.

    Args:
        item: the entry.
        scan: the file's content.
        shown: name of the file in messages.
        findings: collects the faults.

    Returns:
        The frame that boxes must fit into; None if the image is left out.
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
    """Results in the order of the items; at most `ahead` are started and not yet consumed."""
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


def check_units(items: list[Item], source: Source, findings: Findings) -> None:
    """Refuse boxes in fractions of the image's size, as in YOLO's files.

    One box within 0..1 may be a tiny object; if all are, no object is larger than a pixel.

    Args:
        items: all images of the JSON, with their annotations.
        source: the JSON.
        findings: collects the fault.
    """
    boxes = [annotation.bbox for item in items for annotation in item.annotations]
    sound = [box for box in boxes if all(_finite(side) for side in box) and min(box[2:]) > 0]
    if sound and all(0 <= value <= 1 for box in sound for value in box):
        findings.refuse(
            source.shown_json,
            f"all {len(sound)} boxes lie between 0 and 1, such as {_show(sound[0])}: parts of the "
            "image's size, as in YOLO's files",
            "write [left, top, width, height] in pixels",
        )


def make_record(
    item: Item, frame: Frame, shown: str, labels: dict[int, int], findings: Findings
) -> Record:
    """Make an image's entry in the index, with the boxes that are valid or were repaired.

    Args:
        item: the image and its annotations.
        frame: its decoded size and rotation.
        shown: name of the JSON in messages.
        labels: class index of each category id.
        findings: collects the faults.
    """
    rows = []
    for annotation in item.annotations:
        check = _BoxCheck(item, annotation.id, shown, findings)
        box = check.box(annotation.bbox, frame)
        area = check.area(annotation.area, box, frame) if box else None
        if box and area is not None:
            label = labels[annotation.category_id]
            rows.append((box, label, area, annotation.crowd, annotation.id))
    return Record(
        id=item.image.id,
        file=item.file,
        width=frame.width,
        height=frame.height,
        rotate=frame.rotate,
        mirror=frame.mirror,
        boxes_xywh=tuple(row[0] for row in rows),
        labels=tuple(row[1] for row in rows),
        areas=tuple(row[2] for row in rows),
        crowd=tuple(row[3] for row in rows),
        annotation_ids=tuple(row[4] for row in rows),
    )


@dataclass(frozen=True, slots=True)
class _BoxCheck:
    """Checks one annotation; a method returns None if the annotation is left out."""

    item: Item
    annotation_id: int
    shown: str
    findings: Findings

    def box(self, bbox: list[Any], frame: Frame) -> Box | None:
        if not all(_finite(value) for value in bbox):
            self._found("not_finite_box", f"box {_show(bbox)} is not four finite numbers")
            return None
        left, top, width, height = (float(value) for value in bbox)
        if width < 0 or height < 0:
            fixed = "its corners swapped"
            if not self._found("negative_box", f"box {_show(bbox)} has a negative side", fixed):
                return None
            left, width = min(left, left + width), abs(width)
            top, height = min(top, top + height), abs(height)
        # Not only size 0: 100 + 1e-20 is 100.
        if left + width == left or top + height == top:
            self._found("empty_box", f"box {_show(bbox)} has no area")
            return None
        box = (
            left * frame.scale_x,
            top * frame.scale_y,
            width * frame.scale_x,
            height * frame.scale_y,
        )
        return self._inside(box, frame)

    def _inside(self, box: Box, frame: Frame) -> Box | None:
        left, top, width, height = box
        right, bottom = left + width, top + height
        size = f"the image of {frame.width}x{frame.height}"
        x0, x1 = max(left, 0.0), min(right, float(frame.width))
        y0, y1 = max(top, 0.0), min(bottom, float(frame.height))
        if x1 <= x0 or y1 <= y0:
            self._found("outside_box", f"box {_show(box)} is outside {size}")
            return None
        if (x0, y0, x1, y1) == (left, top, right, bottom):
            return box
        overhang = max(-left, -top, right - frame.width, bottom - frame.height)
        if overhang > TOLERANCE_PIXELS:
            what = f"box {_show(box)} reaches over {size} by {overhang:.6g} pixels"
            if not self._found("overhanging_box", what, "clipped"):
                return None
        return (x0, y0, x1 - x0, y1 - y0)

    def area(self, area: Any, box: Box, frame: Frame) -> float | None:
        """COCO's area in pixels of the file; the box's area if the JSON has none."""
        whole = box[2] * box[3]
        if area is None:
            return whole
        if _finite(area) and area > 0:
            return float(area) * frame.scale_x * frame.scale_y
        what = f"area {_show(area)} is no positive number"
        return whole if self._found("bad_area", what, "taken from the box") else None

    def _found(self, kind: str, what: str, fixed: str = "") -> bool:
        image = self.item.image
        return self.findings.add(
            kind,
            self.shown,
            f"{image.item}, annotation {self.annotation_id}: {what}",
            image_id=image.id,
            annotation_id=self.annotation_id,
            fixed=fixed,
        )


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
