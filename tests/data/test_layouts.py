"""The folder layouts that are found in the wild."""

from __future__ import annotations

import json
import shutil

import pytest

from runkey.data.index import read_index
from runkey.errors import DataError


def files(folder, split):
    return [record.file for record in read_index(folder.out / f"{split}.json")]


def one_json(folder, name, image_folder):
    """The train part alone, with more images, under one JSON."""
    shutil.rmtree(folder.data / "train")
    shutil.rmtree(folder.data / "val")
    (folder.data / image_folder).mkdir(parents=True, exist_ok=True)
    folder.train.update(images=[], annotations=[])
    for number in range(1, 21):
        folder.picture(number).save(folder.data / image_folder / f"{number}.png")
        entry = {"id": number, "file_name": f"{number}.png", "width": 40, "height": 30}
        folder.train["images"].append(entry)
        box = {"bbox": [1, 2, 3, 4], "category_id": (1, 7)[number % 2]}
        folder.train["annotations"].append({"id": number, "image_id": number, **box})
    (folder.data / name).write_text(json.dumps(folder.train))


@pytest.mark.parametrize(
    ("json_suffix", "image_folder"),
    [
        ("", "train"),
        ("", "train2017"),
        ("2017", "train2017"),
        ("2017", "train"),
        ("", "images/train"),
        ("2017", "images/train2017"),
        ("_small", "train_small"),
        ("", "images"),
        ("", "."),
        ("", "annotations"),
    ],
)
def test_train_and_val(folder, json_suffix, image_folder):
    for split in ("train", "val"):
        target = folder.data / image_folder.replace("train", split)
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted((folder.data / split).iterdir()):
            path.rename(target / path.name)
    folder.write()
    for split in ("train", "val"):
        path = folder.path(split)
        path.rename(path.with_name(f"instances_{split}{json_suffix}.json"))

    folder.prepare()

    place = "" if image_folder == "." else image_folder + "/"
    assert files(folder, "train") == [f"{place}{name}.jpg" for name in "abc"]
    assert files(folder, "val") == [f"{place.replace('train', 'val')}{name}.jpg" for name in "de"]


def test_file_names_relative_to_the_data_folder_also_with_backslashes(folder):
    for split in ("train", "val"):
        for entry in getattr(folder, split)["images"]:
            entry["file_name"] = f"{split}\\{entry['file_name']}"
    folder.run()

    assert files(folder, "train") == ["train/a.jpg", "train/b.jpg", "train/c.jpg"]


def test_one_name_in_both_folders_is_two_images(folder):
    folder.val["images"][0]["file_name"] = "a.jpg"
    (folder.data / "val/d.jpg").rename(folder.data / "val/a.jpg")

    assert folder.run().items == []
    assert files(folder, "train")[0] == "train/a.jpg"
    assert files(folder, "val")[0] == "val/a.jpg"


@pytest.mark.parametrize(
    ("name", "image_folder"),
    [
        ("annotations/instances_default.json", "images"),
        ("annotations/all.json", "."),
        ("annotations/instances_train.json", "train"),
        ("coco.json", "."),
        ("coco.json", "images"),
    ],
)
def test_one_json_is_split(folder, name, image_folder):
    one_json(folder, name, image_folder)
    report = folder.prepare(val_fraction=0.25)

    assert report.kept["train"]["images"] == 15
    assert report.kept["val"]["images"] == 5
    assert report.notes == []
    assert not set(files(folder, "train")) & set(files(folder, "val"))
    before = files(folder, "val")
    folder.train["images"].reverse()
    (folder.data / name).write_text(json.dumps(folder.train))
    folder.prepare(val_fraction=0.25)
    assert files(folder, "val") == before
    folder.prepare(val_fraction=0.25, seed=1)
    assert files(folder, "val") != before


def test_copies_of_an_image_stay_on_one_side_of_a_split(folder):
    one_json(folder, "coco.json", "images")
    for number in range(2, 11):
        shutil.copy(folder.data / "images/1.png", folder.data / f"images/{number}.png")
    folder.prepare(val_fraction=0.5)

    copies = {f"images/{number}.png" for number in range(1, 11)}
    sides = [split for split in ("train", "val") if copies & set(files(folder, split))]
    assert len(sides) == 1


def test_other_coco_files_beside_train_and_val_do_not_matter(folder):
    for name in ("captions_train2017.json", "person_keypoints_val2017.json"):
        (folder.data / "annotations" / name).write_text("{}")

    assert not folder.run().failures


def test_dvc_links_into_its_cache_are_followed(folder):
    """`cache.type symlink` puts a link in place of every file."""
    objects = folder.root / ".dvc/cache/files/md5"
    for number, path in enumerate(sorted((folder.data / "train").iterdir())):
        target = objects / f"{number:02x}" / f"{number:030x}"
        target.parent.mkdir(parents=True)
        path.rename(target)
        path.symlink_to(target)

    assert folder.run().items == []


def test_links_within_the_data_folder_are_followed(folder):
    (folder.data / "pool").mkdir()
    (folder.data / "train/a.jpg").rename(folder.data / "pool/x.jpg")
    (folder.data / "train/a.jpg").symlink_to("../pool/x.jpg")

    assert folder.run().items == []


def test_a_data_folder_that_is_itself_a_link(folder):
    folder.write()
    folder.data.rename(folder.root / "disk")
    folder.data.symlink_to(folder.root / "disk", target_is_directory=True)

    assert folder.prepare().items == []


def test_a_folder_in_place_of_an_image_is_a_missing_image(folder):
    (folder.data / "train/b.jpg").unlink()
    (folder.data / "train/b.jpg").mkdir()

    with pytest.raises(DataError, match=r"image 2 \(b\.jpg\) not found in data/train"):
        folder.run()


def test_nothing_of_the_users_is_touched(folder):
    folder.write()
    folder.out.mkdir()
    (folder.out / "mine.txt").write_text("keep")
    before = {path: path.read_bytes() for path in folder.data.rglob("*") if path.is_file()}

    folder.prepare()

    assert {path: path.read_bytes() for path in folder.data.rglob("*") if path.is_file()} == before
    assert (folder.out / "mine.txt").read_text() == "keep"
