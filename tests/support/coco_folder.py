"""A small COCO data set in every layout, to which a test adds one fault."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runkey.data.index import ImageRecord, read_index
from runkey.data.prepare import prepare
from runkey.data.report import Findings
from runkey.params import Checks, Data

WIDTH, HEIGHT = 40, 30


def picture(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """An RGB picture like no other seed's, and like none of its own mirror images."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise[: height // 3, : width // 4] = (250, 10, 10)
    return Image.fromarray(noise)


def _image(number: int, name: str) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}


def _annotation(number: int, image: int, category: int, bbox: list[float]) -> dict[str, Any]:
    area = bbox[2] * bbox[3]
    fields = {"id": number, "image_id": image, "category_id": category, "bbox": bbox}
    return {**fields, "area": area, "iscrowd": 0}


CATEGORIES = [{"id": 1, "name": "ball"}, {"id": 7, "name": "cube"}]


class Folder:
    """`data/` below a root, with train (images 1, 2, 3) and val (11, 12) to be changed freely."""

    picture = staticmethod(picture)

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "data"
        self.out = root / "prepared"
        self.train: Any = {
            "images": [_image(1, "a.jpg"), _image(2, "b.jpg"), _image(3, "c.jpg")],
            "annotations": [
                _annotation(101, 1, 1, [2, 3, 10, 12]),
                _annotation(102, 1, 7, [20, 5, 15, 20]),
                _annotation(103, 2, 1, [0, 0, 40, 30]),
            ],
            "categories": copy.deepcopy(CATEGORIES),
        }
        self.val: Any = {
            "images": [_image(11, "d.jpg"), _image(12, "e.jpg")],
            "annotations": [
                _annotation(201, 11, 1, [2, 3, 10, 12]),
                _annotation(202, 12, 7, [20, 5, 15, 20]),
            ],
            "categories": copy.deepcopy(CATEGORIES),
        }
        for split, names in (("train", "abc"), ("val", "de")):
            (self.data / split).mkdir(parents=True)
            for name in names:
                picture(ord(name)).save(self.data / split / f"{name}.jpg", quality=90)
        (self.data / "annotations").mkdir()
        self.texts: dict[str, str | bytes | None] = {}

    def path(self, split: str) -> Path:
        return self.data / "annotations" / f"instances_{split}.json"

    def write(self) -> None:
        """Write the two JSON files, unless a test has put a text (or None) in their place."""
        for split in ("train", "val"):
            text = self.texts.get(split, json.dumps(getattr(self, split)))
            if isinstance(text, str):
                text = text.encode()
            if text is not None:
                self.path(split).write_bytes(text)

    def prepare(self, num_queries: int = 20, **data: Any) -> Findings:
        """Write the JSON files and run the stage's work on them."""
        checks = Checks(**data.pop("checks", {}))
        section = Data(checks=checks, **data)
        return prepare(section, self.root, self.out, num_queries)

    def run(self, **options: Any) -> Findings:
        self.write()
        return self.prepare(**options)

    def report(self) -> Any:
        return json.loads((self.out / "report.json").read_text())


def index(folder: Folder, split: str = "train") -> dict[int, ImageRecord]:
    """What `prepare` left in the index of a split, by image id."""
    return {record.id: record for record in read_index(folder.out / f"{split}.safetensors")}


def only_item(folder: Folder) -> Any:
    """The one fault that the report has."""
    (item,) = folder.report()["items"]
    return item


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The log's lines so far."""
    caplog.set_level(logging.INFO, "runkey")
    return lambda: [record.getMessage() for record in caplog.records]
