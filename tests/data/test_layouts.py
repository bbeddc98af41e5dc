"""The folder layouts that are found in the wild."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from unicodedata import normalize

import pytest

from runkey.data.index import read_index
from runkey.data.split import split_images
from runkey.errors import DataError


def files(folder, split):
    return [record.file for record in read_index(folder.out / f"{split}.safetensors")]


def one_json(folder, name, image_folder):
    """The train part alone, with more images, under one JSON."""
    shutil.rmtree(folder.data / "train")
    shutil.rmtree(folder.data / "val")
    (folder.data / image_folder).mkdir(parents=True, exist_ok=True)
    (folder.data / name).parent.mkdir(parents=True, exist_ok=True)
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
        ("annotations/instances_default.json", "images/default"),  # CVAT
        ("annotations/instances_cats [7].json", "images/cats [7]"),  # CVAT, a subset
        ("labels.json", "data"),  # FiftyOne
        ("result.json", "images"),  # Label Studio
        ("train/_annotations.coco.json", "train"),  # Roboflow
        ("ds0/annotations/instances.json", "ds0/images"),  # Supervisely
        ("ds0/annotations/instances_ds0.json", "ds0/img"),
        ("export/labels.json", "export/data"),
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
    folder.prepare(val_fraction=0.25, split_seed=1)
    assert files(folder, "val") != before


def move(folder, jsons, images):
    """Put the JSON files and the images of train and val where a tool puts them."""
    folder.write()
    for split, json_path, image_path in zip(("train", "val"), jsons, images, strict=True):
        for path in (folder.data / split).iterdir():
            target = folder.data / image_path / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        target = folder.data / json_path
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.path(split).rename(target)


@pytest.mark.parametrize(
    ("jsons", "images"),
    [
        pytest.param(
            ("annotations/instances_Train.json", "annotations/instances_Validation.json"),
            ("images/Train", "images/Validation"),
            id="CVAT",
        ),
        pytest.param(
            ("train/_annotations.coco.json", "valid/_annotations.coco.json"),
            ("train", "valid"),
            id="Roboflow",
        ),
        pytest.param(
            ("train/labels.json", "validation/labels.json"),
            ("train/data", "validation/data"),
            id="FiftyOne",
        ),
        pytest.param(
            ("train/annotations/instances.json", "val/annotations/instances.json"),
            ("train/images", "val/images"),
            id="Supervisely",
        ),
        pytest.param(
            ("train/annotations/instances_default.json", "VAL/annotations/instances_default.json"),
            ("train/images/default", "VAL/images/default"),
            id="CVAT, a task each",
        ),
        pytest.param(("train.json", "val.json"), ("images", "images"), id="labelme2coco"),
        pytest.param(
            ("annotations/train_labels.json", "annotations/val_labels.json"),
            ("images", "images"),
            id="AutoGluon",
        ),
        pytest.param(
            ("labels/coco_training.json", "labels/coco_valid.json"),
            ("images/train", "images/valid"),
            id="images beside the labels",
        ),
        pytest.param(
            ("job 7/annotations/instances_train.json", "job 7/annotations/instances_val.json"),
            ("job 7/Images/train", "job 7/Images/val"),
            id="one folder deeper",
        ),
    ],
)
def test_train_and_val_of_tools(folder, jsons, images):
    """macOS's and Windows's own files are beside all of them, and names differ in case."""
    move(folder, jsons, images)
    for path in [folder.data / one for one in (*jsons, *images)]:
        place = path if path.is_dir() else path.parent
        for name in ("._x.json", f"._{path.name}", ".DS_Store", "Thumbs.db"):
            (place / name).write_bytes(b"\0\5\x16\7")
    (folder.data / "__MACOSX/annotations").mkdir(parents=True)
    (folder.data / "__MACOSX/annotations/instances_train.json").write_bytes(b"\0")

    report = folder.prepare()

    assert (report.items, report.notes) == ([], [])
    assert files(folder, "train") == [f"{images[0]}/{name}.jpg" for name in "abc"]
    assert files(folder, "val") == [f"{images[1]}/{name}.jpg" for name in "de"]


@pytest.mark.parametrize(
    ("jsons", "images"),
    [
        pytest.param(
            tuple(f"annotations/instances_{one}.json" for one in ("Train", "Validation", "Test")),
            ("images/Train", "images/Validation", "images/Test"),
            id="CVAT, Datumaro",
        ),
        pytest.param(
            tuple(f"annotations/instances_{one}2017.json" for one in ("train", "val", "test")),
            ("train2017", "val2017", "test2017"),
            id="COCO",
        ),
        pytest.param(
            tuple(f"{one}/_annotations.coco.json" for one in ("train", "valid", "test")),
            ("train", "valid", "test"),
            id="Roboflow",
        ),
        pytest.param(
            tuple(f"{one}/labels.json" for one in ("train", "validation", "test")),
            ("train/data", "validation/data", "test/data"),
            id="FiftyOne",
        ),
        pytest.param(("train.json", "val.json", "test.json"), ("images",) * 3, id="labelme2coco"),
        pytest.param(
            tuple(f"{one}/annotations/instances.json" for one in ("train", "val", "test")),
            ("train/images", "val/images", "test/images"),
            id="Supervisely",
        ),
    ],
)
def test_a_third_json_is_the_test_split(folder, jsons, images):
    """Its ids may be those of other splits, and a list of images without boxes is beside it."""
    move(folder, jsons[:2], images[:2])
    add_test(folder, jsons[2], images[2])
    if jsons[0].startswith("annotations/"):
        (folder.data / "annotations/image_info_test2017.json").write_text('{"images": []}')
    report = folder.prepare(test_fraction=0.3)

    assert report.items == []
    assert files(folder, "train") == [f"{images[0]}/{name}.jpg" for name in "abc"]
    assert files(folder, "val") == [f"{images[1]}/{name}.jpg" for name in "de"]
    assert files(folder, "test") == [f"{images[2]}/{name}.jpg" for name in "gf"]
    assert report.kept["test"] == {"images": 2, "objects": 2, "crowd_regions": 0}
    assert list(json.loads((folder.out / "statistics.json").read_text())) == [
        *("train", "val", "test")
    ]


def add_test(folder, json_path, image_folder):
    """A JSON of two images that neither train nor val has."""
    entries = [
        {"id": number, "file_name": f"{name}.jpg", "width": 40, "height": 30}
        for number, name in ((12, "f"), (11, "g"))
    ]
    boxes = [
        {"id": n, "image_id": n, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0}
        for n in (11, 12)
    ]
    content = {"images": entries, "annotations": boxes, "categories": folder.val["categories"]}
    for path in (json_path, f"{image_folder}/f.jpg"):
        (folder.data / path).parent.mkdir(parents=True, exist_ok=True)
    (folder.data / json_path).write_text(json.dumps(content))
    for name in "fg":
        folder.picture(ord(name)).save(folder.data / f"{image_folder}/{name}.jpg", quality=90)


def test_without_val_it_is_split_off_train_and_test_stays_test(folder):
    one_json(folder, "annotations/instances_train.json", "train")
    add_test(folder, "annotations/instances_test.json", "test")
    report = folder.prepare(val_fraction=0.25)

    assert report.notes[:-1] == [
        "annotations/instances_train.json is split, as there is no JSON of val (data.val_fraction)"
    ]
    sizes = {split: kept["images"] for split, kept in report.kept.items()}
    assert sizes == {"train": 15, "val": 5, "test": 2}


def test_a_test_split_of_one_json_and_of_train(folder):
    one_json(folder, "result.json", "images")
    report = folder.prepare(val_fraction=0.25, test_fraction=0.2)
    assert [kept["images"] for kept in report.kept.values()] == [11, 5, 4]
    of_three = [set(files(folder, split)) for split in ("train", "val", "test")]
    assert len(set.union(*of_three)) == 20

    folder.prepare(val_fraction=0.25)
    assert set(files(folder, "val")) == of_three[1]
    assert not list(folder.out.glob("*test*"))


def test_test_is_taken_from_train_if_val_has_a_json(folder):
    one_json(folder, "annotations/instances_train.json", "train")
    (folder.data / "val").mkdir()
    add_test(folder, "annotations/instances_val.json", "val")
    report = folder.prepare(test_fraction=0.25)
    assert {s: kept["images"] for s, kept in report.kept.items()} == {
        "train": 15,
        "val": 2,
        "test": 5,
    }
    assert files(folder, "val") == ["val/g.jpg", "val/f.jpg"]


def test_two_jsons_of_test_are_not_used(folder):
    folder.write()
    for name in ("test-dev", "test_hard"):
        add_test(folder, f"annotations/instances_{name}.json", "test")
    assert folder.prepare().notes == [
        "not used: annotations/instances_test-dev.json, annotations/instances_test_hard.json; to"
        " have a test split, leave one JSON of test"
    ]
    assert not (folder.out / "test.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "copied", "policy", "left"),
    [
        ("a", "train", "fail", None),
        ("a", "train", "drop", {"train": "bc", "val": "de", "test": "gf"}),
        ("d", "val", "drop", {"train": "abc", "val": "e", "test": "gf"}),
    ],
)
def test_leaks_into_test(folder, name, copied, policy, left):
    """The picture of train or val is in test too, under another name: it stays in test."""
    folder.write()
    add_test(folder, "annotations/instances_test.json", "test")
    shutil.copy(folder.data / f"{copied}/{name}.jpg", folder.data / "test/f.jpg")
    if policy == "fail":
        with pytest.raises(DataError) as caught:
            folder.prepare(checks={"leaked_image": policy})
        assert str(caught.value).startswith(
            "data/annotations/instances_train.json: image 1 (train/a.jpg) is image 12 (test/f.jpg)"
            " of data/annotations/instances_test.json too; "
        )
        return
    report = folder.prepare(checks={"leaked_image": policy})
    assert [item.done for item in report.items] == [f"left out of {copied}"]
    for split, names in left.items():
        assert files(folder, split) == [f"{split}/{one}.jpg" for one in names]


def test_groups_are_kept_together_and_a_shared_one_is_noted(folder):
    one_json(folder, "result.json", "images")
    pattern = r"^(\d)\d\.png"  # 10 to 19, and 20
    report = folder.prepare(val_fraction=0.4, group_by=pattern)
    assert report.notes[0] == (
        "data.group_by: 2 groups of images stay together; 9 images without a match, each by itself"
    )
    tens = {f"images/{number}.png" for number in range(10, 20)}
    assert tens <= set(files(folder, "train")) or not tens & set(files(folder, "train"))
    with pytest.raises(DataError, match=r"matches no file name, such as '1\.png'"):
        folder.prepare(group_by="(patient)")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_groups_do_not_depend_on_the_unicode_form(form):
    names = [normalize(form, f"für{number}.jpg") for number in range(3)] + ["a.jpg", "b.jpg"]
    found = split_images({name: {0} for name in names}, {"val": 0.4}, 0, "(für)")
    assert {found.split_of[name] for name in names[:3]} == {"train"}


def test_a_group_in_two_jsons_is_noted(folder):
    folder.write()
    assert folder.prepare(group_by=r"([a-e])\.jpg").notes == []
    assert folder.prepare(group_by=r"[a-e](\.jpg)").notes == [
        "data.group_by: 1 group in more than one JSON ('.jpg'): AP is too high if their images are"
        " alike"
    ]


def test_a_test_json_without_annotations_is_no_test_split(folder):
    move(
        folder, ("train/_annotations.coco.json", "valid/_annotations.coco.json"), ("train", "valid")
    )
    (folder.data / "test").mkdir()
    (folder.data / "test/_annotations.coco.json").write_text("{}")
    for name in "de":  # other images of the same names
        folder.picture(9).save(folder.data / f"test/{name}.jpg")

    assert folder.prepare().notes == [
        "not used: data/test/_annotations.coco.json: it has no annotations, so it is no test split"
    ]
    assert files(folder, "val") == ["valid/d.jpg", "valid/e.jpg"]
    assert not (folder.out / "test.safetensors").exists()


@pytest.mark.parametrize(
    ("jsons", "more", "listed"),
    [
        (
            ("train/labels.json", "val/labels.json"),
            "coco.json",
            "coco.json, train/labels.json, val/labels.json",
        ),
        (("train.json", "val.json"), "annotations/train.json", None),
        (
            ("one/annotations/instances.json", "two/annotations/instances.json"),
            "one/meta.json",
            "one/annotations/instances.json, one/meta.json, two/annotations/instances.json",
        ),
        (
            ("train.json", "val.json"),
            "train/labels.json val/labels.json",
            "train.json, val.json, train/labels.json, val/labels.json",
        ),
        (
            ("dir/a.json", "dir/b.json"),
            " ".join(f"dir/{number}.json" for number in range(10, 30)),
            "dir/10.json, dir/11.json, dir/12.json, dir/13.json, dir/14.json, dir/15.json, "
            "dir/16.json, dir/17.json, and 14 more",
        ),
    ],
)
def test_what_may_mean_two_things_is_refused_with_a_list(folder, jsons, more, listed):
    move(folder, jsons, ("images", "images"))
    for name in more.split():
        (folder.data / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.data / name).write_text("{}")
    listed = listed or "annotations/train.json, train.json, val.json"

    with pytest.raises(DataError) as caught:
        folder.prepare()
    line = f"data: cannot tell which JSON to take ({listed}); leave annotations/instances_train*"
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("before", "note"),
    [
        ("/home/me/set/", "the folders /home/me/set"),
        ("C:\\Users\\me\\", "the folders C:/Users/me"),
        (
            "..\\..\\label-studio\\media\\upload\\4\\",
            "the folders ../../label-studio/media/upload/4",
        ),
        ("images/1/", "the folders images/1"),
        ("https://host/bucket/", "the folders https://host/bucket"),
        ("images\\cb0618f6-", "the folders images and the 8 digits in front of them"),
        ("cb0618f6-", "their folders and the 8 digits in front of them"),
    ],
)
def test_folders_of_the_machine_that_exported_are_taken_off_the_names(folder, before, note):
    for entry in folder.train["images"]:
        entry["file_name"] = before + entry["file_name"]
    folder.write()
    report = folder.prepare()

    name = "data/annotations/instances_train.json"
    assert report.notes == [f"{name}: file names are read without {note}"]
    assert files(folder, "train") == ["train/a.jpg", "train/b.jpg", "train/c.jpg"]


def test_folders_that_tell_images_apart_stay(folder):
    for entry, name in zip(folder.train["images"], ("x/a.jpg", "y/a.jpg", "y/b.jpg"), strict=True):
        entry["file_name"] = name
    with pytest.raises(DataError, match=r"image 1 \(x/a\.jpg\) not found in data/train"):
        folder.run()


@pytest.mark.parametrize("named", ["NFC", "NFD"])
def test_the_unicode_form_of_a_name_does_not_count(folder, named):
    name, there = (
        normalize(named, "für/é.jpg"),
        normalize("NFD" if named == "NFC" else "NFC", "für"),
    )
    other = normalize("NFD" if named == "NFC" else "NFC", "é.jpg")
    (folder.data / "train" / there).mkdir()
    (folder.data / "train/a.jpg").rename(folder.data / "train" / there / other)
    folder.train["images"][0]["file_name"] = name

    assert folder.run().items == []
    assert files(folder, "train")[0] == f"train/{there}/{other}"


# A macOS screenshot, an emoji of a family, soft hyphen, ideographic space, private use, Persian.
ODD = [
    "9.00\u202fAM",
    "\U0001f468\u200d\U0001f469",
    "a\u00adb",
    "\u3000x",
    "\ue000",
    "\u0645\u06cc\u200c\u062e",
]


@pytest.mark.parametrize("name", [*ODD, "US$5_{ and $10^", "x" * 200, "שלום"])
def test_names_of_images_and_classes_may_have_any_character_but_controls(folder, name):
    (folder.data / "train/a.jpg").rename(folder.data / f"train/{name}.jpg")
    folder.train["images"][0]["file_name"] = f"{name}.jpg"
    for split in (folder.train, folder.val):
        split["categories"][0]["name"] = name

    assert folder.run().items == []
    assert files(folder, "train")[0] == f"train/{name}.jpg"


@pytest.mark.parametrize(
    "character", ["\n", "\t", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\ud800"]
)
def test_control_characters_in_names_are_refused(folder, character):
    folder.train["images"][0]["file_name"] = f"a{character}.jpg"
    with pytest.raises(DataError, match=r"images\[0\] \(id 1\): file_name is"):
        folder.run()
    folder.train["images"][0]["file_name"] = "a.jpg"
    folder.train["categories"][0]["name"] = f"a{character}"
    with pytest.raises(DataError, match=r"category 1: name is"):
        folder.run()


@pytest.mark.parametrize("place", ["annotations", "ds0/annotations"])
def test_instances_are_taken_before_other_tasks_beside_them(folder, place):
    """Datumaro's `coco` and Supervisely with captions; a JSON elsewhere may be the data set."""
    one_json(folder, f"{place}/instances.json", f"{place}/../images")
    others = f"{place}/captions.json, {place}/stuff_default.json"
    for name in others.split(", "):
        (folder.data / name).write_text("{}")

    assert folder.prepare().notes == [f"not used: {others}"]
    (folder.data / "coco.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot tell which JSON|data/coco\.json: no list"):
        folder.prepare()


def test_copies_of_an_image_cannot_be_on_both_sides_of_a_split(folder):
    one_json(folder, "coco.json", "images")
    for number in range(2, 11):
        shutil.copy(folder.data / "images/1.png", folder.data / f"images/{number}.png")
    report = folder.prepare(val_fraction=0.5, max_bad_fraction=1)

    copies = {f"images/{number}.png" for number in range(1, 11)}
    assert copies & {*files(folder, "train"), *files(folder, "val")} == {"images/1.png"}
    assert report.counts["copied_image"] == {"drop": 9}


def test_other_coco_files_beside_train_and_val_do_not_matter(folder):
    for name in ("captions_train2017.json", "person_keypoints_val2017.json"):
        (folder.data / "annotations" / name).write_text("{}")

    assert not folder.run().failures


@pytest.mark.parametrize(
    "cache", [".dvc/cache/files/md5", ".dvc/cache", "../drive/cache/files/md5", "../drive/cache"]
)
def test_dvc_links_into_its_cache_are_followed(folder, cache):
    """`cache.type symlink` puts a link in place of every file; DVC 2 had no files/md5."""
    objects = folder.root / cache
    for number, path in enumerate(sorted((folder.data / "train").iterdir())):
        target = objects / f"{number:02x}" / f"{number:030x}"
        target.parent.mkdir(parents=True)
        path.rename(target)
        path.symlink_to(target)

    assert folder.run().items == []


@pytest.mark.slow
def test_dvcs_own_ways_for_data_on_another_drive(folder, tmp_path_factory):
    """What docs/your-data.md advises: links into a cache elsewhere, an import and a copy."""
    folder.write()
    drive = tmp_path_factory.mktemp("drive")
    folder.data.rename(drive / "set")
    run_dvc(folder.root, "init --no-scm")
    run_dvc(folder.root, f"cache dir --local {drive}/cache")
    run_dvc(folder.root, "config --local cache.type symlink")
    run_dvc(folder.root, f"import-url {drive}/set data")
    assert (folder.data / "train/a.jpg").is_symlink()
    assert folder.prepare().items == []

    shutil.rmtree(folder.data)
    (folder.root / "data.dvc").unlink()
    run_dvc(folder.root, f"add {drive}/set --out data")
    assert (folder.data / "train/a.jpg").is_symlink()
    assert folder.prepare().items == []


def run_dvc(root, arguments):
    command = [sys.executable, "-m", "dvc", *arguments.split(), "--quiet"]
    subprocess.run(command, cwd=root, check=True, env=os.environ | {"DVC_NO_ANALYTICS": "1"})


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
