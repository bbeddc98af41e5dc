"""A fault for the good data set of tests/support/coco_folder.py, and the line about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TRAIN = "data/annotations/instances_train.json"
VAL = "data/annotations/instances_val.json"
MALFORMED_IMAGE = "set data.checks.malformed_image: drop in params.yaml or mend the file"
MALFORMED_BOX = "set data.checks.malformed_annotation: drop in params.yaml or mend the file"


@dataclass(frozen=True)
class Case:
    name: str
    change: Callable[[Any], Any]
    line: str
    options: dict[str, Any] = field(default_factory=dict)


def image(number: int, **fields: Any) -> Callable[[Any], None]:
    """Change fields of a train image; `None` takes the field away."""

    def change(folder: Any) -> None:
        entry = folder.train["images"][number]
        entry.update(fields)
        for name in [name for name, value in fields.items() if value is None]:
            del entry[name]

    return change


def annotation(number: int, **fields: Any) -> Callable[[Any], None]:
    def change(folder: Any) -> None:
        entry = folder.train["annotations"][number]
        entry.update(fields)
        for name in [name for name, value in fields.items() if value is None]:
            del entry[name]

    return change


def text(split: str, content: str | bytes | None) -> Callable[[Any], None]:
    return lambda folder: folder.texts.update({split: content})


def without_list(name: str) -> Callable[[Any], None]:
    return lambda folder: folder.train.pop(name)


def categories(split: str, *entries: Any) -> Callable[[Any], None]:
    return lambda folder: getattr(folder, split).update(categories=list(entries))


def policy(kind: str) -> dict[str, Any]:
    return {"checks": {kind: "fail"}}
