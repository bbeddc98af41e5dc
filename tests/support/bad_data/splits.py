"""Train and val that share an image, or that have too little in them."""

from __future__ import annotations

from typing import Any

from tests.support.bad_data.faults import TRAIN, VAL, Case


def also_in_val(folder: Any) -> None:
    content = (folder.data / "train/b.jpg").read_bytes()
    (folder.data / "val/copy.jpg").write_bytes(content)
    folder.val["images"].append({"id": 13, "file_name": "copy.jpg", "width": 40, "height": 30})


def same_file_in_both(folder: Any) -> None:
    folder.val["images"][0]["file_name"] = "train/c.jpg"


def all_crowd_in_train(folder: Any) -> None:
    for entry in folder.train["annotations"]:
        entry["iscrowd"] = 1
        entry["segmentation"] = {"counts": [600, 600], "size": [30, 40]}


def all_images_missing(folder: Any) -> None:
    for path in (folder.data / "train").iterdir():
        path.unlink()


def one_image_alone(folder: Any) -> None:
    folder.train["images"] = folder.train["images"][:1]
    folder.texts["val"] = None


def no_val(folder: Any) -> None:
    folder.texts["val"] = None


CASES = [
    Case(
        "a copy of a train image in val",
        also_in_val,
        f"{TRAIN}: image 2 (train/b.jpg) is image 13 (val/copy.jpg) of {VAL} too; "
        "set data.checks.leaked_image: drop in params.yaml or mend the file",
    ),
    Case(
        "one file in both splits",
        same_file_in_both,
        f"{TRAIN}: image 3 (train/c.jpg) is image 11 (train/c.jpg) of {VAL} too; "
        "set data.checks.leaked_image: drop in params.yaml or mend the file",
    ),
    Case(
        "no image left",
        all_images_missing,
        f"{TRAIN}: 3 of 3 images are left out (missing_image 3); see prepared/report.json and mend "
        "the files, or raise data.max_bad_fraction (now 0.2) in params.yaml if that is right",
        {"checks": {"missing_image": "drop"}},
    ),
    Case(
        "no image left, and no limit",
        all_images_missing,
        f"{TRAIN}: no image is left for train; "
        "add annotated images or see what was left out in prepared/report.json",
        {"checks": {"missing_image": "drop"}, "max_bad_fraction": 1},
    ),
    Case(
        "nothing but crowd regions in train",
        all_crowd_in_train,
        f"{TRAIN}: all 3 annotations for train are crowd regions, which are not learnt; write "
        "iscrowd: 0 for single objects (CVAT exports masks with 1)",
    ),
    Case(
        "no object in train",
        lambda folder: folder.train.update(annotations=[]),
        f"{TRAIN}: no image for train has an object; "
        "add annotated images or see what was left out in prepared/report.json",
    ),
    Case(
        "a pattern that matches nothing",
        no_val,
        "params.yaml: data.group_by = '(case_.)': matches no file name, such as 'a.jpg'; mend the "
        "pattern, or set it to null",
        {"group_by": "(case_.)"},
    ),
    Case(
        "one group to split",
        no_val,
        "params.yaml: data.group_by = '([._]jpg)': makes 1 group of images for 2 splits; use a "
        "pattern that makes smaller groups",
        {"group_by": "([._]jpg)"},
    ),
    Case(
        "one image to split",
        one_image_alone,
        f"{TRAIN}: train and val need an image each, but only 1 (not counting copies) passed the "
        "checks; add images or see prepared/report.json",
        {"checks": {"unknown_image": "drop"}},
    ),
]
