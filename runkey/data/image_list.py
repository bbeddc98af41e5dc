"""The list of images that `prepare` writes and that is kept with every run (9 MB for COCO).

    prepared/images.json    {"schema": "images1", "splits": {"train": {"a.jpg": [3, "...", "..."]}}}

Two such lists tell which images were added, removed, relabelled or replaced, without the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runkey.errors import DataError
from runkey.files import parse_json, write_atomically
from runkey.hashing import sha256_json

if TYPE_CHECKING:  # imports numpy, which commands that read a list do without
    from runkey.data.index import ClassName, ImageRecord, SplitName

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

    def is_of(self, sha256: str) -> bool:
        """Return True if the file's bytes have this hex sha256."""
        return sha256[:_DIGITS] == self.content


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
