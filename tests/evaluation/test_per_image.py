"""Per-image judgement, on cases small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from runkey.data.index import ClassName, ImageRecord
from runkey.errors import DataError
from runkey.evaluation.coco import evaluate_results
from runkey.evaluation.detections import DetectionArrays
from runkey.evaluation.files import read_output, write_metrics, write_precision_recall
from runkey.evaluation.intervals import bootstrap
from runkey.evaluation.per_image import calibration, confusion, judge_images, rank_images

CLASSES = [ClassName(0, 5, "ball"), ClassName(1, 9, "cube")]


def record(image_id, *objects, crowd=()):
    boxes = tuple(box for _, box in objects)
    return ImageRecord(
        id=image_id,
        file=f"{image_id}.jpg",
        width=100,
        height=100,
        rotate=0,
        mirror=False,
        boxes_xywh=boxes,
        labels=tuple(label for label, _ in objects),
        areas=tuple(w * h for _, _, w, h in boxes),
        crowd=tuple(i in crowd for i in range(len(objects))),
        annotation_ids=tuple(range(len(objects))),
    )


def found(image_id, category_id, box, score):
    return {"image_id": image_id, "category_id": category_id, "bbox": list(box), "score": score}


BOX, NEAR, FAR = (10, 10, 40, 40), (12, 10, 40, 40), (60, 60, 20, 20)


def arrays(results):
    return DetectionArrays.from_results(results, CLASSES)


def judge(records, results):
    judged = judge_images(records, arrays(results))
    return {s.record.id: s for s in judged.images}, judged.threshold


def test_counts_of_one_image():
    images, threshold = judge(
        [record(1, (0, BOX), (1, FAR)), record(2, (1, FAR))],
        [
            found(2, 9, FAR, 0.65),  # right
            found(1, 5, NEAR, 0.9),  # right
            found(1, 5, BOX, 0.8),  # a second one of the same object: false
            found(1, 5, FAR, 0.7),  # wrong class: false
            found(1, 9, FAR, 0.6),  # right
            found(1, 9, BOX, 0.1),  # below the threshold
        ],
    )
    assert threshold == 0.6  # F1 .75; at 0.9 it is .5
    image = images[1]
    assert image.shown.right.tolist() == [True, False, False, True]
    assert (image.right, image.false, image.missed) == (2, 2, 0)
    assert image.f1 == pytest.approx(4 / 6)
    assert image.mean_iou == pytest.approx((38 / 42 + 1) / 2)


def test_crowds_are_neither_wanted_nor_held_against_anyone():
    crowd = record(1, (0, (0, 0, 100, 100)), (0, BOX), crowd={0})
    images, _ = judge([crowd], [found(1, 5, BOX, 0.9), found(1, 5, FAR, 0.9)])
    assert images[1].objects == 1
    assert (images[1].right, images[1].false, images[1].missed) == (1, 0, 0)
    assert images[1].found == (False, True)


def test_empty_images():
    images, _ = judge(
        [record(1), record(2), record(3, (0, BOX))],
        [found(2, 5, BOX, 0.9), found(3, 5, BOX, 0.9)],
    )
    assert images[1].f1 == 1
    assert images[2].f1 == 0
    assert images[2].false == 1


def test_no_detections_at_all():
    images, threshold = judge([record(1, (0, BOX))], [])
    assert threshold == 0
    assert images[1].missed == 1


def test_best_and_worst_first():
    records = [record(1, (0, BOX)), record(2, (0, BOX)), record(3, (0, BOX), (1, FAR)), record(4)]
    results = [
        found(1, 5, NEAR, 0.9),
        found(2, 5, BOX, 0.9),
        found(4, 5, BOX, 0.95),
    ]
    scores = judge_images(records, arrays(results)).images
    assert [s.record.id for s in rank_images(scores, best=True)] == [2, 1, 3, 4]
    assert [s.record.id for s in rank_images(scores, best=False)] == [3, 4, 1, 2]


def test_counting_agrees_with_coco_on_recall(world):
    """At threshold 0, matches over objects is COCO's recall at IoU 0.5."""
    made = world(seed=4, crowd_share=0.2, detections_per_image=40)
    found = DetectionArrays.from_images(made.detections)
    found.scores[:] = 0.5  # one score, so the best threshold shows everything
    scores = judge_images(made.records, found).images
    result = evaluate_results(made.records, made.classes, found)
    for c, name in enumerate(made.classes):
        right = sum(
            f and label == c
            for s in scores
            for f, label in zip(s.found, s.record.labels, strict=True)
        )
        recall = np.nanmax(np.where(result.precision[c, 0] > 0, result.recalls, 0))
        assert right / result.per_class[c].objects == pytest.approx(recall, abs=0.0101), name


def test_files(world, tmp_path):
    made = world(seed=6, unused_classes=(2,))
    result = evaluate_results(
        made.records, made.classes, DetectionArrays.from_images(made.detections)
    )
    write_metrics(
        tmp_path / "m" / "metrics.json",
        result,
        bootstrap(result.matches, result.recalls),
        loss=0.25,
    )
    saved = read_output(tmp_path / "m" / "metrics.json")
    assert saved["AP"] == result.summary["AP"]
    assert saved["loss"] == 0.25
    nothing = {"AP": None, "objects": 0}
    assert saved["per_class"]["class 90"] == {
        **{"AP": None, "AP_low": None, "AP_high": None, "AR": None, "objects": 0},
        **{"AP50": None, "AP50_low": None, "AP50_high": None},
        "by_size": {"small": nothing, "medium": nothing, "large": nothing},
    }

    write_precision_recall(tmp_path / "e" / "pr.json", result)
    curves = read_output(tmp_path / "e" / "pr.json")
    assert curves["iou"][0] == 0.5
    assert len(curves["recall"]) == 101
    assert curves["classes"][2]["precision"] is None
    saved_curve = curves["classes"][0]["precision"]
    assert np.allclose(saved_curve, result.precision[0], atol=1e-4)


def test_classes_of_one_name_keep_both_numbers(world, tmp_path):
    made = world(seed=6, category_ids=(1, 2))
    twins = [ClassName(0, 1, "cat"), ClassName(1, 2, "cat")]
    result = evaluate_results(made.records, twins, DetectionArrays.from_images(made.detections))
    write_metrics(tmp_path / "metrics.json", result, bootstrap(result.matches, result.recalls))
    saved = read_output(tmp_path / "metrics.json")
    assert set(saved["per_class"]) == {"cat (1)", "cat (2)"}


def test_missing_or_damaged_curves(tmp_path):
    with pytest.raises(DataError, match=r"pr\.json: not found; run `dvc repro evaluate`"):
        read_output(tmp_path / "pr.json")
    (tmp_path / "pr.json").write_text('{"iou": [')
    with pytest.raises(
        DataError, match=r"pr\.json: not JSON .*; `dvc repro -f evaluate` writes it again"
    ):
        read_output(tmp_path / "pr.json")


def test_numbers_by_size_are_those_of_coco(world):
    made = world(seed=8, images=40)
    found = DetectionArrays.from_images(made.detections)
    result = evaluate_results(made.records, made.classes, found)
    for size in ("small", "medium", "large"):
        of_size = [c.by_size[size] for c in result.per_class]
        aps = [s.ap for s in of_size if s.ap is not None]
        assert np.mean(aps) == pytest.approx(result.summary[f"AP_{size}"])
        assert [s.ap is None for s in of_size] == [s.objects == 0 for s in of_size]
    for c in result.per_class:
        assert sum(s.objects for s in c.by_size.values()) == c.objects


def test_confusion_counted_by_hand():
    records = [record(1, (0, BOX), (1, FAR)), record(2, (1, FAR)), record(3, (0, BOX), crowd={0})]
    results = [
        found(1, 5, NEAR, 0.9),  # right
        found(1, 5, FAR, 0.9),  # a cube taken for a ball
        found(2, 9, BOX, 0.9),  # nothing is there; and the cube is missed
        found(3, 5, BOX, 0.9),  # in a crowd: does not count
    ]
    judged = judge_images(records, arrays(results))
    assert judged.threshold == 0.9
    assert confusion(judged, 2).tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]


def test_confusion_agrees_with_the_images(world):
    made = world(seed=9, crowd_share=0.1)
    judged = judge_images(made.records, DetectionArrays.from_images(made.detections))
    counts = confusion(judged, len(made.classes))
    assert np.trace(counts) == sum(image.right for image in judged.images)
    assert counts[:-1].sum() == sum(image.objects for image in judged.images)
    assert counts[:, :-1].sum() == sum(len(image.shown) for image in judged.images)
    assert counts[-1, -1] == 0


def test_calibration_counted_by_hand():
    records = [record(n, (0, BOX)) for n in range(1, 5)]
    results = [found(n, 5, BOX if n < 4 else FAR, 0.95) for n in range(1, 5)]
    judged = judge_images(records, arrays([*results, found(1, 9, BOX, 0.02)]))
    result = calibration(judged)
    assert result.counts.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 4]
    assert result.shares_right[[0, 9]].tolist() == [0, 0.75]
    assert np.isnan(result.mean_scores[1])
    assert result.error == pytest.approx((4 * 0.2 + 0.02) / 5)
    assert calibration(judged, least_score=0.05).error == pytest.approx(0.2)
    assert calibration(judge_images(records, arrays([]))).error == 0
