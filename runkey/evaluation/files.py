"""The files of the evaluate stage; plots read them without torch and pycocotools.

evaluation/metrics.json            the twelve COCO metrics, and those of each class
evaluation/predictions.json        all detections, in COCO's results format
evaluation/precision_recall.json   curves of each class at each IoU threshold
evaluation/resampled.json          AP on resampled sets of the images, to compare runs in pairs
evaluation/thresholds.json         score of each class's best F1 on val, see
                                   `runkey.inference.thresholds`
evaluation/val/                    if there is a test split, whose files the ones above are: the
                                   first four of val

Numbers keep all their digits, so any COCO evaluation of predictions.json gives the same metrics.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
from pydantic import ConfigDict, with_config

from runkey.data.index import ClassName, CocoDetection, ImageRecord, SplitName
from runkey.errors import DataError
from runkey.evaluation.detections import DetectionArrays
from runkey.files import LARGE, FormatError, read_json, replacing, write_atomically
from runkey.hashing import sha256_bytes

if TYPE_CHECKING:
    from runkey.evaluation.coco import CocoResult
    from runkey.evaluation.intervals import Bootstrap, Interval

METRICS_JSON = "metrics.json"
PREDICTIONS = "predictions.json"
PRECISION_RECALL = "precision_recall.json"
RESAMPLED = "resampled.json"
OTHER = "val"
"""Folder of the evaluation on val, if there is a test split."""


class SizeMetrics(TypedDict):
    """The metrics of the small, medium or large objects of a class."""

    AP: float | None
    objects: int


class ClassMetrics(TypedDict):
    """The metrics of a class; None where it has no object.

    Evaluations from before there were intervals have none.
    """

    AP: float | None
    AP_low: NotRequired[float | None]
    AP_high: NotRequired[float | None]
    AP50: float | None
    AP50_low: NotRequired[float | None]
    AP50_high: NotRequired[float | None]
    AR: float | None
    objects: int
    by_size: dict[str, SizeMetrics]


@with_config(ConfigDict(extra="allow"))
class Metrics(TypedDict):
    """metrics.json: COCO's twelve and the loss beside the metrics of each class."""

    AP: float | None
    split: NotRequired[SplitName]
    """Of the images; evaluations from before there was a test split have none: val."""
    per_class: dict[str, ClassMetrics]


class Resampled(TypedDict):
    """resampled.json: AP on the same sets of images for every model.

    Two runs are paired if they agree in `truth`.
    """

    truth: str
    """sha256 of the images' ids and objects, and of the class names."""
    deviations: dict[str, float | None]
    """`Bootstrap.deviations`, by metric."""
    AP: list[float | None]
    AP50: list[float | None]


class _Curve(TypedDict):
    name: str
    objects: int
    ap: float | None
    precision: list[list[float]] | None


class Curves(TypedDict):
    """precision_recall.json."""

    iou: list[float]
    recall: list[float]
    classes: list[_Curve]


_AGAIN = "`dvc repro -f evaluate` writes it again"


def write_results(path: Path, found: DetectionArrays, classes: Sequence[ClassName]) -> None:
    """Write detections in COCO's results format, one a line."""
    with replacing(path) as file:
        file.write(b"[\n" if len(found) else b"[")
        for number, rows in enumerate(batched(found.rows(classes), 10_000)):
            # No value is text, so that this stands between rows alone.
            lines = json.dumps(rows)[1:-1].replace("}, {", "},\n{")
            file.write(f",\n{lines}".encode() if number else lines.encode())
        file.write(b"\n]\n" if len(found) else b"]\n")


def read_results(path: Path, classes: Sequence[ClassName]) -> DetectionArrays:
    """Read detections in COCO's results format; a DataError names a file that is no such list."""
    rows: list[CocoDetection] = read_output(path, list[CocoDetection])
    try:
        return DetectionArrays.from_results(rows, classes)
    except KeyError as error:
        raise DataError(f"{path}: unknown category_id {error}; {_AGAIN}") from None


def ends(intervals: Mapping[str, Interval | None]) -> dict[str, float | None]:
    """Return the ends of intervals by name: AP_low, AP_high, AP50_low, ...; None where unknown."""
    found: dict[str, float | None] = {}
    for name, one in intervals.items():
        found |= {
            f"{name}_low": one.low if one else None,
            f"{name}_high": one.high if one else None,
        }
    return found


def write_metrics(
    path: Path, result: CocoResult, found: Bootstrap, *, split: SplitName = "val", **more: float
) -> None:
    """Write metrics.json of a split; `more` are further metrics, such as the loss.

    Null stands where nothing of that size or class exists, and where an interval is not known.
    """
    repeated = Counter(c.name for c in result.per_class)
    per_class = {
        c.name if repeated[c.name] == 1 else f"{c.name} ({c.category_id})": {
            "AP": c.ap,
            "AP50": c.ap50,
            "AR": c.ar,
            **ends(intervals),
            "objects": c.objects,
            "by_size": {n: {"AP": s.ap, "objects": s.objects} for n, s in c.by_size.items()},
        }
        for c, intervals in zip(result.per_class, found.per_class, strict=True)
    }
    scores = {**result.summary, **ends(found.intervals), **more}
    content = {"split": split, **scores, "per_class": per_class}
    # Unlike `write_json`, this takes the NaN that the loss of a diverged model may be.
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_resampled(
    path: Path, found: Bootstrap, records: Sequence[ImageRecord], classes: Sequence[ClassName]
) -> None:
    """Write resampled.json for the ground truth of `records`."""
    truth = [
        [r.id, r.boxes_xywh, r.labels, r.areas, r.crowd]
        for r in sorted(records, key=lambda r: r.id)
    ]
    digest = sha256_bytes(json.dumps([[c.name for c in classes], truth]).encode())
    content = {"truth": digest, "deviations": found.deviations, **found.resampled}
    write_atomically(path, json.dumps(content) + "\n")


def read_resampled(path: Path) -> Resampled:
    """Read resampled.json; see `read_output`."""
    stored: Resampled = read_output(path, Resampled)
    return stored


def write_precision_recall(path: Path, result: CocoResult) -> None:
    """Write the curves, one class a line; a class without objects has null."""
    lines = ",\n".join(
        json.dumps(
            {
                "name": c.name,
                "objects": c.objects,
                "ap": c.ap,
                "precision": None if c.ap is None else np.round(curves, 4).tolist(),
            },
            ensure_ascii=False,
        )
        for c, curves in zip(result.per_class, result.precision, strict=True)
    )
    iou = np.round(result.iou_thresholds, 2).tolist()
    recall = np.round(result.recalls, 2).tolist()
    write_atomically(path, f'{{"iou": {iou},\n"recall": {recall},\n"classes": [\n{lines}\n]}}\n')


def read_metrics(path: Path) -> Metrics:
    """Read metrics.json; see `read_output`."""
    stored: Metrics = read_output(path, Metrics)
    return stored


def read_precision_recall(path: Path) -> Curves:
    """Read the curves; see `read_output`."""
    stored: Curves = read_output(path, Curves)
    shape = (len(stored["iou"]), len(stored["recall"]))
    for one in stored["classes"]:
        rows = one["precision"]
        if rows is not None and [len(row) for row in rows] != [shape[1]] * shape[0]:
            raise DataError(f"{path}: class {one['name']!a}: precision is not of {shape}; {_AGAIN}")
    return stored


def read_output(path: Path, form: Any = Any) -> Any:
    """Read one of the files; if it is missing or damaged, a DataError says to run evaluate."""
    try:
        return read_json(path, form, LARGE)
    except FileNotFoundError:
        raise DataError(f"{path}: not found; run `dvc repro evaluate` first") from None
    except FormatError as error:
        raise DataError(f"{path}: {error}; {_AGAIN}") from None
