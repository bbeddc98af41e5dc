"""Boxes: their unit; of one image numbers, sign, area, and their place in the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from runkey.data.coco import Coco, CocoAnnotation, CocoImage
from runkey.data.index import ClassName, Record
from runkey.data.layout import Source, path_fault
from runkey.data.report import Findings

# Checks of one JSON against itself and the folder: ids that repeat or lead nowhere, file names.


@dataclass(slots=True)
class Item:
    """An image of the JSON that is there, with its annotations."""

    image: CocoImage
    file: str
    """Relative to the data folder, posix."""
    annotations: list[CocoAnnotation]


def check_ids(
    coco: Coco, source: Source, classes: list[ClassName], findings: Findings
) -> list[Item]:
    """The images that exist under a safe name, once each, with annotations of known classes.

    Args:
        coco: what the JSON says; its annotations may be given new ids.
        source: the JSON and its folders.
        classes: the classes that annotations may have.
        findings: takes the faults.
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
    _hand_out(coco, items, source, classes, findings)
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


def _hand_out(
    coco: Coco,
    items: dict[int, Item],
    source: Source,
    classes: list[ClassName],
    findings: Findings,
) -> None:
    """Give each annotation to its image."""
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
        if owner not in items:  # goes with its image, which has been reported
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


# An overhang up to this is rounding, clipped without a word.
TOLERANCE_PIXELS = 1.0

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Frame:
    """The image that boxes must fit, as decoding gives it."""

    width: int
    height: int
    rotate: int
    mirror: bool
    scale_x: float = 1.0
    """Pixels of the file for a pixel of the JSON's width; not 1 where `size_mismatch` was fixed."""
    scale_y: float = 1.0


def check_units(items: list[Item], source: Source, findings: Findings) -> None:
    """Refuse boxes in parts of the image's size, as YOLO's files have them.

    One such box may be a speck; where all are, nothing in the images is larger than a pixel.

    Args:
        items: all images of the JSON, with their annotations.
        source: the JSON.
        findings: takes the fault.
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
    """The image's entry in the index, with the boxes that are sound or were mended.

    Args:
        item: the image and its annotations.
        frame: its decoded size and what decoding applies.
        shown: the JSON as messages name it.
        labels: class index of each category id.
        findings: takes the faults.
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
    """One annotation under the checks; a method gives None where the annotation is left out."""

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
        # Not only 0: 1e-20 to the right of 100 is 100.
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
        """COCO's area in pixels of the file, or the box's where the JSON has none."""
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
    except OverflowError:  # an int beyond every float
        return False


def _show(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_show(v) for v in value) + "]"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = ascii(value)
    return text if len(text) <= 40 else text[:40] + "..."
