"""Bad entries of the list `annotations`, and bad boxes in them."""

from __future__ import annotations

from typing import Any

from tests.support.bad_data.faults import MALFORMED_BOX, TRAIN, Case, annotation, policy


def in_parts(folder: Any, split: str = "train") -> None:
    """Boxes as a YOLO file has them: centre and size, divided by the image's size."""
    for entry in getattr(folder, split)["annotations"]:
        left, top, width, height = entry["bbox"]
        entry["bbox"] = [(left + width / 2) / 40, (top + height / 2) / 30, width / 40, height / 30]
        del entry["area"]


def times_three(folder: Any) -> None:
    """Boxes of images that were three times as large."""
    for entry in folder.train["annotations"]:
        entry["bbox"] = [3 * value for value in entry["bbox"]]
        del entry["area"]


CASES = [
    Case(
        "annotation without an id",
        annotation(1, id=None),
        f"{TRAIN}: annotations[1]: id is missing, a whole number is wanted; {MALFORMED_BOX}",
    ),
    Case(
        "category id is a fraction",
        annotation(1, category_id=1.5),
        f"{TRAIN}: annotations[1] (id 102): category_id is 1.5, a whole number is wanted; "
        f"{MALFORMED_BOX}",
    ),
    Case(
        "box of three numbers",
        annotation(1, bbox=[1, 2, 3]),
        f"{TRAIN}: annotations[1] (id 102): bbox is [1, 2, 3], [left, top, width, height] is "
        f"wanted; {MALFORMED_BOX}",
    ),
    Case(
        "iscrowd is a word",
        annotation(1, iscrowd="no"),
        f'{TRAIN}: annotations[1] (id 102): iscrowd is "no", 0 or 1 is wanted; {MALFORMED_BOX}',
    ),
    Case(
        "annotation id twice",
        annotation(1, id=101),
        f"{TRAIN}: image 1 (a.jpg), annotation 101: its id occurs before; "
        "set data.checks.duplicate_annotation: fix or drop in params.yaml or mend the file",
        policy("duplicate_annotation"),
    ),
    Case(
        "unknown category",
        annotation(1, category_id=2),
        f"{TRAIN}: image 1 (a.jpg), annotation 102 is of category 2, which `categories` does not "
        "list; set data.checks.unknown_category: drop in params.yaml or mend the file",
    ),
    Case(
        "unknown image",
        annotation(1, image_id=11),
        f"{TRAIN}: annotation 102 is of image 11, which `images` does not list; "
        "set data.checks.unknown_image: drop in params.yaml or mend the file",
    ),
    Case(
        "empty box",
        annotation(1, bbox=[4, 5, 0, 6]),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: box [4, 5, 0, 6] has no area; "
        "set data.checks.empty_box: drop in params.yaml or mend the file",
        policy("empty_box"),
    ),
    Case(
        "negative box",
        annotation(1, bbox=[20, 5, -3.5, 6]),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: box [20, 5, -3.5, 6] has a negative side; "
        "set data.checks.negative_box: fix or drop in params.yaml or mend the file",
    ),
    Case(
        "NaN box",
        annotation(1, bbox=[float("nan"), 5, 3, 6]),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: box [nan, 5, 3, 6] is not four finite numbers; "
        "set data.checks.not_finite_box: drop in params.yaml or mend the file",
    ),
    Case(
        "infinite box",
        annotation(1, bbox=[1, 5, float("inf"), 6]),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: box [1, 5, inf, 6] is not four finite numbers; "
        "set data.checks.not_finite_box: drop in params.yaml or mend the file",
    ),
    Case(
        "box of words",
        annotation(1, bbox=[1, "5", 3, 6]),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: box [1, '5', 3, 6] is not four finite numbers; "
        "set data.checks.not_finite_box: drop in params.yaml or mend the file",
    ),
    Case(
        "box outside",
        annotation(1, bbox=[40, 5, 3, 6]),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: box [40, 5, 3, 6] is outside the image of "
        "40x30; set data.checks.outside_box: drop in params.yaml or mend the file",
        policy("outside_box"),
    ),
    Case(
        "box over the edge",
        annotation(1, bbox=[30, 5, 15.5, 6]),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: box [30, 5, 15.5, 6] reaches over the image of "
        "40x30 by 5.5 pixels; "
        "set data.checks.overhanging_box: fix or drop in params.yaml or mend the file",
        policy("overhanging_box"),
    ),
    Case(
        "bad area",
        annotation(1, area=-1),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: area -1 is no positive number; "
        "set data.checks.bad_area: fix or drop in params.yaml or mend the file",
        policy("bad_area"),
    ),
    Case(
        "area larger than its box",
        annotation(1, area=1200),
        f"{TRAIN}: image 1 (a.jpg), annotation 102: area 1200 is larger than the box "
        "[20, 5, 15, 20]; set data.checks.bad_area: fix or drop in params.yaml or mend the file",
        policy("bad_area"),
    ),
    Case(
        "object twice",
        lambda folder: folder.train["annotations"].append(
            folder.train["annotations"][1] | {"id": 104}
        ),
        f"{TRAIN}: image 1 (a.jpg), annotation 104: its class and box [20, 5, 15, 20] are those of "
        "annotation 102; set data.checks.duplicate_object: drop in params.yaml or mend the file",
        policy("duplicate_object"),
    ),
    Case(
        "boxes of larger images",
        times_three,
        f"{TRAIN}: 3 of 3 boxes are left out or changed (overhanging_box 2, outside_box 1): they "
        "reach to 3 times the size of the images, which were resized after labelling, or are "
        "others; mend the export, or raise data.max_bad_fraction (now 0.2) in params.yaml if that "
        "is right",
    ),
    Case(
        "boxes in parts of the image",
        in_parts,
        f"{TRAIN}: all 3 boxes lie between 0 and 1, such as [0.175, 0.3, 0.25, 0.4]: parts of the "
        "image's size, as in YOLO's files; write [left, top, width, height] in pixels",
    ),
]
