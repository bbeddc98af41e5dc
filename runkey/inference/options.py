"""What `runkey predict` is asked for; without torch, so that a wrong option is refused at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runkey.errors import DataError
from runkey.inference.tile import Tiling

Score = float | Mapping[str, float] | Literal["auto"]
"""Least score of a detection: for all classes, by class name (others: auto), or `auto`: each
class's score of best F1 on the val images, from `evaluate`."""

JSON, RESULTS, CSV, SHEET, CVAT = (
    "predictions.json",
    "results.json",
    "predictions.csv",
    "sheet.jpg",
    "cvat.xml",
)
YOLO, VOC, LABELME, IMAGES, FRAMES = "yolo", "voc", "labelme", "images", "frames"
KINDS = {
    "json": f"{JSON}: a COCO file with scores, which `prepare` and labelling tools read",
    "results": f"{RESULTS}: COCO's results format, with the image ids of --coco FILE",
    "csv": f"{CSV}: a row for each detection",
    "yolo": f"{YOLO}/: a text file for each image, and data.yaml",
    "voc": f"{VOC}/: Pascal VOC's XML for each image",
    "labelme": f"{LABELME}/: labelme's JSON for each image",
    "cvat": f"{CVAT}: CVAT's XML 1.1 for images",
    "images": f"{IMAGES}/: images with drawn boxes",
    "sheet": f"{SHEET}: some images, evenly chosen, on one picture",
    "frames": f"{FRAMES}/: frames of videos as JPEG files, which labels are for",
}
DEFAULT_KINDS = ("json", "csv", "images", "sheet")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line chooses."""

    score: Score = "auto"
    """Least score: of all classes, by class name, or `auto`."""
    nms: float | None = None
    """IoU above which the worse of two boxes of a class is dropped; None: kept."""
    tiling: Tiling | None = None
    """None: each image as a whole."""
    batch_size: int = 8
    workers: int | None = None
    """Threads that decode and draw; None: the cores of this process, at most 8."""
    every: int = 1
    """Frame stride of videos."""
    kinds: Sequence[str] = DEFAULT_KINDS
    """Of `KINDS`."""
    coco: Path | None = None
    """COCO file with the ids of the images."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Written into `writers.MARK`: the model, the sources."""

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise DataError(f"--write {unknown[0]}: not one of {', '.join(KINDS)}")
        if "results" in self.kinds and self.coco is None:
            raise DataError("--write results: needs --coco FILE, which holds the images' ids")
        if self.coco is not None and not self.coco.is_file():
            raise DataError(f"--coco {self.coco}: not found")
        if self.nms is not None and not 0 < self.nms <= 1:
            raise DataError(f"--nms {self.nms:g}: an IoU above 0, at most 1")


def parse_score(text: str) -> Score:
    """Parse `auto`, a number, or `name=number,...`.

    Raises:
        DataError: it is none of these, or a number is not in 0..1.
    """
    if text.strip() == "auto":
        return "auto"
    if "=" not in text:
        return _fraction(text, text)
    parts = (part.rpartition("=") for part in text.split(","))
    return {name.strip(): _fraction(number, text) for name, _, number in parts}


def _fraction(number: str, text: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise DataError(f"--score {text}: auto, a number from 0 to 1, or car=0.4,bus=0.6")
    return value


def as_utf8(text: str) -> str:
    """Return a text that UTF-8 can hold: other bytes of a path become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
