"""Faults of images: what `fix` and `drop` leave in the index, and what the report says."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from runkey.data.decode import decode_rgb
from tests.support.coco_folder import index, only_item


def test_size_mismatch_scales_boxes_and_areas(folder):
    folder.train["images"][0].update(width=80, height=60)
    folder.run(checks={"size_mismatch": "fix"})

    record = index(folder)[1]
    assert (record.width, record.height) == (40, 30)
    assert record.boxes_xywh[0] == (1.0, 1.5, 5.0, 6.0)
    assert record.areas[0] == 30.0
    assert only_item(folder)["done"] == "boxes scaled by 0.5 and 0.5"


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
    done = only_item(folder)["done"]
    assert done.startswith(("turned clockwise by", "mirrored and turned clockwise by"))
    assert done.endswith(" degrees, as its size in the JSON says")


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_exif_is_not_followed_where_the_json_has_the_stored_size(folder, orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    folder.picture(5).save(folder.data / "train/b.jpg", exif=tags)
    folder.run()

    assert (index(folder)[2].rotate, index(folder)[2].mirror) == (0, False)
    item = only_item(folder)
    assert item["kind"] == "exif_rotation"
    assert item["done"] == "not turned, as its size in the JSON says"


@pytest.mark.parametrize(
    ("orientation", "size", "rotation", "done"),
    [
        (2, (40, 30), (0, True), "mirrored"),
        (3, (40, 30), (180, False), "turned clockwise by 180 degrees"),
        (4, (40, 30), (180, True), "mirrored and turned clockwise by 180 degrees"),
        (6, (30, 30), (90, False), "turned clockwise by 90 degrees"),
    ],
)
def test_exif_is_followed_where_no_size_can_contradict(folder, orientation, size, rotation, done):
    tags = Image.Exif()
    tags[0x0112] = orientation
    folder.picture(5).resize(size).save(folder.data / "train/b.jpg", exif=tags)
    folder.train["images"][1].update(width=size[0], height=size[1])
    folder.train["annotations"][2].update(bbox=[0, 0, 30, 30], area=900)
    folder.run()

    record = index(folder)[2]
    assert (record.rotate, record.mirror) == rotation
    assert (record.width, record.height) == size
    assert only_item(folder)["done"] == f"{done}, as EXIF says"


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
    assert decode_rgb(folder.data / "train" / name, 0, False).shape[0] == 3


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


def test_duplicate_image_keeps_the_first(folder):
    folder.train["images"].append({"id": 4, "file_name": "a.jpg", "width": 40, "height": 30})
    folder.train["annotations"].append(
        {"id": 104, "image_id": 4, "category_id": 1, "bbox": [1] * 4}
    )
    folder.run(checks={"duplicate_image": "drop"})

    assert sorted(index(folder)) == [1, 2, 3]
    assert only_item(folder)["done"] == "left out, the first kept"


def test_a_leaked_image_is_left_out_of_train(folder):
    content = (folder.data / "val/d.jpg").read_bytes()
    (folder.data / "train/c.jpg").write_bytes(content)
    folder.run(checks={"leaked_image": "drop"}, short_sides=(30,), long_side=40)

    assert sorted(index(folder)) == [1, 2]
    assert sorted(index(folder, "val")) == [11, 12]
    assert only_item(folder)["done"] == "left out of train"
