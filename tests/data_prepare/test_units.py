"""Boxes in parts of the image's size are refused; a speck among others is not."""

from __future__ import annotations

import json

import pytest

from runkey.errors import DataError

from .conftest import Folder


def in_parts(folder: Folder, split: str) -> None:
    """Boxes as a YOLO file has them: centre and size, divided by the image's size."""
    for annotation in getattr(folder, split)["annotations"]:
        left, top, width, height = annotation["bbox"]
        centre = [(left + width / 2) / 40, (top + height / 2) / 30]
        annotation["bbox"] = [*centre, width / 40, height / 30]
        del annotation["area"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_between_0_and_1_are_refused(folder: Folder, split: str) -> None:
    in_parts(folder, split)
    with pytest.raises(DataError) as error:
        folder.run()
    number, first = (3, "[0.175, 0.3, 0.25, 0.4]") if split == "train" else (2, "[0.175")
    line = str(error.value)
    assert line.startswith(
        f"data/annotations/instances_{split}.json: all {number} boxes lie between 0 and 1, such as "
        f"{first}"
    )
    assert line.endswith("in YOLO's files; write [left, top, width, height] in pixels")
    assert json.loads((folder.out / "report.json").read_text())["passed"] is False


def test_one_box_of_less_than_a_pixel_is_a_speck(folder: Folder) -> None:
    folder.train["annotations"][1]["bbox"] = [0.5, 0.5, 0.4, 0.4]
    assert folder.run().passed


def test_images_without_objects_have_no_unit(folder: Folder) -> None:
    """The fault is that there is nothing to learn, not the unit of nothing."""
    folder.val["annotations"] = []
    with pytest.raises(DataError, match="no image for val has an object"):
        folder.run()
