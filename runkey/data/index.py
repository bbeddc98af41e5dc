"""What `prepare` writes for later stages: classes, the index of each split, the list of images.

    prepared/classes.json  prepared/train.json  prepared/val.json  prepared/test.json
    prepared/images.json    {"schema": "images1", "splits": {"train": {"a.jpg": [3, "...", "..."]}}}

images.json (9 MB for COCO) is kept with every run: two such lists tell which images were added,
removed, relabelled or replaced, without the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from pydantic import Field

from runkey.errors import DataError
from runkey.files import LARGE, FormatError, parse_json, read_json, write_atomically
from runkey.hashing import sha256_json

SplitName = Literal["train", "val", "test"]
IntensityRange = tuple[float, float]
"""Values of a grey image of more than 8 bits that become black and white."""


@dataclass(frozen=True, slots=True)
class ClassName:
    """A class: its contiguous index (0..K-1), its category id in the JSON, its name."""

    index: int
    id: int
    name: str


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One checked image and its annotations, in pixels of the original image after rotation."""

    id: int
    """COCO image id."""
    file: str
    """Path relative to the data folder, with forward slashes."""
    width: int
    height: int
    rotate: int
    """Clockwise degrees (0, 90, 180, 270) that decoding applies, from EXIF."""
    mirror: bool
    """Decoding mirrors left-right before rotating, from EXIF."""
    boxes_xywh: tuple[tuple[float, float, float, float], ...]
    """Left, top, width, height, pixels; inside the image, with area."""
    labels: tuple[int, ...]
    """Class index (not category id) of each box."""
    areas: tuple[float, ...]
    """COCO's `area`, square pixels (of the segmentation if there is one); defines S/M/L."""
    crowd: tuple[bool, ...]
    """True for crowd regions: not trained on, and ignored by the evaluation as in COCO."""
    annotation_ids: tuple[int, ...]
    intensity_range: IntensityRange | None = None
    """What decoding scales to 0..255; None: the whole range of the file's type. In the index only
    if there is one."""

    def objects(self) -> list[tuple[tuple[float, float, float, float], int, float]]:
        """Return (box_xywh, label, area) of each annotation that is no crowd region."""
        rows = zip(self.boxes_xywh, self.labels, self.areas, self.crowd, strict=True)
        return [(box, label, area) for box, label, area, crowd in rows if not crowd]


class CocoDetection(TypedDict):
    """One detection in COCO's results format."""

    image_id: int
    category_id: int
    bbox: Annotated[list[float], Field(min_length=4, max_length=4)]
    """Left, top, width, height in pixels of the original image."""
    score: float


def write_classes(path: Path, classes: list[ClassName]) -> None:
    """Write classes.json, one class a line."""
    lines = ",\n".join(json.dumps(asdict(c), ensure_ascii=False) for c in classes)
    write_atomically(path, f"[\n{lines}\n]\n")


def read_classes(path: Path) -> list[ClassName]:
    """Read classes.json; a DataError if it is missing or damaged."""
    classes: list[ClassName] = _read(path, list[ClassName])
    if not classes or [one.index for one in classes] != list(range(len(classes))):
        raise DataError(f"{path}: the indices are not 0, 1, 2 ...; {_AGAIN}")
    return classes


def write_index(path: Path, records: list[ImageRecord]) -> None:
    """Write a split's index, one image a line."""
    rows = ({n: v for n, v in asdict(record).items() if v is not None} for record in records)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_atomically(path, f'{{"images": [\n{lines}\n]}}\n')


def read_index(path: Path) -> list[ImageRecord]:
    """Read a split's index; a DataError if it is missing or damaged."""
    records: list[ImageRecord] = _read(path, _Index)["images"]
    for record in records:
        sizes = {len(getattr(record, name)) for name in _PER_BOX}
        if len(sizes) > 1 or record.width < 1 or record.height < 1 or record.rotate % 90:
            raise DataError(f"{path}: image {record.id}: its lists do not fit each other; {_AGAIN}")
    return records


_PER_BOX = ("boxes_xywh", "labels", "areas", "crowd", "annotation_ids")
_AGAIN = "`dvc repro -f prepare` writes it again"


class _Index(TypedDict):
    images: list[ImageRecord]


def _read(path: Path, form: Any) -> Any:
    try:
        return read_json(path, form, LARGE)
    except FileNotFoundError:
        raise DataError(f"{path}: not found; run `dvc repro prepare` first") from None
    except FormatError as error:
        raise DataError(f"{path}: {error}; {_AGAIN}") from None


IMAGE_LIST = "images.json"
_LIST_SCHEMA = "images1"
_DIGITS = 16
"""Hex digits of each digest: 64 bits distinguish the images of a data set."""


@dataclass(frozen=True, slots=True)
class ListedImage:
    """What a comparison of data sets needs to know of an image."""

    boxes: int
    """Number of boxes, crowd regions included."""
    labels: str
    """Digest of its boxes with their classes; their order does not matter."""
    content: str
    """Digest of the file's bytes."""


ImageList = Mapping[str, Mapping[str, ListedImage]]
"""Images by split and path."""


def write_image_list(
    path: Path,
    images: Mapping[SplitName, Iterable[tuple[ImageRecord, bytes]]],
    classes: Iterable[ClassName],
) -> None:
    """Write the list of images, each given with its file's sha256, one a line, sorted by path.

    Boxes are hashed with the names of their classes, not with indices.
    """
    names = [entry.name for entry in classes]
    splits = []
    for split, members in images.items():
        rows = sorted((record.file, _row(record, digest, names)) for record, digest in members)
        lines = ",\n".join(f"{_json(file)}: {_json(row)}" for file, row in rows)
        splits.append(f"{_json(split)}: {{\n{lines}\n}}")
    body = ",\n".join(splits)
    write_atomically(path, f'{{"schema": "{_LIST_SCHEMA}", "splits": {{\n{body}\n}}}}\n')


def read_image_list(content: bytes, where: str) -> ImageList:
    """Parse the bytes that `write_image_list` wrote; a DataError names the file `where`."""
    try:
        stored = parse_json(content)
        if stored["schema"] != _LIST_SCHEMA:
            raise DataError(
                f"{where}: schema {stored['schema']!r}; this runkey reads {_LIST_SCHEMA}"
            )
        return {
            split: {file: ListedImage(*row) for file, row in members.items()}
            for split, members in stored["splits"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{where}: not a list of images; `dvc repro prepare` writes it") from None


def _row(record: ImageRecord, digest: bytes, names: list[str]) -> list[Any]:
    boxes = sorted(
        [names[label], *box, crowd]
        for label, box, crowd in zip(record.labels, record.boxes_xywh, record.crowd, strict=True)
    )
    return [len(boxes), sha256_json(boxes)[:_DIGITS], digest.hex()[:_DIGITS]]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
