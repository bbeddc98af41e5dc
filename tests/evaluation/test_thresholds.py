"""The threshold of each class's best F1, counted by hand."""

from __future__ import annotations

import pytest

from runkey.data.index import ClassName, CocoDetection, ImageRecord
from runkey.evaluation.detections import DetectionArrays
from runkey.evaluation.per_image import judge_images
from runkey.evaluation.thresholds import best_thresholds, describe_thresholds

CLASSES = [ClassName(0, 4, "ball"), ClassName(1, 9, "cube"), ClassName(2, 11, "cube")]


def found(category: int, score: float, left: float) -> CocoDetection:
    return CocoDetection(image_id=1, category_id=category, bbox=[left, 0, 10, 10], score=score)


def arrays(results: list[CocoDetection]) -> DetectionArrays:
    return DetectionArrays.from_results(results, CLASSES)


@pytest.fixture
def record() -> ImageRecord:
    """Three balls at 0, 20 and 40; a cube of id 9 at 60, and a crowd of balls at 80."""
    lefts = (0.0, 20.0, 40.0, 60.0, 80.0)
    return ImageRecord(
        id=1,
        file="a.jpg",
        width=200,
        height=100,
        rotate=0,
        mirror=False,
        boxes_xywh=tuple((left, 0.0, 10.0, 10.0) for left in lefts),
        labels=(0, 0, 0, 1, 0),
        areas=(100.0,) * 5,
        crowd=(False,) * 4 + (True,),
        annotation_ids=tuple(range(5)),
    )


def test_the_score_of_the_best_f1_of_each_class(record: ImageRecord) -> None:
    results = [
        found(4, 0.9, 0),  # right: F1 2 / (1 + 3) = .5
        found(4, 0.85, 120),  # wrong: 2 / (2 + 3)
        found(4, 0.80006, 20),  # right: 4 / (3 + 3) = .667
        found(4, 0.8, 80),  # in the crowd: counts nowhere
        found(4, 0.3, 120),
        found(4, 0.2, 140),
        found(4, 0.1, 40),  # right: 6 / (6 + 3) = .667 again, at the lower score
        found(9, 0.7, 100),
    ]
    judged = judge_images([record], arrays(results))
    thresholds = best_thresholds(judged, CLASSES, "ab")
    assert thresholds == {
        "iou": 0.5,
        "weights": "ab",
        "classes": {
            "ball": {"score": 0.8, "precision": 0.666667, "recall": 0.666667, "f1": 0.666667},
            "cube (9)": None,
            "cube (11)": None,
        },
    }
    said = describe_thresholds(thresholds)
    assert said == "score thresholds of best F1 by class: 0.80 to 0.80 (F1 0.67 to 0.67)"


def test_equal_scores_are_shown_together(record: ImageRecord) -> None:
    results = [found(4, 0.5, 0), found(4, 0.5, 20), found(4, 0.5, 120), found(4, 0.4, 40)]
    judged = judge_images([record], arrays(results))
    best = best_thresholds(judged, CLASSES, "")["classes"]["ball"]
    assert best == {"score": 0.4, "precision": 0.75, "recall": 1.0, "f1": pytest.approx(0.857143)}


def test_without_detections_there_is_no_threshold(record: ImageRecord) -> None:
    thresholds = best_thresholds(judge_images([record], arrays([])), CLASSES, "")
    assert set(thresholds["classes"].values()) == {None}
    assert describe_thresholds(thresholds) == "no class was found in val: no score thresholds"
