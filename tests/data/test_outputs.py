"""Bytes of the outputs, the printed table, the statistics, and the two shared data sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runkey import progress
from runkey.data.index import read_classes, read_index
from runkey.data.prepare import prepare
from runkey.data.report import LINES_PER_KIND
from runkey.errors import DataError
from runkey.params import Checks, Data
from tests.support.shared import shared_data


def outputs(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.out.iterdir())}


def test_two_runs_write_the_same_bytes(folder):
    folder.train["annotations"][1]["bbox"] = [1, 2, 0, 4]
    Image.new("L", (40, 30), 7).save(folder.data / "train/b.jpg")
    folder.run()
    first = outputs(folder)
    folder.run()

    assert outputs(folder) == first
    assert sorted(first) == [
        *(
            "classes.json",
            "images.json",
            "report.json",
            "statistics.json",
            "train.safetensors",
            "val.safetensors",
        ),
    ]
    assert all(str(folder.root).encode() not in content for content in first.values())


def test_a_failing_run_writes_the_same_report_twice(folder):
    folder.train["annotations"][1]["category_id"] = 9
    reports = []
    for _ in range(2):
        with pytest.raises(DataError):
            folder.run()
        reports.append((folder.out / "report.json").read_bytes())

    assert reports[0] == reports[1]


def test_report_of_a_layout_fault(folder):
    with pytest.raises(DataError):
        folder.prepare()

    (item,) = folder.report()["items"]
    assert item["kind"] == "structure"
    assert item["what"].startswith("data: no annotations found")


def test_the_table_names_every_item_up_to_a_limit(folder, logged):
    more = LINES_PER_KIND + 5
    for number in range(more):
        box = {"id": 500 + number, "image_id": 3, "category_id": 1, "bbox": [number, 2, 0, 4]}
        folder.train["annotations"].append(box)
    Image.new("L", (40, 30), 7).save(folder.data / "val/d.jpg")
    folder.run(max_bad_fraction=1)
    said = logged()

    assert "  empty_box             drop 25" in said
    assert "    ... and 5 more in report.json" in said
    assert (
        "    data/annotations/instances_train.json: image 3 (c.jpg), annotation 500: "
        "box [0, 2, 0, 4] has no area; left out"
    ) in said
    assert ("    data/val/d.jpg: image 11 is of mode L; converted to RGB") in said
    assert sum("has no area" in line for line in said) == LINES_PER_KIND
    assert folder.report()["counts"] == {"empty_box": {"drop": more}, "unusual_mode": {"fix": 1}}
    assert len(folder.report()["items"]) == more + 1


def test_a_good_data_set_says_so(folder, logged):
    folder.run()
    said = logged()

    assert said[0] == ("train: 3 images, 1 without objects; 3 objects, 0 crowd regions")
    assert said[-1] == "  nothing found wrong"


def test_every_policy_that_is_no_failure_is_offered_in_the_message():
    for name in Checks.policies("repair"):
        field = Checks.model_fields[name]
        assert field.default in field.annotation.__args__, name
        assert "fail" in field.annotation.__args__, name


def test_statistics(folder):
    for level, name in enumerate("ab"):  # equal pixels, other bytes: equal files are copies
        path = folder.data / f"train/{name}.png"
        Image.new("RGB", (40, 30), (255, 0, 51)).save(path, compress_level=level)
    folder.train["images"] = [
        {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 2, "file_name": "b.png", "width": 40, "height": 30},
    ]
    folder.train["annotations"][2].update(area=1024.0, iscrowd=0)
    folder.run(checks={"duplicate_image": "drop"})

    numbers = json.loads((folder.out / "statistics.json").read_text())["train"]
    assert numbers["images"] == 2
    assert numbers["objects"] == 3
    assert numbers["classes"]["ball"] == {"objects": 2, "images": 2}
    assert numbers["objects_per_image"] == {"mean": 1.5, "maximum": 2}
    assert numbers["sizes_by_area"] == {"small": 2, "medium": 1, "large": 0}
    assert numbers["box_side_pixels"]["100%"] == pytest.approx(1200**0.5, rel=1e-4)
    assert numbers["box_width_to_height"]["0%"] == 0.75
    assert numbers["image_sizes"]["most_common"] == [{"width": 40, "height": 30, "images": 2}]
    assert numbers["pixel_mean"] == [1.0, 0.0, 0.2]
    assert numbers["pixel_std"] == [0.0, 0.0, 0.0]


def test_statistics_of_pixels_are_those_of_numpy(folder):
    folder.run()
    pixels = [np.asarray(Image.open(folder.data / f"train/{n}.jpg")).reshape(-1, 3) for n in "abc"]
    every = np.concatenate(pixels) / 255

    numbers = json.loads((folder.out / "statistics.json").read_text())["train"]
    assert numbers["pixel_mean"] == pytest.approx(every.mean(0).tolist(), rel=1e-4)
    assert numbers["pixel_std"] == pytest.approx(every.std(0).tolist(), rel=1e-4)


def test_one_thread_and_many_agree(folder, monkeypatch):
    folder.run()
    many = outputs(folder)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    folder.run()

    assert outputs(folder) == many


def test_progress_is_told(folder, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY_SECONDS", -1.0)
    folder.run()

    assert "check train: 2/3 images" in capsys.readouterr().err.splitlines()


def test_pil_does_not_warn_about_large_images(folder, monkeypatch):
    """PIL would warn at 89 megapixels and stop at 179; only our limit counts."""
    Image.new("1", (19_000, 5_000)).save(folder.data / "train/b.png")
    folder.train["images"][1].update(file_name="b.png", width=19_000, height=5_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = folder.run(checks={"unusual_mode": "fix"})

    assert report.counts == {"unusual_mode": {"fix": 1}}


@pytest.mark.parametrize("name", ["blood-cells", "coco-tiny"])
def test_shared_data_sets_pass_with_the_defaults(name, tmp_path, logged):
    root = shared_data(name).parent
    report = prepare(Data(path=name), root, tmp_path / "prepared", 50)

    assert not report.failures
    train = read_index(tmp_path / "prepared/train.safetensors")
    val = read_index(tmp_path / "prepared/val.safetensors")
    if name == "blood-cells":
        assert report.counts == {"empty_box": {"drop": 2}}
        assert [(i.image_id, i.annotation_id) for i in report.items] == [(300, 3951), (305, 4005)]
        assert [line for line in logged() if "has no area" in line] == [
            f"    {item.line}" for item in report.items
        ]
        assert (len(train), len(val)) == (291, 73)
        assert sum(len(record.labels) for record in train) == 3908
    else:
        assert report.items == []
        assert (len(train), len(val)) == (80, 80)
        assert sum(sum(record.crowd) for record in train + val) == 17
        classes = read_classes(tmp_path / "prepared/classes.json")
        assert (len(classes), classes[-1].index, classes[-1].id) == (80, 79, 90)


_MEASURE = """
import re, sys
from pathlib import Path
from runkey.data.prepare import prepare
from runkey.params import Data

def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

root = Path(sys.argv[1])
before = peak_kib()
prepare(Data(), root, root / "prepared", 20)
print(peak_kib() - before)
"""


@pytest.mark.slow
def test_memory_grows_little_with_the_data_set(folder):
    """Beside the JSON's text (8 KiB an image here), less than 12 KiB an image of 7 boxes."""
    shape = {"width": 40, "height": 30}
    images, boxes = [], []
    content = (folder.data / "train/b.jpg").read_bytes()
    for number in range(8_000):
        (folder.data / f"train/{number:06d}.jpg").write_bytes(content)
        images.append({"id": number, "file_name": f"{number:06d}.jpg", **shape})
        for k in range(7):
            entry = {"id": number * 7 + k, "image_id": number, "category_id": 1 + 6 * (k % 2)}
            polygon = [[k + v / 7 for v in range(60)]]
            boxes.append({**entry, "bbox": [k, k, 9.5, 9.5], "segmentation": polygon})
    folder.train.update(images=images, annotations=boxes)
    folder.write()

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(folder.root)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )

    text_kib = folder.path("train").stat().st_size / 1024
    assert text_kib > 7 * 8_000
    assert int(done.stdout) < text_kib + 12 * 8_000
