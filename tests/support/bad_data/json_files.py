"""Bad JSON files, and bad lists of categories in them."""

from __future__ import annotations

from typing import Any

from tests.support.bad_data.faults import TRAIN, VAL, Case, categories, text, without_list


def two_train_jsons(folder: Any) -> None:
    (folder.data / "annotations/instances_train2017.json").write_text("{}")


def no_json_fits(folder: Any) -> None:
    folder.texts.update(train=None, val=None)
    for name in ("captions.json", "keypoints.json"):
        (folder.data / "annotations" / name).write_text("{}")


CASES = [
    Case(
        "no JSON",
        lambda folder: folder.texts.update(train=None, val=None),
        "data: no annotations found; put there annotations/instances_train*.json with "
        "instances_val*.json, or one JSON to be split; other layouts and formats: "
        "docs/your-data.md",
    ),
    Case(
        "two JSON for one split",
        two_train_jsons,
        "data/annotations: more than one JSON of a split (annotations/instances_train.json, "
        "annotations/instances_train2017.json); leave one of them",
    ),
    Case(
        "JSON of other kinds",
        no_json_fits,
        "data: cannot tell which JSON to take (annotations/captions.json, "
        "annotations/keypoints.json); leave annotations/instances_train*.json with "
        "instances_val*.json, or one JSON to be split",
    ),
    Case(
        "not JSON",
        text("train", '{"images": [\n  {"id": 1,, "file_name": "a.jpg"}]}'),
        f"{TRAIN}: not JSON (line 2, column 12: Expecting property name enclosed in double "
        "quotes); mend the file or export it again",
    ),
    Case(
        "cut-off JSON",
        text("val", '{"images": [{"id": 1'),
        f"{VAL}: not JSON (line 1, column 21: Expecting ',' delimiter); "
        "mend the file or export it again",
    ),
    Case(
        "not UTF-8",
        text("train", '{"images": "Bäume"}'.encode("latin-1")),
        f"{TRAIN}: not JSON (byte 13 is not UTF-8); mend the file or export it again",
    ),
    Case(
        "nested too deeply",
        text("train", "[" * 100_000),
        f"{TRAIN}: not JSON (nested too deeply); mend the file or export it again",
    ),
    Case(
        "number without end",
        text("train", '{"images": [' + "1" * 5000 + "]}"),
        f"{TRAIN}: not JSON (a number of thousands of digits); mend the file or export it again",
    ),
    Case(
        "a list on top",
        text("train", "[]"),
        f"{TRAIN}: not an object with the lists images, annotations and categories; "
        "export it as COCO detection",
    ),
    *(
        Case(
            f"no {name}",
            without_list(name),
            f"{TRAIN}: no list `{name}`; export it as COCO detection "
            "(the lists images, annotations and categories)",
        )
        for name in ("images", "annotations", "categories")
    ),
    Case(
        "no image listed",
        lambda folder: folder.train.update(images=[]),
        f"{TRAIN}: the list `images` is empty; export the data set again",
    ),
    Case(
        "no category",
        categories("train"),
        f"{TRAIN}: the list `categories` is empty; export the data set again",
    ),
    Case(
        "category id is a string",
        categories("train", {"id": "1", "name": "ball"}),
        f'{TRAIN}: categories[0]: id is "1"; '
        "give every category an integer id and a name of its own",
    ),
    Case(
        "category without a name",
        categories("train", {"id": 1, "name": "ball"}, {"id": 7}),
        f"{TRAIN}: category 7: name is missing; "
        "give every category an integer id and a name of its own",
    ),
    Case(
        "category id twice",
        categories("train", {"id": 1, "name": "ball"}, {"id": 1, "name": "cube"}),
        f"{TRAIN}: category 1 (cube) is listed twice; "
        "give every category an integer id and a name of its own",
    ),
    Case(
        "category name twice",
        categories("val", {"id": 1, "name": "ball"}, {"id": 2, "name": "ball"}),
        f"{VAL}: category name ball has the ids 1 and 2; "
        "give every category one id and its own name",
    ),
    Case(
        "train and val disagree",
        categories("val", {"id": 1, "name": "ball"}, {"id": 7, "name": "cone"}),
        f"{VAL}: category 7 is cone, but cube in {TRAIN}; give all splits the same categories",
    ),
]
