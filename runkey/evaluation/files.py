"""The files of the evaluate stage; plots read them without torch and pycocotools.

evaluation/metrics.json            the twelve COCO metrics, and those of each class
evaluation/predictions.json        all detections, in COCO's results format
evaluation/precision_recall.json   curves of each class at each IoU threshold

Numbers keep all their digits, so any COCO evaluation of predictions.json gives the same metrics.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from runkey.errors import DataError
from runkey.files import write_atomically

if TYPE_CHECKING:
    from runkey.evaluation.coco import CocoResult

METRICS_JSON = "metrics.json"
PREDICTIONS = "predictions.json"
PRECISION_RECALL = "precision_recall.json"


class CocoDetection(TypedDict):
    """One detection in COCO's results format."""

    image_id: int
    category_id: int
    bbox: list[float]
    """Left, top, width, height in pixels of the original image."""
    score: float


def write_results(path: Path, results: list[CocoDetection]) -> None:
    """Write detections in COCO's results format, one a line."""
    lines = ",\n".join(json.dumps(found) for found in results)
    write_atomically(path, f"[\n{lines}\n]\n" if results else "[]\n")


def read_results(path: Path) -> list[CocoDetection]:
    """Read detections in COCO's results format; a DataError names a file that is no such list."""
    results = read_output(path)
    keys = CocoDetection.__required_keys__
    whole = (isinstance(one, dict) and keys <= set(one) for one in results)
    if not isinstance(results, list) or not all(whole):
        raise DataError(f"{path}: not COCO's results format (a list of {sorted(keys)})")
    return results


def write_metrics(path: Path, result: CocoResult, **more: float) -> None:
    """Write metrics.json; `more` are further metrics, such as the loss, after the twelve.

    Null stands where nothing of that size or class exists.
    """
    repeated = Counter(c.name for c in result.per_class)
    per_class = {
        c.name if repeated[c.name] == 1 else f"{c.name} ({c.category_id})": {
            "AP": c.ap,
            "AP50": c.ap50,
            "AR": c.ar,
            "objects": c.objects,
            "by_size": {n: {"AP": s.ap, "objects": s.objects} for n, s in c.by_size.items()},
        }
        for c in result.per_class
    }
    content = {**result.summary, **more, "per_class": per_class}
    # Unlike `write_json`, this takes the NaN that the loss of a diverged model may be.
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


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


def read_output(path: Path) -> Any:
    """Read one of the files; if it is missing or no JSON, a DataError says to run evaluate."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: not found; run `dvc repro evaluate` first") from None
    except ValueError as error:
        raise DataError(f"{path}: no JSON ({error}); run `dvc repro -f evaluate`") from None
