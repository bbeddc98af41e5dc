"""What is in a data set, image by image, small enough to be kept with every run.

    prepared/images.json    {"schema": "images1", "splits": {"train": {"a.jpg": [3, "...", "..."]}}}

By the file's path: the number of boxes, a digest of what they say, a digest of the file.  Two such
lists tell which images were added, removed, labelled anew or replaced, without the data at hand.
COCO's 118,000 images take 9 MB.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runkey.data.index import ClassName, Record, Split
from runkey.errors import DataError
from runkey.hashing import sha256_json

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
