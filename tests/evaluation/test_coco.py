"""Our path against pycocotools fed with plain files: the same numbers, to the last digit."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from runkey.data.index import ClassName, ImageRecord
from runkey.errors import DataError, ModelError
from runkey.evaluation.coco import SUMMARY_NAMES, evaluate_results
from runkey.evaluation.detections import DetectionArrays
from runkey.evaluation.files import read_precision_recall, read_results, write_results
from runkey.evaluation.run import Evaluation, evaluate_detections
from tests.support.shared import shared_data


def plain_pycocotools(world, folder):
    """The documented way: two JSON files, loaded by pycocotools, its defaults."""
    truth = {
        "info": {},
        "images": [{"id": r.id, "width": r.width, "height": r.height} for r in world.records],
        "categories": [{"id": c.id, "name": c.name} for c in world.classes],
        "annotations": [
            {
                "id": r.annotation_ids[i],
                "image_id": r.id,
                "category_id": world.classes[r.labels[i]].id,
                "bbox": list(r.boxes_xywh[i]),
                "area": r.areas[i],
                "iscrowd": int(r.crowd[i]),
            }
            for r in world.records
            for i in range(len(r.labels))
        ],
    }
    results = []
    for image_id, found in world.detections.items():
        for score, label, (x1, y1, x2, y2) in zip(
            found.scores.tolist(), found.labels.tolist(), found.boxes_xyxy.tolist(), strict=True
        ):
            category = world.classes[label].id
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": score,
                }
            )
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "truth.json"))
        run = COCOeval(coco, coco.loadRes(str(folder / "results.json")), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


WORLDS = {
    "plain": {},
    "crowds": {"crowd_share": 0.3},
    "ties": {"score_steps": 4},
    "more than 100 detections": {"detections_per_image": 260, "images": 6, "most_objects": 20},
    "classes without objects": {"unused_classes": (0, 3)},
    "one class": {"category_ids": (7,)},
    "everything": {"crowd_share": 0.2, "score_steps": 10, "detections_per_image": 150, "images": 8},
}


@pytest.mark.parametrize("name", WORLDS)
def test_all_twelve_equal_pycocotools(world, tmp_path, name):
    made = world(seed=sum(map(ord, name)), **WORLDS[name])
    ours = evaluate_detections(made.records, made.classes, made.detections)
    theirs = plain_pycocotools(made, tmp_path)
    assert tuple(ours.summary) == SUMMARY_NAMES
    for metric, value in zip(SUMMARY_NAMES, theirs.stats, strict=True):
        assert ours.summary[metric] == (None if value == -1 else value), metric
    assert 0 < ours.summary["AP"] < 1  # the comparison is about something


@pytest.mark.parametrize("name", ["plain", "crowds", "classes without objects"])
def test_each_class_equals_pycocotools_on_that_class_alone(world, tmp_path, name):
    made = world(seed=5, **WORLDS[name])
    ours = evaluate_detections(made.records, made.classes, made.detections)
    run = plain_pycocotools(made, tmp_path)
    for found in ours.per_class:
        run.params.catIds = [found.category_id]
        with contextlib.redirect_stdout(io.StringIO()):
            run.evaluate()
            run.accumulate()
            run.summarize()
        expected = [None if v == -1 else v for v in run.stats[[0, 1, 8]]]
        assert [found.ap, found.ap50, found.ar] == expected, found.name
    assert [c.category_id for c in ours.per_class] == [c.id for c in made.classes]


def test_the_saved_file_gives_the_same_numbers(world, tmp_path):
    made = world(seed=11, crowd_share=0.1)
    direct = evaluate_detections(made.records, made.classes, made.detections)
    path = tmp_path / "new" / "predictions.json"
    found = DetectionArrays.from_images(made.detections)
    write_results(path, found, made.classes)
    lines = ",\n".join(map(json.dumps, found.rows(made.classes)))
    assert path.read_text() == f"[\n{lines}\n]\n"
    again = evaluate_results(made.records, made.classes, read_results(path, made.classes))
    assert again.summary == direct.summary
    assert np.array_equal(again.precision, direct.precision, equal_nan=True)


def test_order_of_images_does_not_matter(world):
    made = world(seed=2, score_steps=5)
    there = evaluate_detections(made.records, made.classes, made.detections)
    back = evaluate_detections(
        made.records[::-1], made.classes, dict(reversed(made.detections.items()))
    )
    assert back.summary == there.summary


def test_nothing_detected_is_zero(world):
    made = world(seed=3)
    empty = DetectionArrays.from_images({})
    summary = evaluate_results(made.records, made.classes, empty).summary
    assert summary["AP"] == 0
    assert summary["AR_100"] == 0


def test_nothing_to_find_is_undefined_and_not_logged(boxes):
    record = ImageRecord(4, "4.jpg", 10, 10, 0, False, (), (), (), (), ())
    found = boxes(np.array([0.5]), np.array([0]), np.array([[1, 1, 5, 5]]))
    result = evaluate_detections([record], [ClassName(0, 1, "a")], {4: found})
    assert set(result.summary.values()) == {None}
    assert Evaluation(result, DetectionArrays.from_images({}), {}).metrics("val/") == {}
    assert np.isnan(result.precision).all()
    assert result.per_class[0].objects == 0


@pytest.mark.parametrize("shift", [-1e-6, 0, 1e-6])
def test_every_object_counts_in_one_size(world, shift):
    made = world(seed=3)
    limits = [(limit + shift) ** 2 for limit in (32, 96)]
    records = [
        replace(r, areas=tuple(limits[(r.id + i) % 2] for i in range(len(r.areas))))
        for r in made.records
    ]
    result = evaluate_detections(records, made.classes, made.detections)
    areas = [area for record in records for _, _, area in record.objects()]
    by_size = {
        size: sum(one.by_size[size].objects for one in result.per_class)
        for size in ("small", "medium", "large")
    }
    first, second = map(areas.count, limits)
    assert min(first, second) > 10
    assert by_size == (
        {"small": 0, "medium": first, "large": second}
        if shift > 0
        else {"small": first, "medium": second, "large": 0}
    )
    for one in result.per_class:
        assert sum(size.objects for size in one.by_size.values()) == one.objects


def test_annotation_id_zero_counts(boxes):
    """pycocotools alone gives 0 here: it reads a match with annotation 0 as no match."""
    record = ImageRecord(1, "a", 9, 9, 0, False, ((1, 1, 4, 4),), (0,), (16,), (False,), (0,))
    found = boxes(np.array([0.9]), np.array([0]), np.array([[1, 1, 5, 5]]))
    assert evaluate_detections([record], [ClassName(0, 0, "a")], {1: found}).summary["AP"] > 0.999


def test_tensors_are_taken_as_they_are(world, boxes):
    made = world(seed=8)
    tensors = {
        i: boxes(*(torch.from_numpy(a) for a in (d.scores, d.labels, d.boxes_xyxy)))
        for i, d in made.detections.items()
    }
    expected = evaluate_detections(made.records, made.classes, made.detections).summary
    assert evaluate_detections(made.records, made.classes, tensors).summary == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_is_named(boxes, bad):
    record = ImageRecord(12, "a", 9, 9, 0, False, (), (), (), (), ())
    found = boxes(np.array([0.9]), np.array([0]), np.array([[1, 1, bad, 5]]))
    with pytest.raises(ModelError, match=r"image 12: the model predicts NaN or infinity"):
        evaluate_detections([record], [ClassName(0, 1, "a")], {12: found})


def test_missing_images_are_refused(world):
    made = world(seed=1)
    made.detections.pop(made.records[0].id)
    with pytest.raises(ValueError, match="missing of 1 image, there of 0 unknown images"):
        evaluate_detections(made.records, made.classes, made.detections)


def test_quiet(world, capsys):
    made = world(seed=1, images=3)
    evaluate_detections(made.records, made.classes, made.detections)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found; run `dvc repro evaluate` first"),
        ("[{", "not JSON"),
        ('{"a": 1}', "Input should be a valid array; `dvc repro -f evaluate` writes it again"),
        (
            '[{"image_id": 1, "category_id": 1, "bbox": [1, 2], "score": 1}]',
            "0.bbox: List should have at least 4 items",
        ),
        ('[{"image_id": 1}]', "0.category_id: Field required"),
        (
            '[{"image_id": 1, "category_id": 8, "bbox": [1, 2, 3, 4], "score": 1}]',
            "unknown category_id 8; `dvc repro -f evaluate` writes it again",
        ),
    ],
)
def test_unusable_results_file(tmp_path, content, message):
    path = tmp_path / "predictions.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_results(path, [ClassName(0, 1, "a")])


@pytest.mark.parametrize("precision", [[[0.1, 0.2], [0.3]], [[0.1, 0.2]], [[], []]])
def test_curves_of_other_lengths_are_refused(tmp_path, precision):
    path = tmp_path / "precision_recall.json"
    one = {"name": "kite", "objects": 1, "ap": 0.1, "precision": precision}
    path.write_text(json.dumps({"iou": [0.5, 0.75], "recall": [0, 1], "classes": [one]}))
    with pytest.raises(DataError, match=r"class 'kite': precision is not of \(2, 2\)"):
        read_precision_recall(path)


def test_sample_sized_evaluation_is_quick(world):
    made = world(seed=0, images=100, category_ids=tuple(range(1, 9)), detections_per_image=100)
    start = time.process_time()
    evaluate_detections(made.records, made.classes, made.detections)
    assert time.process_time() - start < 5


def test_truth_as_detections_is_perfect(boxes):
    path = shared_data("coco-tiny") / "annotations"
    names = sorted(path.glob("*.json"))
    content = json.loads(names[0].read_text())
    classes = [ClassName(k, c["id"], c["name"]) for k, c in enumerate(content["categories"])]
    index = {c.id: c.index for c in classes}
    records = []
    for image in content["images"]:
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        records.append(
            ImageRecord(
                id=image["id"],
                file=image["file_name"],
                width=image["width"],
                height=image["height"],
                rotate=0,
                mirror=False,
                boxes_xywh=tuple(tuple(a["bbox"]) for a in mine),
                labels=tuple(index[a["category_id"]] for a in mine),
                areas=tuple(a["area"] for a in mine),
                crowd=tuple(bool(a["iscrowd"]) for a in mine),
                annotation_ids=tuple(a["id"] for a in mine),
            )
        )
    assert any(any(r.crowd) for r in records)
    detections = {
        r.id: boxes(
            np.linspace(1, 0.5, len(r.labels)),
            np.array(r.labels, dtype=int),
            np.array([(x, y, x + w, y + h) for x, y, w, h in r.boxes_xywh]),
        )
        for r in records
    }
    summary = evaluate_detections(records, classes, detections).summary
    assert summary["AP"] == pytest.approx(1.0)
    assert summary["AR_100"] == pytest.approx(1.0)
