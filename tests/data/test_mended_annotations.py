"""Faults of annotations: what `fix` and `drop` leave in the index, and what the report says."""

from __future__ import annotations

import math

import pytest

from tests.support.coco_folder import index, only_item


def set_box(folder, bbox, **fields):
    folder.train["annotations"][1].update({"bbox": bbox, "area": None} | fields)


@pytest.mark.parametrize(
    ("kind", "policy", "bbox", "kept", "done"),
    [
        ("empty_box", "drop", [4, 5, 6, 0], None, "left out"),
        ("empty_box", "drop", [30, 5, 1e-20, 6], None, "left out"),
        ("outside_box", "drop", [-10, 5, 10, 6], None, "left out"),
        ("negative_box", "fix", [20, 5, -4, 6], (16, 5, 4, 6), "its corners swapped"),
        ("negative_box", "fix", [20, 15, 4, -6], (20, 9, 4, 6), "its corners swapped"),
        ("negative_box", "drop", [20, 5, -4, 6], None, "left out"),
        ("not_finite_box", "drop", [math.nan, 5, 4, 6], None, "left out"),
        ("not_finite_box", "drop", [1, 5, True, 6], None, "left out"),
        ("not_finite_box", "drop", [1, 5, 10**400, 6], None, "left out"),
        ("overhanging_box", "fix", [35, -4, 10, 10], (35, 0, 5, 6), "clipped"),
        ("overhanging_box", "fix", [1e308, 0, -1.5e308, 5], None, None),
        ("overhanging_box", "drop", [35, -4, 10, 10], None, "left out"),
    ],
)
def test_boxes(folder, kind, policy, bbox, kept, done):
    set_box(folder, bbox)
    folder.run(checks={kind: policy, **({"negative_box": "fix"} if done is None else {})})

    boxes = index(folder)[1].boxes_xywh
    if done is None:  # two faults at once: swapped, then clipped
        assert boxes[1] == (0, 0, 40, 5)
        return
    assert boxes[1:] == (() if kept is None else (kept,))
    item = only_item(folder)
    assert (item["kind"], item["policy"], item["done"]) == (kind, policy, done)
    assert (item["image_id"], item["annotation_id"]) == (1, 102)
    assert item["file"] == "data/annotations/instances_train.json"


def test_an_overhang_of_a_pixel_is_clipped_in_silence(folder):
    set_box(folder, [30, 5, 11, 6])
    folder.run(checks={"overhanging_box": "fail"})

    assert index(folder)[1].boxes_xywh[1] == (30, 5, 10, 6)
    assert folder.report()["items"] == []


@pytest.mark.parametrize("area", [0, -5, math.nan, "12", [1]])
def test_a_bad_area_is_taken_from_the_box(folder, area):
    set_box(folder, [20, 5, 15, 20], area=area)
    folder.run()

    assert index(folder)[1].areas == (120.0, 300.0)
    assert only_item(folder)["kind"] == "bad_area"


def test_duplicate_annotations_get_new_ids(folder):
    folder.train["annotations"][1]["id"] = 101
    folder.train["annotations"][2]["id"] = 101
    folder.run()

    assert index(folder)[1].annotation_ids == (101, 102)
    assert index(folder)[2].annotation_ids == (103,)
    assert [item["done"] for item in folder.report()["items"]] == [
        "given the id 102",
        "given the id 103",
    ]


def test_duplicate_annotations_dropped(folder):
    folder.train["annotations"][1]["id"] = 101
    folder.run(checks={"duplicate_annotation": "drop"})

    assert index(folder)[1].boxes_xywh == ((2.0, 3.0, 10.0, 12.0),)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("unknown_category", {"category_id": 5}),
        ("unknown_image", {"image_id": 99}),
        ("malformed_annotation", {"bbox": None}),
    ],
)
def test_dropped_annotations(folder, kind, fields):
    folder.train["annotations"][1].update(fields)
    report = folder.run(checks={kind: "drop"})

    assert index(folder)[1].annotation_ids == (101,)
    assert report.counts == {kind: {"drop": 1}}
