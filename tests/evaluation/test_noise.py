"""Which differences of two evaluations are called noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from runkey.evaluation.files import ends, read_resampled, write_resampled
from runkey.evaluation.intervals import bootstrap
from runkey.evaluation.noise import compare_scores
from runkey.evaluation.run import evaluate_detections
from tests.support.detections import Boxes, make_world


def evaluated(made, folder, name):
    """The metrics and the resampled metrics that `evaluate` leaves."""
    result = evaluate_detections(made.records, made.classes, made.detections)
    found = bootstrap(result.matches, result.recalls)
    path = folder / f"{name}.json"
    write_resampled(path, found, made.records, made.classes)
    return result.summary | ends(found.intervals), read_resampled(path)


def shifted(made, pixels):
    """The same detections, moved to the right."""
    moved = {
        image: Boxes(d.scores, d.labels, d.boxes_xyxy + np.float32([pixels, 0, pixels, 0]))
        for image, d in made.detections.items()
    }
    return replace(made, detections=moved)


@pytest.fixture(scope="module")
def made():
    return make_world(2, images=80, category_ids=(1, 2))


def test_a_worse_model_on_the_same_images_is_no_noise(made, tmp_path):
    a, resampled_a = evaluated(made, tmp_path, "a")
    b, resampled_b = evaluated(shifted(made, 1), tmp_path, "b")
    ap, ap50 = compare_scores(a, b, resampled_a, resampled_b)
    assert (ap.name, ap50.name) == ("AP", "AP50")
    assert ap.is_paired
    assert not ap.is_noise
    assert ap.difference == b["AP"] - a["AP"] < 0
    assert ap.interval.low < ap.difference < ap.interval.high < 0
    assert str(ap) == (
        f"AP: {ap.difference:+.3f} (95%: {ap.interval.low:+.3f} to {ap.interval.high:+.3f},"
        " paired by image): more than noise"
    )
    # Their intervals overlap: only in pairs is the difference seen.
    unpaired = compare_scores(a, b, resampled_a, None)[0]
    assert unpaired.is_noise
    assert not unpaired.is_paired
    assert str(unpaired).endswith("of the two, on different images, overlap: may be noise")


def test_a_change_of_few_images_is_noise(made, tmp_path):
    a, resampled_a = evaluated(made, tmp_path, "a")
    random = np.random.default_rng(0)
    jittered = {
        image: Boxes(d.scores, d.labels, d.boxes_xyxy + random.normal(0, 0.1, (len(d.scores), 1)))
        for image, d in made.detections.items()
    }
    b, resampled_b = evaluated(replace(made, detections=jittered), tmp_path, "b")
    ap = compare_scores(a, b, resampled_a, resampled_b)[0]
    assert ap.difference
    assert ap.is_noise
    assert str(ap).endswith("within noise")


def test_two_equal_models(made, tmp_path):
    a, resampled = evaluated(made, tmp_path, "a")
    ap = compare_scores(a, a, resampled, resampled)[0]
    assert (ap.difference, ap.interval, ap.is_noise) == (0, None, True)
    assert str(ap) == "AP: +0.000: the same on each of these images"


def test_other_images_are_compared_by_their_intervals(made, tmp_path):
    a, resampled_a = evaluated(made, tmp_path, "a")
    others = make_world(77, images=80, category_ids=(1, 2))
    b, resampled_b = evaluated(shifted(others, 60), tmp_path, "b")
    ap = compare_scores(a, b, resampled_a, resampled_b)[0]
    assert not ap.is_paired
    assert not ap.is_noise
    assert "do not overlap" in str(ap)


@pytest.mark.parametrize(
    "change",
    [
        {"AP": []},
        {"AP": [None] * 3},
        {"AP": [1e308, -1e308, 1e308]},
        {"AP": [float("nan"), 0.5, 0.5]},
        {"deviations": {}},
        {"deviations": {"AP": -1.0}},
        {"deviations": {"AP": 1e308}},
        {"deviations": {"AP": None}},
    ],
)
def test_odd_values_are_compared_by_the_intervals_at_most(change):
    good = {"truth": "t", "deviations": {"AP": 2.0}, "AP": [0.1, 0.2, 0.4], "AP50": []}
    scores = {"AP": 0.2, "AP_low": 0.1, "AP_high": 0.4}
    first = good | {"deviations": {}} if "deviations" in change else good
    (ap,) = compare_scores(scores, scores | {"AP": 0.25}, first, good | change)
    assert not ap.is_paired
    assert ap.is_noise
    assert compare_scores(scores, {"AP": 1e300}, good, good) == []
    (no_end,) = compare_scores(scores, scores | {"AP_low": float("nan")}, good, good)
    assert no_end.is_paired
    assert compare_scores(scores, scores | {"AP_low": float("nan")}, good, None) == []


def test_runs_without_intervals_are_not_judged(made, tmp_path):
    a, resampled = evaluated(made, tmp_path, "a")
    assert compare_scores(a, {"AP": 0.5, "AP50": 0.6}, resampled, None) == []
    assert compare_scores(a, {"AP": None}, resampled, resampled) == []
