"""What the evaluate stage writes.

evaluation/metrics.json            the twelve numbers, and each class's
evaluation/predictions.json        all detections, COCO's results format
evaluation/precision_recall.json   curves of each class at each IoU, for runkey.plots
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runkey.errors import DataError

if TYPE_CHECKING:  # plots read these files, and need no pycocotools for that
    from runkey.evaluation.coco import CocoResult

METRICS = "metrics.json"
PREDICTIONS = "predictions.json"
PRECISION_RECALL = "precision_recall.json"


def metrics_json(result: CocoResult) -> dict[str, Any]:
    """The numbers as metrics.json holds them; null where nothing of that size or class exists."""
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
    return {**result.summary, "per_class": per_class}


def write_metrics(path: Path, result: CocoResult, **more: float) -> None:
    """Write metrics.json; `more` are further numbers, such as the loss, after the twelve."""
    numbers = metrics_json(result)
    per_class = numbers.pop("per_class")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**numbers, **more, "per_class": per_class}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_metrics(path: Path) -> dict[str, Any]:
    """Read metrics.json.

    Raises:
        DataError: the file is not there; says to run evaluate.
    """
    return _read(path)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'{{"iou": {iou},\n"recall": {recall},\n"classes": [\n{lines}\n]}}\n', encoding="utf-8"
    )


def read_precision_recall(path: Path) -> dict[str, Any]:
    """Read the curves.

    Raises:
        DataError: the file is not there; says to run evaluate.
    """
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: not found; run `dvc repro evaluate` first") from None
    return content
