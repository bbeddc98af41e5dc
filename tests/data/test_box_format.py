"""What the boxes of a whole JSON tell: units, corners, sizes that are not theirs, copies."""

from __future__ import annotations

import json
import os
import random
import shutil

import numpy as np
import pytest
from PIL import Image

from runkey.data.box_format import whole_of_unit
from runkey.errors import DataError
from tests.support.coco_folder import index, only_item

WIDTH, HEIGHT = 320, 240
COUNT = 20


@pytest.fixture
def photos(folder):
    """Train with 20 images of 320 x 240 and an object each, anywhere; `val` as it was."""
    rng = random.Random(1)
    folder.train |= {"images": [], "annotations": []}
    for n in range(1, COUNT + 1):
        Image.new("RGB", (WIDTH, HEIGHT), (9 * n, 200 - n, n)).save(folder.data / f"train/{n}.png")
        image = {"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT}
        w, h = rng.uniform(30, 100), rng.uniform(30, 75)
        box = [rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h), w, h]
        entry = {"id": n, "image_id": n, "category_id": 1, "bbox": box, "area": 0.7 * w * h}
        folder.train["images"].append(image)
        folder.train["annotations"].append(entry)
    return folder


def boxes(folder, change):
    for entry in folder.train["annotations"]:
        entry["bbox"] = change(*entry["bbox"])


def without_areas(folder):
    for entry in folder.train["annotations"]:
        del entry["area"]


def refusal(folder, **options):
    folder.write()
    with pytest.raises(DataError) as caught:
        folder.prepare(**options)
    return str(caught.value)


def test_sound_photos_pass_without_a_note(photos):
    report = photos.run()
    assert (report.items, report.notes[1:]) == ([], [])
    assert report.notes[0].startswith("train has no object of 1 class")


UNITS = {
    "parts": (lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT], "between 0 and 1"),
    "percent": (
        lambda x, y, w, h: [100 * x / WIDTH, 100 * y / HEIGHT, 100 * w / WIDTH, 100 * h / HEIGHT],
        "between 0 and 100, in images of up to 320x240: percent of the image's size",
    ),
    "corners": (lambda x, y, w, h: [x, y, x + w, y + h], "corners [left, top, right, bottom]"),
    "centres": (lambda x, y, w, h: [x + w / 2, y + h / 2, w, h], "[x, y] as their centre"),
    "y first": (lambda x, y, w, h: [y, x, h, w], "with x and y swapped"),
    "twice as large": (lambda *box: [2 * v for v in box], "times the size of the images"),
}


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("outliers", [0, 1, 2])
def test_boxes_in_another_format_are_refused_by_name(photos, name, outliers):
    """A few odd boxes among them change nothing."""
    change, said = UNITS[name]
    boxes(photos, change)
    without_areas(photos)
    # The centres of 20 objects alone reach over the edge by less than a fifth.
    limit = 0.05 if name == "centres" else 0.2
    entries = photos.train["annotations"]
    for entry in entries[: min(outliers, 1 + (name in ("parts",)))]:
        entry["bbox"] = [-5e-7, 2.0, 3.0, 4.0] if outliers == 1 else [3.0, 2.0, 50.0, 40.0]
    assert said in refusal(photos, max_bad_fraction=limit)


def test_thousandths_in_large_images():
    low = np.random.default_rng(0).uniform(0, 800, (20, 2))
    boxes_xywh = np.hstack((low, np.full((20, 2), 200.0)))
    images = np.arange(20)
    for size, unit in (((4000, 3000), 1000), ((1280, 960), 0)):
        assert whole_of_unit(boxes_xywh, np.tile(np.array(size, float), (20, 1)), images) == unit


@pytest.mark.parametrize("case", ["anywhere in tiles", "one in the middle"])
def test_boxes_in_images_somewhat_above_the_unit_are_pixels(case):
    rng, count = np.random.default_rng(0), 500
    size, side = ((1024, 1024), 10) if case == "anywhere in tiles" else ((1280, 960), 300)
    spread = rng.uniform(side / 2, 1024 - side / 2, (count, 2))
    centres = spread if side == 10 else rng.normal(np.array(size) / 2, 70, (count, 2))
    boxes_xywh = np.hstack((centres - side / 2, np.full((count, 2), float(side))))
    sizes = np.tile(np.array(size, float), (count, 1))
    assert whole_of_unit(boxes_xywh, sizes, np.arange(count)) == 0


def test_a_logo_in_the_corner_is_no_box_in_percent(photos):
    boxes(photos, lambda x, y, w, h: [10 + x / 400, 12 + y / 300, 80.0, 60.0])
    without_areas(photos)
    assert photos.run().items == []


def test_percent_can_be_pixels_after_all(photos):
    boxes(photos, UNITS["percent"][0])
    without_areas(photos)
    assert photos.run(max_bad_fraction=1).items == []


def test_some_boxes_below_a_pixel_are_noted(photos):
    boxes(photos, lambda x, y, w, h: [x, y, w, h])
    photos.train["annotations"][3] |= {"bbox": [0.1, 0.2, 0.3, 0.4], "area": 0.1}
    notes = photos.run().notes
    assert any(
        "1 of 20 boxes lie between 0 and 1, such as [0.1, 0.2, 0.3, 0.4]" in n for n in notes
    )


def test_a_mask_smaller_than_its_box_is_sound_and_one_larger_is_not(photos):
    first = photos.train["annotations"][0]
    w, h = first["bbox"][2:]
    first["area"] = (w + 1) * (h + 1)  # a mask counts its last row and column
    assert photos.run().items == []
    first["area"] = 1.5 * w * h
    photos.run()
    assert only_item(photos)["kind"] == "bad_area"
    assert index(photos)[1].areas[0] == pytest.approx(w * h)


def test_boxes_scaled_without_their_areas(photos):
    boxes(photos, lambda *box: [v / 2 for v in box])
    assert "20 of 20 areas are larger than their box, 2.8 times as large" in refusal(photos)
    boxes(photos, lambda *box: [4 * v for v in box])
    for entry in photos.train["annotations"]:
        entry["area"] = entry["bbox"][2] * entry["bbox"][3] / 16
        entry["bbox"] = [v / 2 for v in entry["bbox"]]
    assert any("every `area` is 0.25 of its box" in note for note in photos.run().notes)


@pytest.mark.parametrize("area", [10_000, WIDTH * HEIGHT, 10**30])
def test_one_area_for_all_boxes_is_a_placeholder(photos, area):
    for entry in photos.train["annotations"]:
        entry["area"] = area
    assert photos.run().counts == {"bad_area": {"fix": COUNT}}
    record = index(photos)[1]
    assert record.areas[0] == pytest.approx(record.boxes_xywh[0][2] * record.boxes_xywh[0][3])


# Left out or clipped by default.


@pytest.mark.parametrize(("bad", "stops"), [(4, False), (5, True)])
@pytest.mark.parametrize("fault", ["outside_box", "empty_box", "overhanging_box"])
def test_a_fifth_of_the_boxes_may_be_left_out_or_clipped(photos, fault, bad, stops):
    box = {
        "outside_box": [350, 1, 9, 9],
        "empty_box": [5, 5, 0, 9],
        "overhanging_box": [300, 5, 40, 9],
    }
    for entry in photos.train["annotations"][:bad]:
        entry |= {"bbox": box[fault], "area": 1}
    if not stops:
        assert list(photos.run().counts) == [fault]
        return
    said = refusal(photos)
    assert f"5 of 20 boxes are left out or changed ({fault} 5)" in said
    assert "raise data.max_bad_fraction (now 0.2)" in said
    assert list(photos.run(max_bad_fraction=0.25).counts) == [fault]


def test_a_fifth_of_the_images_may_be_left_out(photos):
    for number in range(1, 6):
        (photos.data / f"train/{number}.png").unlink()
    checks = {"missing_image": "drop"}
    assert "5 of 20 images are left out (missing_image 5)" in refusal(photos, checks=checks)
    assert photos.run(checks=checks, max_bad_fraction=0.25).kept["train"]["images"] == 15


# Sizes in the JSON.


def sizes(folder, width, height, numbers=range(1, COUNT + 1)):
    for image in folder.train["images"]:
        if image["id"] in numbers:
            image |= {"width": width, "height": height}


@pytest.mark.parametrize("numbers", [range(1, COUNT + 1), (2, 7)])
def test_swapped_width_and_height_scale_nothing(photos, numbers):
    photos.run()
    sound = index(photos)
    sizes(photos, HEIGHT, WIDTH, numbers)
    assert "is 320x240, but 240x320 in the JSON, with width and height swapped" in refusal(photos)
    report = photos.run(checks={"size_mismatch": "fix"})
    assert index(photos) == sound
    assert report.counts == {"size_mismatch": {"fix": len(numbers)}}


@pytest.mark.parametrize("stated", [(1000, 1000), (960, 240)])
def test_another_shape_is_not_scaled(photos, stated):
    sizes(photos, *stated)
    said = refusal(photos, checks={"size_mismatch": "fix"})
    assert "of another shape, so that its boxes cannot be scaled" in said
    assert "size_mismatch: drop" in said


def test_placeholders_of_one_pixel_leave_boxes_as_they_are(photos):
    photos.run()
    sound = index(photos)
    sizes(photos, 1, 1)
    photos.run(checks={"size_mismatch": "fix"})
    assert index(photos) == sound


def test_placeholders_of_the_same_shape_are_not_scaled(photos):
    sizes(photos, 640, 480)
    said = refusal(photos, checks={"size_mismatch": "fix"})
    assert "would scale 20 boxes, which all fit their files as they are" in said


def test_few_boxes_that_fit_either_way_are_scaled_with_a_note(photos):
    """Whether their sizes are placeholders cannot be told from so few."""
    photos.train["images"][:4] = [
        image | {"width": 640, "height": 480} for image in photos.train["images"][:4]
    ]
    report = photos.run(checks={"size_mismatch": "fix"})
    assert report.counts == {"size_mismatch": {"fix": 4}}
    (note,) = (one for one in report.notes if "size_mismatch" in one)
    assert "fix scales 4 boxes down, and all would fit their files as they are" in note


@pytest.mark.parametrize("factor", [0.5, 1 / 3, 1.7])
def test_images_resized_after_labelling_are_scaled(photos, factor):
    """The sides are rounded to pixels, so that their factors differ a little."""
    photos.run()
    before = index(photos)
    new = (round(WIDTH * factor), round(HEIGHT * factor))
    for n in range(1, COUNT + 1):
        path = photos.data / f"train/{n}.png"
        with Image.open(path) as image:
            image.resize(new).save(path)
    photos.run(checks={"size_mismatch": "fix"})
    for number, record in index(photos).items():
        whole = np.array(before[number].boxes_xywh[0])
        assert np.allclose(record.boxes_xywh[0], whole * factor, rtol=0.01, atol=0.5)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("drawn", ["turned", "stored"])
def test_boxes_that_fit_the_other_frame_are_evidence(folder, orientation, drawn):
    """The JSON has one size, and the boxes are drawn on the other."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    folder.picture(5).save(folder.data / "train/b.jpg", exif=tags)
    box, size = ([4, 25, 10, 14], (40, 30)) if drawn == "turned" else ([25, 4, 14, 10], (30, 40))
    folder.train["annotations"][2] |= {"bbox": box, "area": 140}
    folder.train["images"][1] |= {"width": size[0], "height": size[1]}
    said = refusal(folder)
    assert f"image 2 is {size[0]}x{size[1]} in the JSON, but its boxes fit only" in said
    folder.run(checks={"size_mismatch": "fix"})
    record = index(folder)[2]
    assert record.boxes_xywh == (tuple(box),)
    assert (record.width, record.height, record.rotate != 0) == (*size[::-1], drawn == "turned")


# Objects and images that occur twice.


def double(folder, *, shift=0.0, **fields):
    entries = folder.train["annotations"]
    for entry in json.loads(json.dumps(entries)):
        bbox = [v + shift for v in entry["bbox"]]
        entries.append(entry | {"id": entry["id"] + 1000, "bbox": bbox} | fields)


@pytest.mark.parametrize("shift", [0.0, 1e-9, -0.004, 0.24])
def test_objects_written_twice_are_kept_once(photos, shift):
    photos.run()
    sound = index(photos)
    double(photos, shift=shift)
    report = photos.run(num_queries=1)
    assert index(photos) == sound
    assert report.counts == {"duplicate_object": {"drop": COUNT}}
    photos.train["annotations"].reverse()
    photos.run()
    assert {index(photos)[1].annotation_ids} == {(1001,)}
    said = refusal(photos, checks={"duplicate_object": "fail"})
    assert "annotation 1: its class and box" in said
    assert "are those of annotation 1001" in said


@pytest.mark.parametrize("fields", [{"category_id": 7}, {"iscrowd": 1}, {"shift": 3.0}])
def test_other_objects_at_the_same_place_are_kept(photos, fields):
    double(photos, **fields)
    assert "duplicate_object" not in photos.run().counts


def test_small_neighbours_are_no_copies(photos):
    photos.train["annotations"] = [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": [10 + 0.4 * n, 20, 3, 3]}
        for n in range(1, 8)
    ]
    assert photos.run().items == []


@pytest.mark.parametrize("spelling", ["./a.jpg", "x/.././a.jpg", ".//a.jpg"])
def test_another_spelling_is_the_same_file(folder, spelling):
    folder.train["images"][2]["file_name"] = spelling
    said = "its name has `..` in it" if ".." in spelling else "has the same file as image 1 (a.jpg)"
    assert said in refusal(folder)


@pytest.mark.parametrize("copy", [shutil.copy, os.link, os.symlink])
def test_copies_inside_a_split_are_kept_once(folder, copy):
    (folder.data / "train/c.jpg").unlink()
    copy(folder.data / "train/b.jpg", folder.data / "train/c.jpg")
    entry = folder.train["annotations"][2]
    folder.train["annotations"].append(entry | {"id": 104, "image_id": 3})
    report = folder.run()
    assert sorted(index(folder)) == [1, 2]
    assert report.counts == {"copied_image": {"drop": 1}}
    assert only_item(folder)["what"] == (
        "image 3 (c.jpg) has the same bytes as image 2 (train/b.jpg)"
    )
    assert report.notes == []
    entry = folder.train["annotations"][-1]
    folder.train["annotations"][-1] = entry | {"category_id": 7}
    assert folder.run().notes == [
        "data/annotations/instances_train.json: 1 image left out as copies had other objects than "
        "the first; list each once, with all its objects (data.checks.copied_image: fail stops at "
        "them)"
    ]
    assert only_item(folder)["what"].endswith("(train/b.jpg), and other boxes or classes")


def test_copies_with_other_objects_say_so(folder):
    shutil.copy(folder.data / "train/b.jpg", folder.data / "train/c.jpg")
    folder.run()
    assert only_item(folder)["what"].endswith(", and other boxes or classes")


def test_an_export_for_each_class_is_refused(photos):
    """The same pictures are listed again with the objects of the next class."""
    for image in photos.train["images"][:6]:
        twin = image["id"] + 12
        shutil.copy(photos.data / f"train/{image['id']}.png", photos.data / f"train/{twin}.png")
    assert "6 of 20 images are copies of others with other objects" in refusal(photos)


# Crowd regions.


def test_a_few_crowd_regions_are_no_note_and_many_are(photos):
    double(photos, iscrowd=1, category_id=7)
    assert any(
        "train: 20 of 40 annotations are crowd regions (iscrowd: 1), mostly cube: neither" in note
        for note in photos.run().notes
    )
    photos.train["annotations"] = photos.train["annotations"][:COUNT]
    photos.train["annotations"][0]["iscrowd"] = 1
    assert not any("crowd" in note for note in photos.run().notes)
