"""Score thresholds of a model: for each class the score of its best F1 on the val images.

evaluation/thresholds.json   {"iou": 0.5, "weights": sha256, "classes": {name: {"score": 0.5, ...}}}

`evaluate` writes the file. It travels with the model, and is used only with the weights that it
names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Protocol, TypedDict

from pydantic import Field

from runkey.errors import ModelError
from runkey.files import FormatError, read_json

THRESHOLDS = "thresholds.json"
DEFAULT_SCORE = 0.5
"""Of a class without objects in val, and of models that were not evaluated."""


class ClassThreshold(TypedDict):
    """The score that maximises a class's F1, and what it gives there, 0..1."""

    score: Annotated[float, Field(ge=0, le=1)]
    precision: float
    recall: float
    f1: float


class Thresholds(TypedDict):
    """thresholds.json."""

    iou: float
    """At which detections and objects match."""
    weights: str
    """sha256 of the model's weights file."""
    classes: dict[str, ClassThreshold | None]
    """By `class_keys`; None for a class without objects or detections in val."""


class Named(Protocol):
    """A class with a name and a COCO category id."""

    @property
    def id(self) -> int: ...  # noqa: D102
    @property
    def name(self) -> str: ...  # noqa: D102


def class_keys(classes: Sequence[Named]) -> list[str]:
    """Return the classes' names, with the category id where a name is repeated: `car (3)`."""
    repeated = Counter(one.name for one in classes)
    return [one.name if repeated[one.name] == 1 else f"{one.name} ({one.id})" for one in classes]


def read_thresholds(path: Path) -> Thresholds:
    """Read thresholds.json.

    Raises:
        FileNotFoundError: there is none.
        ModelError: it is damaged.
    """
    try:
        read: Thresholds = read_json(path, Thresholds)
    except FormatError as error:
        raise ModelError(f"{path}: {error}; `dvc repro -f evaluate` writes it again") from None
    return read


def score_by_class(thresholds: Thresholds) -> Mapping[str, float]:
    """Return the score of each class that has one."""
    return {name: one["score"] for name, one in thresholds["classes"].items() if one}
