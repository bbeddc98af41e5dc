"""Contact sheets and detection sheets, on images as they come."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from runkey.errors import DataError
from runkey.evaluation.detections import DetectionArrays
from runkey.evaluation.per_image import judge_images
from runkey.inference.draw import class_colour, place_label, printable
from runkey.plots.sheets import (
    class_boxes,
    contact_sheet,
    detection_boxes,
    detection_sheet,
    truth_boxes,
)

MOST_BYTES = 150_000
ODD_SIZES = [(1, 1), (4000, 30), (30, 4000), (64, 48), (2500, 2000), (7, 300)]
NAMES = ("Blutkörperchen", "шар", "αβγ", "白血球", "", "a name that is far too long for a tag " * 3)


def seen(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).copy()


def near(picture, colour):
    """Pixels of about that colour; JPEG blurs."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(picture.astype(int) - wanted).max(axis=2) < 24).sum())


def predicted(records, classes, *, right=True):
    return [
        {
            "image_id": r.id,
            "category_id": classes[label if right else (label + 1) % len(classes)].id,
            "bbox": list(box),
            "score": 0.9,
        }
        for r in records
        for box, label in zip(r.boxes_xywh, r.labels, strict=True)
    ]


def judged(records, classes, results):
    return judge_images(records, DetectionArrays.from_results(results, classes))


def test_contact_sheet_of_odd_sizes_and_names(image_set, tmp_path):
    records, classes, folder = image_set(ODD_SIZES, NAMES, boxes=6)
    path = contact_sheet(records, classes, folder, tmp_path / "new" / "sheet.jpg")
    assert path.stat().st_size < MOST_BYTES
    assert 100 < seen(path).shape[0] < 2000


@pytest.mark.parametrize("count", [0, 1, 2, 60])
def test_contact_sheet_of_any_number(image_set, tmp_path, count):
    records, classes, folder = image_set([(64, 48)] * count)
    picture = seen(contact_sheet(records, classes, folder, tmp_path / "sheet.jpg"))
    assert picture.shape[1] == 1100
    assert (near(picture, class_colour(0)) > 200) == (count > 0) or count == 0


def test_contact_sheet_without_boxes_or_classes(image_set, tmp_path):
    records, _, folder = image_set([(64, 48)] * 3, boxes=0)
    assert contact_sheet(records, [], folder, tmp_path / "sheet.jpg").is_file()


def test_hundreds_of_classes(image_set, tmp_path):
    names = tuple(f"class with a name {i}" for i in range(300))
    records, classes, folder = image_set([(64, 48)] * 4, names)
    assert seen(contact_sheet(records, classes, folder, tmp_path / "sheet.jpg")).shape[0] < 600


def test_noise_stays_light(tmp_path, image_set):
    """Noise is the worst that a JPEG can be asked for."""
    records, classes, folder = image_set([(640, 480)] * 8)
    rng = np.random.default_rng(0)
    for record in records:
        noise = rng.integers(0, 255, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / record.file)
    path = contact_sheet(records, classes, folder, tmp_path / "sheet.jpg")
    assert path.stat().st_size < MOST_BYTES


def test_best_and_worst(image_set, tmp_path):
    records, classes, folder = image_set([(200, 150), (150, 200), (90, 90), (300, 60)])
    good = predicted(records[:2], classes) + predicted(records[2:], classes, right=False)
    best = detection_sheet(
        judged(records, classes, good),
        classes,
        folder,
        tmp_path / "best.jpg",
        best=True,
        images=2,
    )
    worst = detection_sheet(
        judged(records, classes, good),
        classes,
        folder,
        tmp_path / "worst.jpg",
        best=False,
        images=2,
    )
    right, wrong = "#0072B2", "#D55E00"
    assert near(seen(best), right) > 5 * near(seen(best), wrong)
    assert near(seen(worst), wrong) > 5 * near(seen(worst), right)


@pytest.mark.parametrize("best", [True, False])
def test_detection_sheet_of_odd_sizes_and_names(image_set, tmp_path, best):
    records, classes, folder = image_set(ODD_SIZES, NAMES, boxes=6)
    found = predicted(records, classes, right=best)
    path = detection_sheet(
        judged(records, classes, found),
        classes,
        folder,
        tmp_path / "s.jpg",
        best=best,
    )
    assert path.stat().st_size < MOST_BYTES


def test_nothing_detected_and_nothing_to_detect(image_set, tmp_path):
    records, classes, folder = image_set([(64, 48)] * 3, boxes=0)
    assert detection_sheet(
        judged(records, classes, []), classes, folder, tmp_path / "a.jpg", best=True
    ).is_file()
    assert detection_sheet(
        judged([], classes, []), classes, folder, tmp_path / "b.jpg", best=False
    ).is_file()


def test_same_bytes_again(image_set, tmp_path):
    records, classes, folder = image_set([(200, 150)] * 5)
    found = predicted(records, classes)
    once = contact_sheet(records, classes, folder, tmp_path / "1.jpg").read_bytes()
    assert contact_sheet(records, classes, folder, tmp_path / "2.jpg").read_bytes() == once
    once = detection_sheet(
        judged(records, classes, found),
        classes,
        folder,
        tmp_path / "3.jpg",
        best=True,
    )
    again = detection_sheet(
        judged(records, classes, found),
        classes,
        folder,
        tmp_path / "4.jpg",
        best=True,
    )
    assert once.read_bytes() == again.read_bytes()


def test_missing_image_is_named(image_set, tmp_path):
    records, classes, folder = image_set([(64, 48)])
    (folder / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png: not found"):
        contact_sheet(records, classes, folder, tmp_path / "sheet.jpg")


def test_crowded_images_keep_a_name_of_each_class_and_all_faults(image_set):
    [record], classes, _ = image_set([(400, 300)], boxes=30)
    names = [box.name for box in class_boxes(record, classes) if box.is_labelled]
    assert sorted(names) == ["one", "one (crowd)", "two"]
    found = predicted([record], classes)[:20]
    [score] = judged([record], classes, found).images
    missed = [box for box in truth_boxes(score, classes) if box.colour == "#D55E00"]
    assert len(missed) >= 10
    assert all(box.is_labelled for box in missed)
    right = [box for box in detection_boxes(score, classes) if box.colour == "#0072B2"]
    assert sum(box.is_labelled for box in right) == 2


def test_labels_never_cover_each_other():
    labels = []
    while place := place_label(30, (50, 40, 60, 50), (0, 0, 200, 100), labels):
        labels.append(place)
    assert 1 < len(labels) < 12
    for number, one in enumerate(labels):
        assert one[0] >= 0
        assert one[2] <= 200
        for other in labels[:number]:
            apart = (
                one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]
            )
            assert apart


def test_names_in_letters_that_the_font_lacks():
    assert printable("Blutkörperchen", "class 1") == "Blutkörperchen"
    assert printable("шар", "class 1") == "шар"
    assert printable("白血球", "class 1") == "class 1"
    assert printable(" ", "class 1") == "class 1"
