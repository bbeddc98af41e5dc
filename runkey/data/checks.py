"""The checks of `prepare`: ids and file names of a JSON, image files, boxes.

A check calls `_mend(NAME, ...)`, or `_leave_out` if there is no fix; NAME is a field of
`params.Checks`. Images are decoded once, by `runkey.data.scan` in one thread per core; the same
pass sums the pixels for the mean.
"""

from __future__ import annotations

import os
import posixpath
import re
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from runkey.data import box_format
from runkey.data.box_format import is_finite
from runkey.data.coco import Coco, CocoAnnotation, CocoImage
from runkey.data.index import ImageRecord
from runkey.data.pixel_range import PixelRange
from runkey.data.report import Findings
from runkey.data.scan import FileError, Scan, scan_image
from runkey.params import Data
from runkey.progress import progress
from runkey.units import counted

_ABSOLUTE = re.compile("/|[A-Za-z]:")
# A box that overhangs the image by less is rounding, clipped without a finding.
TOLERANCE_PIXELS = 1.0

# Kinds of faults that cost an annotation, or part of its box, or an image.
_BOX_FAULTS = {
    *("malformed_annotation", "unknown_category", "unknown_image", "not_finite_box"),
    *("negative_box", "empty_box", "outside_box", "overhanging_box"),
}
_IMAGE_FAULTS = {
    *("malformed_image", "missing_image", "unsafe_path", "unreadable_image", "too_large_image"),
    *("size_mismatch", "exif_rotation", "unusual_mode"),
}
_FEW = 3
"""So few bad items are no sign of a wrong export, unless they are most."""
_REDUCED, _MANY = 0.75, 10
"""Of so many boxes that are to be scaled by so much or less, some would not fit the file before."""

_Box = tuple[float, float, float, float]
"""xywh, pixels."""


class _LeftOut(Exception):  # noqa: N818 - no error: the fault is recorded
    """An image or an annotation does not stay."""


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """An accepted image on its way into a split."""

    record: ImageRecord
    name: str
    """Its file_name in the JSON."""
    digest: bytes
    """SHA-256 of the file."""
    sums: NDArray[np.int64]
    """[2, 3]: sum and sum of squares of the stored pixels, 0..255, in each channel."""

    @property
    def classes(self) -> frozenset[int]:
        """Return the classes of its objects, without crowd regions."""
        return frozenset(label for _, label, _ in self.record.objects())


@dataclass(slots=True)
class _Tally:
    """What is counted over a JSON."""

    frames: list[tuple[CocoImage, tuple[float, float], float]] = field(default_factory=list)
    """Of each accepted image: its size in the JSON's pixels, and the scale to the file's."""
    large_areas: list[tuple[float, float]] = field(default_factory=list)
    """Areas that are larger than their box, each also as a multiple of it."""
    copies: dict[bytes, CheckedImage] = field(default_factory=dict)
    """The first image of each file's digest."""
    relabelled: int = 0
    """Copies of an image with other objects than the first one has."""


@dataclass(frozen=True, slots=True)
class SourceChecks:
    """The checks of one JSON and its images."""

    coco: Coco
    data: Data
    labels: Mapping[int, int]
    """Class index of each category id."""
    findings: Findings
    pixels: PixelRange
    tally: _Tally = field(default_factory=_Tally)

    def accepted_images(self) -> Iterator[CheckedImage]:
        """Check the entries, then every file against the JSON, then its boxes against the image.

        Yields the accepted images in order; the pixels of only some are in memory at a time.
        """
        start = len(self.findings.items)
        images = self._listed_images()
        for image, future in self._scan_images(images):
            with suppress(_LeftOut):
                yield self._accept(image, future)
        self._check_fractions(start)
        self._check_scaling()

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
        self._check_together(list(images.values()))
        return list(images.values())

    def _locate(self, image: CocoImage) -> str:
        """The image's file, relative to the data folder."""
        source = self.coco.source
        absolute = _ABSOLUTE.match(image.name)
        if absolute or ".." in image.name.split("/"):
            fault = "is an absolute path" if absolute else "has `..` in it"
            self._leave_out("unsafe_path", f"{image.item}: its name {fault}", image.id)
        file = source.find(posixpath.normpath(image.name))
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

    def _check_together(self, images: list[CocoImage]) -> None:
        """Check what all boxes of the JSON tell together: their unit, their areas, copies."""
        rows = [
            (a, number, (image.width, image.height))
            for number, image in enumerate(images)
            for a in image.annotations
            if all(map(is_finite, a.bbox)) and min(a.bbox[2:]) > 0
        ]
        if not rows:
            return
        annotations, numbers, sizes = zip(*rows, strict=True)
        boxes = np.array([a.bbox for a in annotations], dtype=np.float64)
        of_image = np.array(numbers, dtype=np.int64)
        self._check_units(boxes, np.array(sizes, dtype=np.float64), of_image)
        areas = [a.area if is_finite(a.area) else 0 for a in annotations]
        part = box_format.common_part(np.array(areas, dtype=np.float64), boxes)
        if part is not None:
            self.findings.notes.append(
                f"{self.coco.source.shown_json}: every `area` is {part:.3g} of its box; were the "
                "boxes scaled, and the areas not? They decide what counts as small, medium, large"
            )
        kinds = np.array([2 * self.labels[a.category_id] + a.crowd for a in annotations])
        for later, first in box_format.doubled(boxes, of_image, kinds).items():
            annotations[later].twin = annotations[first].id

    def _check_units(
        self, boxes: NDArray[np.float64], sizes: NDArray[np.float64], of_image: NDArray[np.int64]
    ) -> None:
        """Refuse boxes in fractions, percent or thousandths of the image's size."""
        shown, way_out = self.coco.source.shown_json, "write [left, top, width, height] in pixels"
        within = box_format.fractions_of_size(boxes)
        count, total = int(within.sum()), len(boxes)
        example = _show(boxes[int(within.argmax())].tolist())
        lie = f"{count} of {total} boxes lie between 0 and 1, such as {example}"
        if count == total:
            those = "the only box lies" if total == 1 else f"all {counted(total, 'box')} lie"
            lie = f"{those} between 0 and 1, such as {example}"
        if self._too_many(count, total):
            what = f"{lie}: parts of the image's size, as in YOLO's files"
            self.findings.refuse(shown, what, way_out)
            return
        if count:
            self.findings.notes.append(f"{shown}: {lie}: smaller than a pixel")
        unit = box_format.whole_of_unit(boxes, sizes, of_image)
        if unit and self.data.max_bad_fraction < 1:
            name = {100: "percent", 1000: "thousandths"}[unit]
            self.findings.refuse(
                shown,
                f"nearly all of {total} boxes lie between 0 and {unit}, in images of up to "
                f"{sizes[:, 0].max():g}x{sizes[:, 1].max():g}: {name} of the image's size",
                f"{way_out}, or set data.max_bad_fraction: 1 if they are",
            )

    def _too_many(self, count: int, total: int) -> bool:
        """Return True if so many bad items are no accident but a wrong export."""
        few = count < _FEW and 2 * count <= total
        return count > self.data.max_bad_fraction * total and not few

    def _check_fractions(self, start: int) -> None:
        """Refuse a JSON whose boxes, or images, were left out or clipped by a large fraction.

        `start`: number of findings that were there before its images were checked.
        """
        name, limit = self.coco.source.shown_json, f"{self.data.max_bad_fraction:g}"
        boxes: dict[tuple[int | None, Any], str] = {}
        pictures: dict[int | None, str] = {}
        for position, item in enumerate(self.findings.items):
            if item.policy == "fail" or (position < start and item.file != name):
                continue
            if item.kind in _BOX_FAULTS:
                boxes[item.image_id, item.annotation_id or item.what] = item.kind
            elif item.kind in _IMAGE_FAULTS and item.policy == "drop":
                pictures[item.image_id] = item.kind
        images, annotations = self.coco.images, self.coco.annotations
        malformed = Counter([*boxes.values(), *pictures.values()])
        way_out = f"or raise data.max_bad_fraction (now {limit}) in params.yaml if that is right"
        total = len(images) + malformed["malformed_image"]
        if self._too_many(len(pictures), total):
            self.findings.refuse(
                name,
                f"{len(pictures)} of {total} images are left out ({_kinds(pictures)})",
                f"see {self.findings.report} and mend the files, {way_out}",
            )
        total = len(annotations) + malformed["malformed_annotation"]
        if self._too_many(len(boxes), total):
            cause = self._likely_cause()
            self.findings.refuse(
                name,
                f"{len(boxes)} of {total} boxes are left out or changed ({_kinds(boxes)})"
                + (f": {cause}" if cause else ""),
                f"mend the export, {way_out}",
            )
        relabelled = self.tally.relabelled
        if self._too_many(relabelled, len(images)):
            self.findings.refuse(
                name,
                f"{relabelled} of {len(images)} images are copies of others with other objects",
                f"list each image once, with all its objects, {way_out}",
            )
        elif relabelled and self.data.checks.copied_image == "drop":
            self.findings.notes.append(
                f"{name}: {counted(relabelled, 'image')} left out as copies had other objects than "
                "the first; list each once, with all its objects (data.checks.copied_image: fail "
                "stops at them)"
            )
        large = np.array(self.tally.large_areas, dtype=np.float64).reshape(-1, 2)
        # One area for boxes of all sizes is a placeholder, and says nothing about the boxes.
        is_placeholder = len(large) and np.ptp(large[:, 0]) == 0 < np.ptp(large[:, 1])
        if self._too_many(len(large), total) and not is_placeholder:
            self.findings.refuse(
                name,
                f"{len(large)} of {total} areas are larger than their box, "
                f"{np.median(large[:, 1]):.3g} times as large: the boxes were scaled, and the "
                "areas not",
                f"mend the export, {way_out}",
            )

    def _likely_cause(self) -> str:
        boxes: list[list[float]] = []
        frames: list[tuple[float, float]] = []
        for image, frame, _ in self.tally.frames:
            sound = box_format.sound_boxes([a.bbox for a in image.annotations])
            boxes += sound
            frames += [frame] * len(sound)
        return box_format.likely_cause(np.array(boxes, dtype=np.float64), np.array(frames))

    def _check_scaling(self) -> None:
        """Refuse to scale boxes down that all fit the files as they are."""
        boxes = 0
        for image, frame, scale in self.tally.frames:
            if scale <= _REDUCED:
                sound = box_format.sound_boxes([a.bbox for a in image.annotations])
                if not box_format.fits(sound, (frame[0] * scale, frame[1] * scale)):
                    return
                boxes += len(sound)
        if boxes >= _MANY:
            self.findings.refuse(
                self.coco.source.shown_json,
                f"size_mismatch: fix would scale {counted(boxes, 'box')}, which all fit their files"
                " as they are: width and height in the JSON seem to be placeholders",
                "write the sizes of the files",
            )
        elif boxes:  # too few to tell
            self.findings.notes.append(
                f"{self.coco.source.shown_json}: size_mismatch: fix scales {counted(boxes, 'box')}"
                " down, and all would fit their files as they are: look at contact_sheet.jpg; if"
                " width and height in the JSON are placeholders, write the sizes of the files"
            )

    def _scan_images(self, images: list[CocoImage]) -> Iterator[tuple[CocoImage, Future[Scan]]]:
        """Scan each image once, in order, some of them ahead of the consumer."""
        source = self.coco.source

        def submit(image: CocoImage) -> tuple[CocoImage, Future[Scan]]:
            path = source.data / image.file
            return image, pool.submit(scan_image, path, image, self.data)

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

    def _accept(self, image: CocoImage, future: Future[Scan]) -> CheckedImage:
        """Check a file against the JSON, then its boxes; keep those that are valid or mended."""
        file, item = self.coco.source.show(image.file), f"image {image.id}"
        try:
            scan = future.result()
        except FileError as error:
            kind, what = error.args
            self._leave_out(kind, f"{item} {what}", image.id, file)
        for kind, what, fixed in scan.faults:
            self._mend(kind, f"{item} {what}", image.id, file, fixed=fixed)
        rows = []
        for annotation in image.annotations:
            with suppress(_LeftOut):
                if annotation.twin is not None:
                    what = (
                        f"{image.item}, annotation {annotation.id}: its class and box "
                        f"{_show(annotation.bbox)} are those of annotation {annotation.twin}"
                    )
                    fault, kept = "duplicate_object", "left out, the first kept"
                    number = annotation.id
                    self._leave_out(fault, what, image.id, annotation_id=number, dropped=kept)
                box, area = self._check_box(image, annotation, scan)
                label = self.labels[annotation.category_id]
                rows.append((box, label, area, annotation.crowd, annotation.id))
        boxes, labels, areas, crowd, ids = zip(*rows, strict=True) if rows else ((),) * 5
        intensity_range = self.data.intensity_range if scan.is_wide else None
        decoding = (*scan.frame, *scan.rotation)
        columns = (boxes, labels, areas, crowd, ids)
        record = ImageRecord(image.id, image.file, *decoding, *columns, intensity_range)
        checked = CheckedImage(record, image.name, scan.digest, scan.sums)
        self._check_copy(image, checked)
        self._count(image, scan)
        return checked

    def _count(self, image: CocoImage, scan: Scan) -> None:
        frame = (scan.frame[0] / scan.scale[0], scan.frame[1] / scan.scale[1])
        self.tally.frames.append((image, frame, min(scan.scale)))
        self.pixels.add(image.file, scan.values, is_grey=scan.is_wide, is_flat=scan.is_flat)

    def _check_copy(self, image: CocoImage, checked: CheckedImage) -> None:
        """Leave out a file with the bytes of an earlier one."""
        first = self.tally.copies.setdefault(checked.digest, checked)
        if first is not checked:
            what = (
                f"{image.item} has the same bytes as image {first.record.id} ({first.record.file})"
            )
            if _objects(first.record) != _objects(checked.record):
                self.tally.relabelled += 1
                what += ", and other boxes or classes"
            kept = "left out, the first kept"
            self._leave_out("copied_image", what, image.id, dropped=kept)

    def _check_box(
        self, image: CocoImage, annotation: CocoAnnotation, scan: Scan
    ) -> tuple[_Box, float]:
        """The box and COCO's area in pixels of the file."""

        def mend(kind: str, what: str, fixed: str = "") -> None:
            what = f"{image.item}, annotation {annotation.id}: {what}"
            self._mend(kind, what, image.id, annotation_id=annotation.id, fixed=fixed)

        scale = scan.scale
        sound = _sound_box(annotation.bbox, scale, mend)
        box, area = _inside(sound, scan.frame, mend), annotation.area
        if area is not None and not (is_finite(area) and area > 0):
            mend("bad_area", f"area {_show(area)} is no positive number", "taken from the box")
            area = None
        if area is None:
            return box, box[2] * box[3]
        of_box = (sound[2] + scale[0]) * (sound[3] + scale[1])  # a mask's last row counts or not
        area = float(area) * scale[0] * scale[1]
        if area > of_box:
            self.tally.large_areas.append((annotation.area, area / (sound[2] * sound[3])))
            what = f"area {_show(annotation.area)} is larger than the box {_show(annotation.bbox)}"
            mend("bad_area", what, "taken from the box")
            area = box[2] * box[3]
        return box, area


def _objects(record: ImageRecord) -> list[Any]:
    return sorted(zip(record.boxes_xywh, record.labels, record.crowd, strict=True))


def _kinds(kinds: Mapping[Any, str]) -> str:
    """Format how many items have which fault: `outside_box 12, overhanging_box 4`."""
    return ", ".join(f"{kind} {count}" for kind, count in Counter(kinds.values()).most_common())


def _sound_box(bbox: list[Any], scale: tuple[float, float], mend: Callable[..., None]) -> _Box:
    """The box in pixels of the file, with sides above 0."""
    if not all(map(is_finite, bbox)):
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


def _show(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_show(v) for v in value) + "]"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = ascii(value)
    return text if len(text) <= 40 else text[:40] + "..."
