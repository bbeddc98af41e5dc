"""What `fix` and `drop` leave in the index, and what the report says about it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from runkey.data.cache import open_cache
from runkey.data.decode import decode_rgb
from runkey.data.index import read_classes, read_index


def index(folder, split="train"):
    return {record.id: record for record in read_index(folder.out / f"{split}.json")}


def only_item(folder):
    (item,) = folder.report()["items"]
    return item


def set_box(folder, bbox, **fields):
    folder.train["annotations"][1].update(bbox=bbox, **fields)


def test_a_good_data_set_is_kept_whole(folder):
    report = folder.run()

    assert report.passed
    assert report.items == ()
    assert report.kept["train"] == {"images": 3, "objects": 3, "crowd_regions": 0}
    records = index(folder)
    assert records[1].boxes_xywh == ((2.0, 3.0, 10.0, 12.0), (20.0, 5.0, 15.0, 20.0))
    assert records[1].labels == (0, 1)
    assert records[1].annotation_ids == (101, 102)
    assert records[1].file == "train/a.jpg"
    assert (records[1].width, records[1].height, records[1].rotate) == (40, 30, 0)
    assert records[3].boxes_xywh == ()  # an image without annotations stays


def test_gaps_in_category_ids_are_closed_in_the_order_of_ids(folder):
    folder.train["categories"].insert(0, {"id": 90, "name": "cone"})
    folder.run()

    classes = [(c.index, c.id, c.name) for c in read_classes(folder.out / "classes.json")]
    assert classes == [(0, 1, "ball"), (1, 7, "cube"), (2, 90, "cone")]


def test_the_index_does_not_depend_on_the_order_of_the_json(folder):
    folder.run()
    before = (folder.out / "train.json").read_bytes()
    folder.train["images"].reverse()
    folder.run()

    assert (folder.out / "train.json").read_bytes() == before


def test_missing_area_and_iscrowd(folder):
    del folder.train["annotations"][1]["area"]
    del folder.train["annotations"][1]["iscrowd"]
    folder.run()

    assert index(folder)[1].areas == (120.0, 300.0)
    assert index(folder)[1].crowd == (False, False)


def test_whole_floats_are_ids(folder):
    folder.train["annotations"][1].update(id=102.0, image_id=1.0, category_id=7.0)
    folder.run()

    assert index(folder)[1].annotation_ids == (101, 102)
    assert folder.report()["items"] == []


def test_a_crowd_region_with_rle_stays_a_crowd(folder):
    rle = {"counts": [0, 1200], "size": [30, 40]}
    folder.train["annotations"][1].update(iscrowd=1, segmentation=rle, area=1200)
    report = folder.run()

    assert index(folder)[1].crowd == (False, True)
    assert index(folder)[1].areas == (120.0, 1200.0)
    assert report.kept["train"] == {"images": 3, "objects": 2, "crowd_regions": 1}


def test_a_json_with_a_byte_order_mark(folder):
    import json

    folder.texts["train"] = b"\xef\xbb\xbf" + json.dumps(folder.train).encode()
    assert folder.run().passed


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


def test_size_mismatch_scales_boxes_and_areas(folder):
    folder.train["images"][0].update(width=80, height=40)
    folder.run(checks={"size_mismatch": "fix"})

    record = index(folder)[1]
    assert (record.width, record.height) == (40, 30)
    assert record.boxes_xywh[0] == (1.0, 2.25, 5.0, 9.0)
    assert record.areas[0] == 45.0
    assert only_item(folder)["done"] == "boxes scaled by 0.5 and 0.75"


@pytest.mark.parametrize(
    ("orientation", "rotate", "mirror"),
    [(5, 270, True), (6, 90, False), (7, 90, True), (8, 270, 0)],
)
def test_exif_is_followed_where_the_json_has_the_turned_size(folder, orientation, rotate, mirror):
    tags = Image.Exif()
    tags[0x0112] = orientation
    folder.picture(5).save(folder.data / "train/b.jpg", exif=tags)
    folder.train["images"][1].update(width=30, height=40)
    folder.train["annotations"][2]["bbox"] = [0, 0, 30, 40]
    folder.run(short_sides=(30,), long_side=40)

    record = index(folder)[2]
    assert (record.width, record.height) == (30, 40)
    assert (record.rotate, record.mirror) == (rotate, bool(mirror))
    assert record.boxes_xywh == ((0, 0, 30, 40),)
    decoded = decode_rgb(folder.data / record.file, record.rotate, record.mirror)
    assert decoded.shape == (3, 40, 30)
    assert torch.equal(open_cache(folder.out, "train").image(1), decoded)
    assert only_item(folder)["done"].startswith(
        ("turned clockwise by", "mirrored and turned clockwise by")
    )


@pytest.mark.parametrize("orientation", [2, 3, 4, 6])
def test_exif_is_not_followed_where_the_json_has_the_stored_size(folder, orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    folder.picture(5).save(folder.data / "train/b.jpg", exif=tags)
    folder.run()

    assert (index(folder)[2].rotate, index(folder)[2].mirror) == (0, False)
    item = only_item(folder)
    assert item["kind"] == "exif_rotation"
    assert item["done"] == "not turned, as its size in the JSON does not ask for it"


def test_broken_exif_is_no_reason_to_lose_an_image(folder):
    folder.picture(5).save(folder.data / "train/b.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\1")
    folder.run()

    assert sorted(index(folder)) == [1, 2, 3]


@pytest.mark.parametrize("mode", ["L", "CMYK", "I;16", "P", "RGBA"])
def test_unusual_modes_are_converted_and_reported(folder, mode):
    name = "b.jpg" if mode == "CMYK" else "b.png"
    if mode == "I;16":
        image = Image.fromarray(np.full((30, 40), 30000, np.uint16))
    else:
        image = folder.picture(5).convert(mode)
    image.save(folder.data / "train" / name)
    folder.train["images"][1]["file_name"] = name
    folder.run(short_sides=(30,), long_side=40)

    item = only_item(folder)
    assert (item["kind"], item["policy"], item["done"]) == (
        ("unusual_mode", "fix", "converted to RGB")
    )
    assert item["file"] == f"data/train/{name}"
    decoded = decode_rgb(folder.data / "train" / name, 0, False)
    assert torch.equal(open_cache(folder.out, "train").image(1), decoded)


def broken(folder):
    path = folder.data / "train/a.jpg"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("unreadable_image", broken),
        ("missing_image", lambda folder: (folder.data / "train/a.jpg").unlink()),
        ("unsafe_path", lambda folder: folder.train["images"][0].update(file_name="../a.jpg")),
        ("malformed_image", lambda folder: folder.train["images"][0].update(width="40")),
        ("size_mismatch", lambda folder: folder.train["images"][0].update(width=41)),
        ("unusual_mode", lambda folder: Image.new("L", (40, 30)).save(folder.data / "train/a.jpg")),
    ],
)
def test_a_dropped_image_goes_with_its_annotations(folder, kind, change):
    change(folder)
    report = folder.run(checks={kind: "drop"})

    assert sorted(index(folder)) == [2, 3]
    assert report.kept["train"] == {"images": 2, "objects": 1, "crowd_regions": 0}
    assert report.counts == {kind: {"drop": 1}}
    assert only_item(folder)["image_id"] == 1
    cache = open_cache(folder.out, "train")
    assert len(cache) == 2


def test_the_cache_follows_the_index_after_drops(folder):
    (folder.data / "train/a.jpg").unlink()
    folder.train["images"].reverse()
    folder.run(checks={"missing_image": "drop"}, short_sides=(30,), long_side=40)

    cache = open_cache(folder.out, "train")
    for position, record in enumerate(read_index(folder.out / "train.json")):
        decoded = decode_rgb(folder.data / record.file, 0, False)
        assert torch.equal(cache.image(position), decoded)


def test_duplicate_image_keeps_the_first(folder):
    folder.train["images"].append({"id": 4, "file_name": "a.jpg", "width": 40, "height": 30})
    folder.train["annotations"].append(
        {"id": 104, "image_id": 4, "category_id": 1, "bbox": [1] * 4}
    )
    folder.run(checks={"duplicate_image": "drop"})

    assert sorted(index(folder)) == [1, 2, 3]
    assert only_item(folder)["done"] == "left out, the first kept"


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


def test_a_leaked_image_is_left_out_of_train(folder):
    content = (folder.data / "val/d.jpg").read_bytes()
    (folder.data / "train/c.jpg").write_bytes(content)
    folder.run(checks={"leaked_image": "drop"}, short_sides=(30,), long_side=40)

    assert sorted(index(folder)) == [1, 2]
    assert sorted(index(folder, "val")) == [11, 12]
    assert len(open_cache(folder.out, "train")) == 2
    assert only_item(folder)["done"] == "left out of train"


def test_more_objects_than_queries_are_a_note_and_no_fault(folder):
    report = folder.run(num_queries=1)

    assert report.notes == (
        "train: 1 image(s) have more objects than model.num_queries (1), at most 2 in image 1 "
        "(train/a.jpg); the rest cannot be found",
    )
    assert folder.report()["notes"] == list(report.notes)


def test_a_class_that_a_split_lacks_is_noted(folder):
    folder.val["annotations"].pop()

    assert folder.run().notes == ("val has no object of 1 classes: cube",)


def test_ids_may_repeat_between_train_and_val(folder):
    folder.val["images"][0]["id"] = 1
    folder.val["annotations"][0].update(id=101, image_id=1)

    assert folder.run().items == ()
