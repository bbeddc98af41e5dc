"""The COCO metrics of an evaluation by pycocotools, to compare: `check_metrics(result, ...)`.

Classes do not depend on each other, so that each process evaluates some of them at a time; what
pycocotools holds in memory, 2.5 kB a detection, is that of these alone. Its own code averages.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from runkey.data.index import ClassName, CocoDetection, ImageRecord
from runkey.errors import EvaluationError
from runkey.evaluation.coco import (
    SUMMARY_NAMES,
    ClassResult,
    CocoArrays,
    CocoResult,
    class_results,
)
from runkey.evaluation.detections import DetectionArrays
from runkey.progress import progress

_AT_ONCE = 50_000
"""Detections of a part; a class is not divided."""
_MOST_PROCESSES = 8
_AWAY = "runtime.cross_check: false leaves the comparison out"


@dataclass(frozen=True, slots=True)
class _Part:
    """Some classes of an evaluation."""

    image_ids: tuple[int, ...]
    categories: tuple[int, ...]
    annotations: list[dict[str, Any]]
    found: DetectionArrays
    classes: Sequence[ClassName]


def check_metrics(
    result: CocoResult,
    records: Sequence[ImageRecord],
    classes: Sequence[ClassName],
    found: DetectionArrays,
) -> None:
    """Compare metrics with those that pycocotools computes, which must be the same bits.

    Raises:
        EvaluationError: a metric differs, or a process was killed; names it.
    """
    arrays, summary = run_pycocotools(records, classes, found)
    pairs = [(name, result.summary[name], summary[name]) for name in SUMMARY_NAMES]
    theirs = class_results(arrays, records, classes)
    for one, other in zip(result.per_class, theirs, strict=True):
        pairs += [
            (f"{name} of class {one.name!a}", value, their_value)
            for (name, value), (_, their_value) in zip(_named(one), _named(other), strict=True)
        ]
    for name, value, their_value in pairs:
        if value != their_value:
            raise EvaluationError(
                f"{name} is {value} by runkey and {their_value} by pycocotools, a fault in runkey;"
                f" please report it with prepared/; {_AWAY}"
            )


def _named(one: ClassResult) -> Iterator[tuple[str, float | None]]:
    yield from (("AP", one.ap), ("AP50", one.ap50), ("AR", one.ar))
    yield from ((f"AP_{size}", of_size.ap) for size, of_size in one.by_size.items())


def run_pycocotools(
    records: Sequence[ImageRecord], classes: Sequence[ClassName], found: DetectionArrays
) -> tuple[CocoArrays, dict[str, float | None]]:
    """Evaluate with pycocotools; return its arrays, and the twelve metrics by `SUMMARY_NAMES`."""
    parts, answers = list(_divide(records, classes, found)), []
    with progress("compare with pycocotools", len(classes), "classes") as steps:
        for part, answer in zip(parts, _evaluate_parts(parts), strict=True):
            answers.append(answer)
            steps.advance(len(part.categories))
    categories = [category for part in parts for category in part.categories]
    order = np.argsort(categories)
    precision, recall = (np.concatenate(some, axis=-3) for some in zip(*answers, strict=True))
    precision, recall = precision[..., order, :, :], recall[..., order, :, :]
    from pycocotools.cocoeval import COCOeval

    run = COCOeval(iouType="bbox")
    run.eval = {"precision": precision, "recall": recall}
    with contextlib.redirect_stdout(io.StringIO()):
        run.summarize()
    summary = dict(zip(SUMMARY_NAMES, run.stats.tolist(), strict=True))
    defined = {name: None if value < 0 else value for name, value in summary.items()}
    return CocoArrays(precision[..., -1], recall), defined


def _evaluate_parts(parts: Sequence[_Part]) -> Iterator[tuple[Any, Any]]:
    processes = min(len(parts), len(os.sched_getaffinity(0)), _MOST_PROCESSES)
    if processes == 1:
        yield from map(_evaluate, parts)
        return
    context = multiprocessing.get_context("forkserver")
    try:
        with ProcessPoolExecutor(processes, context, _ignore_interrupts) as pool:
            yield from pool.map(_evaluate, parts)
    except BrokenProcessPool:
        raise EvaluationError(
            "a process of pycocotools was killed, maybe for its memory (2.5 kB a detection); "
            f"{_AWAY}"
        ) from None


def _divide(
    records: Sequence[ImageRecord], classes: Sequence[ClassName], found: DetectionArrays
) -> Iterator[_Part]:
    """Divide an evaluation by classes, the ones of many detections first."""
    counts = np.bincount(found.labels, minlength=len(classes))
    order = np.argsort(-counts, kind="stable")
    parts = (np.cumsum(counts[order]) - 1).clip(0) // _AT_ONCE
    for labels in np.split(order, np.flatnonzero(np.diff(parts)) + 1):
        wanted = labels.tolist()
        yield _Part(
            image_ids=tuple(record.id for record in records),
            categories=tuple(classes[label].id for label in wanted),
            annotations=[
                {
                    "image_id": record.id,
                    "category_id": classes[label].id,
                    "bbox": list(box),
                    "area": area,
                    "iscrowd": int(crowd),
                }
                for record in records
                for box, label, area, crowd in zip(
                    record.boxes_xywh, record.labels, record.areas, record.crowd, strict=True
                )
                if label in wanted
            ],
            found=found.keep(np.isin(found.labels, labels)),
            classes=classes,
        )


def _evaluate(part: _Part) -> tuple[Any, Any]:
    """Evaluate some classes; return COCOeval's precision [T, R, K, A, M] and recall."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def indexed(annotations: list[Any]) -> Any:
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": id_} for id_ in part.image_ids],
            "categories": [{"id": category} for category in part.categories],
            # It takes a match with annotation id 0 for no match.
            "annotations": [{"id": n} | one for n, one in enumerate(annotations, start=1)],
        }
        coco.createIndex()
        return coco

    # pycocotools prints its progress and a table.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = indexed(part.annotations)
        rows: list[CocoDetection] = list(part.found.rows(part.classes))
        # pycocotools' own `loadRes` fails on an empty list.
        run = COCOeval(truth, truth.loadRes(rows) if rows else indexed([]), "bbox")
        run.params.catIds = sorted(part.categories)
        run.evaluate()
        run.accumulate()
    place = {category: k for k, category in enumerate(run.params.catIds)}
    order = [place[category] for category in part.categories]
    return run.eval["precision"][:, :, order], run.eval["recall"][:, order]


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the stage's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
