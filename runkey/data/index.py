"""What `prepare` hands to all later stages: a checked index of each split, and the classes.

    prepared/classes.json    [{"index": 0, "id": 1, "name": "one"}, ...]   index: 0..K-1, id: COCO's
    prepared/train.json      {"images": [{"id": ..., "file": ..., "boxes_xywh": [...], ...}, ...]}
    prepared/val.json        the same

The originals are not copied: `file` is relative to the data folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from runkey.errors import DataError

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
