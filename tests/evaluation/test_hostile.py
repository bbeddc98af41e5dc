"""The vectorised metrics against pycocotools, to the last bit, on sets made to be hard."""

from __future__ import annotations

import contextlib
import io
import time
from dataclasses import fields, replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from runkey.errors import EvaluationError
from runkey.evaluation import cross_check
from runkey.evaluation.coco import SUMMARY_NAMES, evaluate_results
from runkey.evaluation.detections import DetectionArrays
from runkey.evaluation.intervals import ClassMatches
from tests.support.detections import make_world
from tests.support.hostile import Hostile, make_hostile

SETS, PER_TEST = 200, 25


def indexed(made: Hostile, annotations):
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": r.id, "width": r.width, "height": r.height} for r in made.records],
        "categories": [{"id": c.id, "name": c.name} for c in made.classes],
        "annotations": [{"id": n} | one for n, one in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco


def plain_pycocotools(made: Hostile) -> COCOeval:
    annotations = [
        {
            "image_id": record.id,
            "category_id": made.classes[label].id,
            "bbox": list(box),
            "area": area,
            "iscrowd": int(crowd),
        }
        for record in made.records
        for box, label, area, crowd in zip(
            record.boxes_xywh, record.labels, record.areas, record.crowd, strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = indexed(made, annotations)
        found = [dict(one) for one in made.results]
        run = COCOeval(truth, truth.loadRes(found) if found else indexed(made, []), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def matches_of(run: COCOeval, k: int) -> ClassMatches:
    """The matches of a class among objects of all sizes, from what COCOeval says of each image."""
    images = len(run.params.imgIds)
    start = k * len(run.params.areaRng) * images
    known = [(i, one) for i, one in enumerate(run.evalImgs[start : start + images]) if one]
    objects = np.zeros(images, dtype=np.int64)
    for i, one in known:
        objects[i] = np.count_nonzero(np.asarray(one["gtIgnore"]) == 0)
    scores = np.concatenate([[], *(one["dtScores"] for _, one in known)])
    index = [i for i, one in known for _ in one["dtScores"]]
    none = np.zeros((10, 0), dtype=bool)
    matched = np.concatenate([none, *(one["dtMatches"] > 0 for _, one in known)], axis=1)
    ignored = np.concatenate([none, *(one["dtIgnore"] > 0 for _, one in known)], axis=1)
    order = np.argsort(-scores, kind="stable")
    right = (matched & ~ignored)[:, order]
    index = np.array(index, dtype=np.int64)[order]
    return ClassMatches(index, scores[order], right, ignored[:, order], objects)


@pytest.mark.parametrize("first", range(0, SETS, PER_TEST))
def test_every_bit_is_that_of_pycocotools(first):
    scored = 0
    for seed in range(first, first + PER_TEST):
        made = make_hostile(seed)
        found = DetectionArrays.from_results(made.results, made.classes)
        ours, theirs = evaluate_results(made.records, made.classes, found), plain_pycocotools(made)
        stats = [None if value == -1 else value for value in theirs.stats.tolist()]
        assert list(ours.summary.values()) == stats, seed
        place = {category: k for k, category in enumerate(theirs.params.catIds)}
        for k, one in enumerate(made.classes):
            precision = theirs.eval["precision"][:, :, place[one.id], 0, -1]
            same = np.where(ours.precision[k] == ours.precision[k], ours.precision[k], -1.0)
            assert np.array_equal(same, precision), (seed, one.name)
            expected = matches_of(theirs, place[one.id])
            for field in fields(ClassMatches):
                mine, their = (getattr(m, field.name) for m in (ours.matches[k], expected))
                assert mine.dtype == their.dtype, (seed, one.name, field.name)
                assert np.array_equal(mine, their), (seed, one.name, field.name)
        scored += bool(stats[0])
    assert scored > PER_TEST // 5  # most sets are about something


@pytest.mark.parametrize("seed", [0, 9])
def test_pycocotools_in_parts_is_pycocotools(seed, monkeypatch):
    """Classes by themselves, in processes, have the arrays of all classes together."""
    monkeypatch.setattr(cross_check, "_AT_ONCE", 100)
    made = make_hostile(seed)
    assert len(made.results) > 1000
    assert len(made.classes) > 5
    found = DetectionArrays.from_results(made.results, made.classes)
    arrays, summary = cross_check.run_pycocotools(made.records, made.classes, found)
    whole = plain_pycocotools(made)
    assert np.array_equal(arrays.precision, whole.eval["precision"][..., -1])
    assert np.array_equal(arrays.recall, whole.eval["recall"])
    stats = [None if value == -1 else value for value in whole.stats.tolist()]
    assert summary == dict(zip(SUMMARY_NAMES, stats, strict=True))
    result = evaluate_results(made.records, made.classes, found)
    cross_check.check_metrics(result, made.records, made.classes, found)


def test_a_difference_is_one_line():
    made = make_world(4)
    found = DetectionArrays.from_images(made.detections)
    result = evaluate_results(made.records, made.classes, found)
    value = result.summary["AR_10"]
    last = np.nextafter(value, 1)
    other = replace(result, summary=result.summary | {"AR_10": last})
    with pytest.raises(EvaluationError, match=rf"^AR_10 is {last} by runkey and {value} by pycoco"):
        cross_check.check_metrics(other, made.records, made.classes, found)
    first, *rest = result.per_class
    other = replace(result, per_class=(replace(first, ap50=None), *rest))
    with pytest.raises(EvaluationError, match=r"^AP50 of class 'class 3' is None by runkey and 0"):
        cross_check.check_metrics(other, made.records, made.classes, found)


def test_unknown_images_are_refused():
    made = make_world(1)
    found = DetectionArrays.from_images(made.detections)
    with pytest.raises(ValueError, match=r"detections in unknown images: \[1000\]"):
        evaluate_results(made.records[1:], made.classes, found)


def test_a_fifth_of_coco_val_takes_no_second():
    """0.15 s on the machine of `benchmarks/evaluation.py`, pycocotools takes 3 s."""
    made = make_world(0, images=1000, category_ids=tuple(range(80)), detections_per_image=100)
    found = DetectionArrays.from_images(made.detections)
    start = time.process_time()
    evaluate_results(made.records, made.classes, found)
    assert time.process_time() - start < 1.5
