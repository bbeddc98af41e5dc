"""COCO metrics, computed by pycocotools.

    result = evaluate_results(records, classes, results)
    result.summary["AP"], result.per_class[0].ap50

The ground truth comes from the index, in original pixels and category ids.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from runkey.data.index import ClassName, CocoDetection, ImageRecord
from runkey.evaluation.intervals import ClassMatches, collect_matches

SIZES = ("small", "medium", "large")
"""COCO's: areas up to 32 x 32 pixels, up to 96 x 96, and above."""
SUMMARY_NAMES = (
    *("AP", "AP50", "AP75", *(f"AP_{size}" for size in SIZES)),
    *("AR_1", "AR_10", "AR_100", *(f"AR_{size}" for size in SIZES)),
)
"""In the order of `COCOeval.stats`."""


@dataclass(frozen=True, slots=True)
class SizeResult:
    """Metrics of one class among objects of one size."""

    objects: int
    """Number of objects in the ground truth, without crowd regions; each counts in one size."""
    ap: float | None
    """AP averaged over IoU 0.50 to 0.95, 0..1; None without such an object. COCO's, which judges
    an object of exactly 32 x 32 or 96 x 96 pixels in both sizes."""


@dataclass(frozen=True, slots=True)
class ClassResult:
    """Metrics of one class, 0..1; None where the ground truth has no object of it."""

    name: str
    category_id: int
    objects: int
    """Number of objects in the ground truth, without crowd regions."""
    ap: float | None
    """AP averaged over IoU 0.50 to 0.95."""
    ap50: float | None
    ar: float | None
    """Recall averaged over IoU 0.50 to 0.95, at most 100 detections per image."""
    by_size: dict[str, SizeResult]
    """By `SIZES`; empty without `by_size`."""


@dataclass(frozen=True, slots=True)
class CocoResult:
    """Metrics and curves of one set of detections."""

    summary: dict[str, float | None]
    """The twelve metrics by `SUMMARY_NAMES`, 0..1; None where nothing of that size exists."""
    per_class: tuple[ClassResult, ...]
    """In the order of the class list."""
    iou_thresholds: NDArray[np.float64]
    """[T]: 0.50, 0.55, ... 0.95."""
    recalls: NDArray[np.float64]
    """[R]: 0.00, 0.01, ... 1.00, at which precision is given."""
    precision: NDArray[np.float64]
    """[K, T, R]: largest precision at that recall or beyond; NaN for a class without objects."""
    matches: tuple[ClassMatches, ...]
    """Of each class, from which `runkey.evaluation.intervals` computes how sure the metrics are."""


def evaluate_results(
    records: list[ImageRecord],
    classes: list[ClassName],
    results: list[CocoDetection],
    *,
    by_size: bool = True,
) -> CocoResult:
    """Compare all detections, without a score threshold, with the ground truth of `records`.

    Without `by_size`, the metrics of small, medium and large objects are None; they take more than
    half of the time.
    """
    # pycocotools prints its progress and a table.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _ground_truth(records, classes)
        # pycocotools' own `loadRes` fails on an empty list.
        found = [dict(one) for one in results]
        loaded = truth.loadRes(found) if found else _indexed({**truth.dataset, "annotations": []})
        run = COCOeval(truth, loaded, "bbox")
        if not by_size:
            run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], ["all"]
        run.evaluate()
        run.accumulate()
        run.summarize()
    return _result(run, records, classes)


def _result(run: Any, records: list[ImageRecord], classes: list[ClassName]) -> CocoResult:
    # COCOeval orders classes by category id; ours keep the order of the class list.
    position = {int(category): k for k, category in enumerate(run.params.catIds)}
    order = [position[c.id] for c in classes]
    # [T, R, K, area, detections] -> [area, K, T, R] at 100 detections; the first are all areas.
    by_area = run.eval["precision"][..., -1][:, :, order].transpose(3, 2, 0, 1)
    precision = by_area[0]
    recall = run.eval["recall"][:, order, 0, -1].T
    found = [(label, area) for record in records for _, label, area in record.objects()]
    # COCOeval judges an area at a limit (32 x 32) in both sizes; here it counts in the smaller one.
    limits = [most for _, most in run.params.areaRng[1:]]
    sizes = [Counter(label for label, _ in found), *(Counter() for _ in limits)]
    for label, area in found if limits else ():
        sizes[1 + bisect_left(limits[:-1], area)][label] += 1
    per_class = tuple(
        ClassResult(
            name=c.name,
            category_id=c.id,
            objects=sizes[0][k],
            ap=_mean(precision[k]),
            ap50=_mean(precision[k, 0]),
            ar=_mean(recall[k]),
            by_size={
                name: SizeResult(sizes[a][k], _mean(by_area[a, k]))
                for a, name in enumerate(run.params.areaRngLbl)
                if name in SIZES
            },
        )
        for k, c in enumerate(classes)
    )
    return CocoResult(
        summary={
            name: None if value < 0 else float(value)
            for name, value in zip(SUMMARY_NAMES, run.stats, strict=True)
        },
        per_class=per_class,
        iou_thresholds=run.params.iouThrs,
        recalls=run.params.recThrs,
        precision=np.where(precision < 0, np.nan, precision),
        matches=collect_matches(run, order),
    )


def _mean(values: NDArray[np.float64]) -> float | None:
    """Average the values that are defined; pycocotools marks the others with -1."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else None


def _ground_truth(records: list[ImageRecord], classes: list[ClassName]) -> Any:
    numbers = itertools.count(1)  # pycocotools takes a match with annotation id 0 for no match
    return _indexed(
        {
            "info": {},
            "images": [{"id": r.id, "width": r.width, "height": r.height} for r in records],
            "categories": [{"id": c.id, "name": c.name} for c in classes],
            "annotations": [
                {
                    "id": next(numbers),
                    "image_id": r.id,
                    "category_id": classes[label].id,
                    "bbox": list(box),
                    "area": area,
                    "iscrowd": int(crowd),
                }
                for r in records
                for box, label, area, crowd in zip(
                    r.boxes_xywh, r.labels, r.areas, r.crowd, strict=True
                )
            ],
        }
    )


def _indexed(dataset: dict[str, Any]) -> Any:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco
