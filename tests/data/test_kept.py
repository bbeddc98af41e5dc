"""A data set without a fault: what of it is in the index, and what the report notes about it."""

from __future__ import annotations

from runkey.data.index import read_classes
from tests.support.coco_folder import index


def test_a_good_data_set_is_kept_whole(folder):
    report = folder.run()

    assert not report.failures
    assert report.items == []
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
    before = (folder.out / "train.safetensors").read_bytes()
    folder.train["images"].reverse()
    folder.run()

    assert (folder.out / "train.safetensors").read_bytes() == before


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
    folder.train["annotations"][1].update(iscrowd=1, segmentation=rle, area=200)
    report = folder.run()

    assert index(folder)[1].crowd == (False, True)
    assert index(folder)[1].areas == (120.0, 200.0)
    assert report.kept["train"] == {"images": 3, "objects": 2, "crowd_regions": 1}


def test_a_json_with_a_byte_order_mark(folder):
    import json

    folder.texts["train"] = b"\xef\xbb\xbf" + json.dumps(folder.train).encode()
    assert not folder.run().failures


def test_more_objects_than_queries_are_a_note_and_no_fault(folder):
    report = folder.run(num_queries=1)

    assert report.notes == [
        "train: more objects than model.num_queries (1) in 1 image, at most 2 in image 1 "
        "(train/a.jpg); the rest cannot be found",
    ]
    assert folder.report()["notes"] == report.notes


def test_a_class_that_a_split_lacks_is_noted(folder):
    folder.val["annotations"].pop()

    assert folder.run().notes == ["val has no object of 1 class: cube"]


def test_ids_may_repeat_between_train_and_val(folder):
    folder.val["images"][0]["id"] = 1
    folder.val["annotations"][0].update(id=101, image_id=1)

    assert folder.run().items == []
