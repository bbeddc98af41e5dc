"""Checks of one JSON against itself and the folder: ids that repeat or lead nowhere, file names."""

from __future__ import annotations

from dataclasses import dataclass

from runkey.data.coco import Coco, CocoAnnotation, CocoImage
from runkey.data.index import ClassName
from runkey.data.layout import Source, path_fault
from runkey.data.report import Findings


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
