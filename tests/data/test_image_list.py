"""prepared/images.json: small, and another digest where an image is another."""

from __future__ import annotations

import pytest

from runkey.data.image_list import IMAGE_LIST, ListedImage, read_image_list, write_image_list
from runkey.data.index import ClassName, ImageRecord
from runkey.errors import DataError


def listed(folder):
    folder.run()
    return read_image_list((folder.out / IMAGE_LIST).read_bytes(), IMAGE_LIST)


def test_every_kept_image_is_listed_by_its_file(folder):
    images = listed(folder)
    assert {split: list(members) for split, members in images.items()} == {
        "train": ["train/a.jpg", "train/b.jpg", "train/c.jpg"],
        "val": ["val/d.jpg", "val/e.jpg"],
    }
    assert [one.boxes for one in images["train"].values()] == [2, 1, 0]


def test_only_what_is_said_of_an_image_changes_its_labels(folder):
    before = listed(folder)
    folder.train["annotations"].reverse()
    for number, entry in enumerate(folder.train["annotations"]):
        entry["id"] = 900 + number
    assert listed(folder) == before
    folder.train["annotations"][0]["bbox"] = [1, 0, 39, 30]
    after = listed(folder)["train"]
    changed = [file for file in after if after[file] != before["train"][file]]
    assert changed == ["train/b.jpg"]
    assert after["train/b.jpg"].content == before["train"]["train/b.jpg"].content


def test_another_picture_of_the_same_name_is_seen(folder):
    before = listed(folder)["val"]
    folder.picture(99).save(folder.data / "val/d.jpg")
    after = listed(folder)["val"]
    assert after["val/d.jpg"].labels == before["val/d.jpg"].labels
    assert after["val/d.jpg"].content != before["val/d.jpg"].content
    assert after["val/e.jpg"] == before["val/e.jpg"]


def test_a_renamed_class_labels_every_image_anew(folder):
    before = listed(folder)["train"]
    for part in (folder.train, folder.val):
        part["categories"][0]["name"] = "sphere"
    after = listed(folder)["train"]
    changed = [file for file in after if after[file].labels != before[file].labels]
    assert changed == ["train/a.jpg", "train/b.jpg"]


def test_coco_s_list_is_small(tmp_path):
    record = ImageRecord(
        id=1,
        file="",
        width=640,
        height=480,
        rotate=0,
        mirror=False,
        boxes_xywh=((1.0, 2.0, 3.0, 4.0),),
        labels=(0,),
        areas=(12.0,),
        crowd=(False,),
        annotation_ids=(1,),
    )
    images = []
    for number in range(1000):
        fields = {name: getattr(record, name) for name in ImageRecord.__dataclass_fields__}
        file = f"train2017/{number:012d}.jpg"
        images.append((ImageRecord(**{**fields, "file": file}), number.to_bytes(32)))
    path = tmp_path / IMAGE_LIST
    write_image_list(path, {"train": images}, [ClassName(0, 1, "ball")])
    assert path.stat().st_size / 1000 * 118_287 < 10e6
    again = read_image_list(path.read_bytes(), IMAGE_LIST)["train"]
    assert len(again) == 1000
    assert again["train2017/000000000007.jpg"] == ListedImage(
        1, again["train2017/000000000008.jpg"].labels, "0" * 16
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not a list of images"),
        (b"[]", "not a list of images"),
        (b'{"schema": "images2"}', "schema 'images2'; this runkey reads images1"),
        (b'{"schema": "images1", "splits": {"train": {"a": [1]}}}', "not a list of images"),
    ],
)
def test_anything_else_is_refused(content, said):
    with pytest.raises(DataError, match=said):
        read_image_list(content, "prepared/images.json")
