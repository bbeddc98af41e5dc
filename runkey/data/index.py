"""What is in a data set, image by image, small enough to be kept with every run.

    prepared/images.json    {"schema": "images1", "splits": {"train": {"a.jpg": [3, "...", "..."]}}}

By the file's path: the number of boxes, a digest of what they say, a digest of the file.  Two such
lists tell which images were added, removed, labelled anew or replaced, without the data at hand.
COCO's 118,000 images take 9 MB.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from runkey.errors import DataError
from runkey.hashing import sha256_json

# What `prepare` hands to all later stages: a checked index of each split, and the classes.


Split = Literal["train", "val"]


@dataclass(frozen=True, slots=True)
class ClassName:
    """A class: its contiguous index (0..K-1), the category id that the JSON has, its name."""

    index: int
    id: int
    name: str


@dataclass(frozen=True, slots=True)
class Record:
    """One checked image with its annotations, in original pixels after `rotate` was applied."""

    id: int
    """COCO image id."""
    file: str
    """Path relative to the data folder, posix."""
    width: int
    height: int
    rotate: int
    """Clockwise degrees (0, 90, 180, 270) that decoding applies, from EXIF."""
    mirror: bool
    """Whether decoding mirrors left-right before rotating, from EXIF."""
    boxes_xywh: tuple[tuple[float, float, float, float], ...]
    """Left, top, width, height in pixels; inside the image, with area."""
    labels: tuple[int, ...]
    """Class index (not category id) of each box."""
    areas: tuple[float, ...]
    """COCO's `area` (of the segmentation where there is one), which S/M/L are judged by."""
    crowd: tuple[bool, ...]
    """Crowd regions: never trained on, ignored by the evaluation as COCO does."""
    annotation_ids: tuple[int, ...]


def write_classes(path: Path, classes: list[ClassName]) -> None:
    """Write classes.json, one class a line."""
    lines = ",\n".join(json.dumps(asdict(c), ensure_ascii=False) for c in classes)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_classes(path: Path) -> list[ClassName]:
    """Read classes.json.

    Raises:
        DataError: the file is not there; says to run prepare.
    """
    return [ClassName(**entry) for entry in json.loads(_read(path))]


def write_index(path: Path, records: list[Record]) -> None:
    """Write a split's index, one image a line (so that a diff shows images)."""
    lines = ",\n".join(json.dumps(asdict(r), ensure_ascii=False) for r in records)
    path.write_text(f'{{"images": [\n{lines}\n]}}\n', encoding="utf-8")


def read_index(path: Path) -> list[Record]:
    """Read a split's index.

    Raises:
        DataError: the file is not there; says to run prepare.
    """
    return [_record(entry) for entry in json.loads(_read(path))["images"]]


def _record(entry: dict[str, object]) -> Record:
    entry["boxes_xywh"] = tuple(tuple(box) for box in entry["boxes_xywh"])  # type: ignore[attr-defined]
    for name in ("labels", "areas", "crowd", "annotation_ids"):
        entry[name] = tuple(entry[name])  # type: ignore[arg-type]
    return Record(**entry)  # type: ignore[arg-type]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: not found; run `dvc repro prepare` first") from None


IMAGE_LIST = "images.json"
SCHEMA = "images1"
_DIGITS = 16
"""Of each digest, in hex: 64 bits tell the images of one data set apart."""


@dataclass(frozen=True, slots=True)
class ListedImage:
    """An image of a data set as far as a comparison needs it."""

    boxes: int
    """Crowd regions are counted too."""
    labels: str
    """Digest of its boxes with their classes, in any order."""
    content: str
    """Digest of the file's bytes."""


ImageList = Mapping[str, Mapping[str, ListedImage]]
"""Images by split and path."""


def write_image_list(
    path: Path,
    images: Mapping[Split, Iterable[tuple[Record, bytes]]],
    classes: Iterable[ClassName],
) -> None:
    """Write the list, one image a line, in the order of the paths.

    Args:
        path: the file.
        images: by split, each image with the sha256 of its file.
        classes: of the labels; their names are hashed, not their numbers.
    """
    names = [entry.name for entry in sorted(classes, key=lambda entry: entry.index)]
    splits = []
    for split, members in images.items():
        rows = sorted((record.file, _row(record, digest, names)) for record, digest in members)
        lines = ",\n".join(f"{_json(file)}: {_json(row)}" for file, row in rows)
        splits.append(f"{_json(split)}: {{\n{lines}\n}}")
    body = ",\n".join(splits)
    path.write_text(f'{{"schema": "{SCHEMA}", "splits": {{\n{body}\n}}}}\n', encoding="utf-8")


def read_image_list(content: bytes, where: str) -> ImageList:
    """The list that `write_image_list` wrote.

    Args:
        content: of the file.
        where: said in errors.

    Raises:
        DataError: it is no such list.
    """
    try:
        stored = json.loads(content)
        if stored["schema"] != SCHEMA:
            raise DataError(f"{where}: schema {stored['schema']!r}; this runkey reads {SCHEMA}")
        return {
            split: {file: ListedImage(*row) for file, row in members.items()}
            for split, members in stored["splits"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{where}: not a list of images; `dvc repro prepare` writes it") from None


def _row(record: Record, digest: bytes, names: list[str]) -> list[Any]:
    said = sorted(
        [names[label], *box, crowd]
        for label, box, crowd in zip(record.labels, record.boxes_xywh, record.crowd, strict=True)
    )
    return [len(said), sha256_json(said)[:_DIGITS], digest.hex()[:_DIGITS]]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
