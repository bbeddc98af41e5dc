"""AP of resampled sets against pycocotools fed with those sets, and the intervals made of it."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from runkey.data.index import ClassName
from runkey.evaluation.files import read_resampled, write_metrics, write_resampled
from runkey.evaluation.intervals import (
    METRICS,
    RESAMPLES,
    ClassMatches,
    accumulate,
    bootstrap,
    difference_interval,
    draw,
)
from runkey.evaluation.run import evaluate_detections
from tests.support.detections import Boxes, World, make_world

WORLDS = {
    "plain": {},
    "crowds": {"crowd_share": 0.3},
    "ties": {"score_steps": 4},
    "more than 100 detections": {"detections_per_image": 260, "images": 6, "most_objects": 20},
    "classes without objects": {"unused_classes": (0, 3)},
    "rare classes": {"most_objects": 1, "images": 10},
    "one class": {"category_ids": (7,)},
    "everything": {"crowd_share": 0.2, "score_steps": 10, "detections_per_image": 150, "images": 8},
}


def evaluate(made: World):
    return evaluate_detections(made.records, made.classes, made.detections)


def resampled_world(made: World, times: np.ndarray) -> World:
    """The set that holds each image `times` times, each copy under a new id, beside each other."""
    records, detections = [], {}
    for record, count in zip(sorted(made.records, key=lambda r: r.id), times, strict=True):
        for _ in range(count):
            records.append(replace(record, id=len(records) + 1))
            detections[len(records)] = made.detections[record.id]
    return World(records, made.classes, detections)


@pytest.mark.parametrize("name", WORLDS)
def test_resampled_sets_are_accumulated_as_pycocotools_does(name):
    made = make_world(sum(map(ord, name)), **WORLDS[name])
    result = evaluate(made)
    times = draw(len(made.records), 6)
    ap, ap50 = accumulate(result.matches, times, result.recalls)
    for column in range(times.shape[1]):
        brute = evaluate(resampled_world(made, times[:, column]))
        of_classes = [[c.ap for c in brute.per_class], [c.ap50 for c in brute.per_class]]
        expected = np.array(of_classes, dtype=np.float64)  # NaN where None
        found = np.stack([ap[:, column], ap50[:, column]])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        means = [np.nanmean(found[0]), np.nanmean(found[1])]
        assert means == pytest.approx([brute.summary[n] for n in METRICS], abs=1e-12)
    assert times.max() > 2  # copies of copies were there


def test_copies_alternate_where_one_image_has_equal_scores():
    """Right, wrong, right, wrong: with both copies of the right one first, AP would be larger."""
    boxes = Boxes(
        np.array([0.5, 0.5], np.float32),
        np.array([0, 0]),
        np.array([[100, 100, 140, 140], [10, 10, 50, 50]], np.float32),
    )
    one = make_world(0, images=1, category_ids=(1,)).records[0]
    record = replace(
        one, boxes_xywh=((10.0, 10.0, 40.0, 40.0),), labels=(0,), areas=(1600.0,), crowd=(False,),
        annotation_ids=(1,),
    )  # fmt: skip
    made = World([record], [ClassName(0, 1, "a")], {record.id: boxes})
    result = evaluate(made)
    times = np.array([[1, 2, 3]], dtype=np.int32)
    ap, _ = accumulate(result.matches, times, result.recalls)
    brute = [evaluate(resampled_world(made, column)).summary["AP"] for column in times.T]
    assert ap[0].tolist() == pytest.approx(brute, abs=1e-12)
    assert brute[1] == pytest.approx(0.5)


def test_the_original_set_has_the_headline():
    made = make_world(5, crowd_share=0.1)
    result = evaluate(made)
    ap, ap50 = accumulate(result.matches, np.ones((20, 1), np.int32), result.recalls)
    assert ap[:, 0] == pytest.approx([c.ap for c in result.per_class], abs=1e-12)
    assert ap50[:, 0] == pytest.approx([c.ap50 for c in result.per_class], abs=1e-12)


def test_intervals_hold_the_value_and_are_the_same_again():
    result = evaluate(make_world(7, images=60))
    found = bootstrap(result.matches, result.recalls)
    assert found == bootstrap(result.matches, result.recalls)
    assert len(found.resampled["AP"]) == RESAMPLES
    for name in METRICS:
        interval = found.intervals[name]
        assert 0 < interval.low < result.summary[name] < interval.high < 1
    for one, intervals in zip(result.per_class, found.per_class, strict=True):
        assert intervals["AP"].low < one.ap < intervals["AP"].high
        # A class is less sure than the mean of all.
        assert intervals["AP"].high - intervals["AP"].low > (
            found.intervals["AP"].high - found.intervals["AP"].low
        )


def test_four_times_the_images_halve_the_interval():
    lengths = []
    for images in (50, 200, 800):
        result = evaluate(make_world(1, images=images, category_ids=(1, 2), most_objects=3))
        interval = bootstrap(result.matches, result.recalls).intervals["AP"]
        lengths.append(interval.high - interval.low)
    assert lengths[0] / lengths[1] == pytest.approx(2, abs=0.6)
    assert lengths[1] / lengths[2] == pytest.approx(2, abs=0.4)


@pytest.mark.parametrize(
    "change",
    [
        {"detections": "none"},  # AP 0 in every set
        {"images": 1},
        {"images": 0},
        {"objects": "none"},
    ],
)
def test_no_interval_where_the_sets_say_nothing(change):
    made = make_world(3, category_ids=(1, 2), images=change.get("images", 12))
    if "objects" in change:
        made = replace(made, records=[without_objects(r) for r in made.records])
    if "detections" in change:
        nothing = Boxes(np.zeros(0), np.zeros(0, int), np.zeros((0, 4)))
        made = replace(made, detections=dict.fromkeys(made.detections, nothing))
    result = evaluate(made)
    found = bootstrap(result.matches, result.recalls)
    assert set(found.intervals.values()) == {None}
    assert all(one == {"AP": None, "AP50": None} for one in found.per_class)


def without_objects(record):
    return replace(record, boxes_xywh=(), labels=(), areas=(), crowd=(), annotation_ids=())


def test_draws_are_the_same_on_every_machine():
    times = draw(7, 3)
    assert times.sum(axis=0).tolist() == [7, 7, 7]
    assert times.T.tolist() == [[2, 1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 2, 1, 1], [0, 1, 0, 2, 1, 1, 2]]
    assert np.array_equal(draw(7, 2), times[:, :2])  # more sets do not change the first


def test_a_pair_on_the_same_images_is_surer_than_two_runs():
    """A model against the same one with one class's detections shifted a little."""
    made = make_world(2, images=80, category_ids=(1, 2))
    worse = {
        i: Boxes(d.scores, d.labels, (d.boxes_xyxy + np.float32([2, 0, 2, 0])).astype(np.float32))
        for i, d in made.detections.items()
    }
    first, second = evaluate(made), evaluate(replace(made, detections=worse))
    a, b = (bootstrap(one.matches, one.recalls) for one in (first, second))
    difference = second.summary["AP"] - first.summary["AP"]
    reach = max(a.deviations["AP"], b.deviations["AP"])
    paired = difference_interval(a.resampled["AP"], b.resampled["AP"], difference, reach)
    assert paired.low < difference < paired.high
    single = a.intervals["AP"]
    assert paired.high - paired.low < single.high - single.low
    assert difference_interval(a.resampled["AP"], a.resampled["AP"], 0.0, reach) is None


def test_files(tmp_path):
    made = make_world(4, images=30)
    result = evaluate(made)
    found = bootstrap(result.matches, result.recalls)
    write_metrics(tmp_path / "metrics.json", result, found)
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert (stored["AP_low"], stored["AP_high"]) == (
        found.intervals["AP"].low,
        found.intervals["AP"].high,
    )
    for one, intervals in zip(stored["per_class"].values(), found.per_class, strict=True):
        assert one["AP50_low"] == intervals["AP50"].low
    write_resampled(tmp_path / "resampled.json", found, made.records, made.classes)
    again = read_resampled(tmp_path / "resampled.json")
    assert again["AP"] == found.resampled["AP"]
    assert (tmp_path / "resampled.json").stat().st_size < 40_000
    moved = [replace(made.records[0], width=made.records[0].width + 1), *made.records[1:]]
    write_resampled(tmp_path / "moved.json", found, moved, made.classes)
    assert read_resampled(tmp_path / "moved.json")["truth"] == again["truth"]
    fewer = [without_objects(made.records[1]), made.records[0], *made.records[2:]]
    write_resampled(tmp_path / "fewer.json", found, fewer, made.classes)
    assert read_resampled(tmp_path / "fewer.json")["truth"] != again["truth"]


def test_a_large_evaluation_takes_seconds():
    """COCO's val: 5,000 images, 80 classes; 4.5 s on the machine of `benchmarks/intervals.py`."""
    random = np.random.default_rng(0)
    matches = []
    for _ in range(80):
        objects = random.poisson(0.1, 5000)
        images = np.concatenate(
            [np.repeat(np.arange(5000), objects), random.integers(0, 5000, 6000)]
        )
        scores = np.concatenate([random.beta(4, 2, objects.sum()), random.beta(1, 9, 6000)])
        quality = np.where(np.arange(len(images)) < objects.sum(), random.random(len(images)), 0)
        order = np.lexsort((images, -scores))
        right = quality[order] > np.linspace(0.1, 0.9, 10)[:, None]
        matches.append(
            ClassMatches(images[order], scores[order], right, np.zeros_like(right), objects)
        )
    start = time.process_time()
    found = bootstrap(matches, np.linspace(0, 1, 101))
    assert time.process_time() - start < 30
    assert len(found.resampled["AP"]) == RESAMPLES
