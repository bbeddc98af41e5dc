"""Predicting on folders of images, and each kind of file that comes of it, as its tool reads it."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from runkey.data.prepare import prepare
from runkey.errors import DataError, ModelError
from runkey.files import WriteError
from runkey.inference import writers
from runkey.inference.model import Model, load_model_folder
from runkey.inference.options import DEFAULT_KINDS, Options, parse_score
from runkey.inference.predict import Summary, predict
from runkey.inference.sources import find_sources
from runkey.inference.tile import Tiling
from runkey.params import Checks, Data
from tests.support.small_model import film, has_av, photograph

SIZES = ((80, 60), (90, 40), (80, 60), (60, 80), (160, 120), (80, 60), (300, 200))


@pytest.fixture(scope="module")
def model(small_model_folder: Path) -> Model:
    return load_model_folder(small_model_folder, device="cpu")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        name = f"below/{number}.png" if number == 3 else f"{number}.png"
        photograph(number, *size).save(folder / name)
    return folder


def run(model: Model, images: Path, *kinds: str, out: str = "out", **options: Any) -> Summary:
    folder = images.parent / out
    chosen = Options(**({"score": 0.0, "kinds": kinds, "workers": 1} | options))
    return predict(model, find_sources([str(images)], out=folder), folder, chosen)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def best(model: Model, images: Path, count: int = 3) -> float:
    """A score that some detections of each image reach."""
    found = model([str(path) for path in sorted(images.rglob("*.png"))], score=0)
    return min(float(one.scores[count - 1]) for one in found)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_list_holds_what_the_model_answers(model: Model, images: Path, batch_size: int) -> None:
    summary = run(model, images, "json", batch_size=batch_size)
    coco = read(images.parent / "out/predictions.json")
    assert [one["file_name"] for one in coco["images"]] == [
        *("0.png", "1.png", "2.png", "4.png", "5.png", "6.png"),
        "below/3.png",
    ]
    assert coco["categories"] == [{"id": 4, "name": "ball"}, {"id": 9, "name": "cube & more"}]
    assert [row["id"] for row in coco["annotations"]] == list(range(1, 7 * 24 + 1))
    assert summary.images == 7
    assert summary.objects.total() == 7 * 24
    for entry in coco["images"]:
        alone = model(images / entry["file_name"], score=0)
        assert (entry["height"], entry["width"]) == alone.image_size
        rows = [row for row in coco["annotations"] if row["image_id"] == entry["id"]]
        scores = np.array([row["score"] for row in rows])
        assert np.allclose(scores, alone.scores, atol=1e-5)
        wanted = {(row["category_id"], *np.round(row["bbox"], 1)) for row in rows}
        same = {
            (row["category_id"], *np.round(row["bbox"], 1)) for row in alone.to_coco(entry["id"])
        }
        assert len(wanted & same) >= 22  # but for rounding


def test_the_list_is_a_data_set_for_prepare(model: Model, images: Path) -> None:
    run(model, images, "json", score=best(model, images))
    root = images.parent / "project"
    (root / "data/annotations").mkdir(parents=True)
    images.rename(root / "data/images")
    (images.parent / "out/predictions.json").rename(root / "data/annotations/instances_all.json")
    checks = Checks(duplicate_object="drop")
    prepare(Data(checks=checks, val_fraction=0.3, max_bad_fraction=1.0), root, root / "p", 100)
    report = read(root / "p/report.json")
    assert report


def test_thresholds_are_those_of_the_model_a_number_or_by_class(model: Model, images: Path) -> None:
    high = best(model, images)
    run(model, images, "json", score=high)
    rows = read(images.parent / "out/predictions.json")["annotations"]
    assert rows
    assert min(row["score"] for row in rows) >= np.float32(high)
    run(model, images, "json", out="cubes", score={"cube & more": high, "ball": 1.0})
    cubes = read(images.parent / "cubes/predictions.json")["annotations"]
    assert {row["category_id"] for row in cubes} == {9}
    assert len(cubes) == sum(row["category_id"] == 9 for row in rows)
    with pytest.raises(ModelError, match="no class 'car'"):
        run(model, images, "json", out="cars", score={"car": 0.5})
    assert not (images.parent / "cars").exists()


def test_scores_as_they_are_typed() -> None:
    assert parse_score(" auto") == "auto"
    assert parse_score("0.25") == 0.25
    assert parse_score("ball=0.5, cube=1") == {"ball": 0.5, "cube": 1.0}
    for text in ("", "1.5", "nan", "-0.1", "ball=", "ball=2", "a,b"):
        with pytest.raises(DataError, match="a number from 0 to 1"):
            parse_score(text)


def test_suppression_leaves_no_two_boxes_of_a_class_on_each_other(
    model: Model, images: Path
) -> None:
    def network(batch: Any) -> Any:
        """Answer with larger boxes, which overlap."""
        scores, labels, boxes = model.network(batch)
        return scores, labels, (boxes + np.float32([-0.2, -0.2, 0.2, 0.2])).clip(0, 1)

    run(Model(model.card, network), images, "json", nms=0.3)
    coco = read(images.parent / "out/predictions.json")
    for entry in coco["images"]:
        rows = [row for row in coco["annotations"] if row["image_id"] == entry["id"]]
        for number, one in enumerate(rows):
            for other in rows[:number]:
                if one["category_id"] == other["category_id"]:
                    assert overlap(one["bbox"], other["bbox"]) <= 0.3 + 1e-4
    assert 0 < len(coco["annotations"]) < 7 * 24


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    sides = [
        max(0.0, min(one[k] + one[k + 2], other[k] + other[k + 2]) - max(one[k], other[k]))
        for k in (0, 1)
    ]
    shared = sides[0] * sides[1]
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


def test_tiles_find_more_in_large_images_and_the_same_in_small_ones(
    model: Model, images: Path
) -> None:
    run(model, images, "json", out="whole")
    run(model, images, "json", out="tiled", tiling=Tiling(100, 75, 0.2))
    counts = []
    for out in ("whole", "tiled"):
        coco = read(images.parent / out / "predictions.json")
        rows = [row["image_id"] for row in coco["annotations"]]
        counts.append({one["file_name"]: rows.count(one["id"]) for one in coco["images"]})
        sizes = {one["id"]: (one["width"], one["height"]) for one in coco["images"]}
        for row in coco["annotations"]:
            left, top, width, height = row["bbox"]
            assert min(row["bbox"]) >= 0
            assert left + width <= sizes[row["image_id"]][0] + 1e-3
            assert top + height <= sizes[row["image_id"]][1] + 1e-3
    whole, tiled = counts
    assert tiled["0.png"] == whole["0.png"]
    assert tiled["6.png"] > 2 * whole["6.png"]


def test_results_have_the_ids_of_a_coco_file(
    model: Model, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = images.parent / "val.json"
    entries = [{"id": 70, "file_name": "val/0.png"}, {"id": 30, "file_name": "below/3.png"}]
    path.write_text(json.dumps({"images": [*entries, {"id": 5, "file_name": "gone.png"}]}))
    run(model, images, "results", "json", coco=path)
    rows = read(images.parent / "out/results.json")
    assert {row["image_id"] for row in rows} == {70, 30}
    assert len(rows) == 48
    assert set(rows[0]) == {"image_id", "category_id", "bbox", "score"}
    ids = {
        one["file_name"]: one["id"]
        for one in read(images.parent / "out/predictions.json")["images"]
    }
    assert (ids["0.png"], ids["below/3.png"]) == (70, 30)
    assert len(set(ids.values())) == 7
    assert "val.json: lacks 5 images of the sources" in caplog.text
    assert "val.json: has 1 image more, without predictions" in caplog.text
    path.write_text(json.dumps({"images": [{"id": 5, "file_name": "gone.png"}]}))
    with pytest.raises(DataError, match="names none of the images"):
        run(model, images, "results", coco=path)
    with pytest.raises(DataError, match="needs --coco FILE"):
        run(model, images, "results")


def test_a_row_for_each_detection(model: Model, images: Path) -> None:
    run(model, images, "csv", "json")
    with (images.parent / "out/predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    annotations = read(images.parent / "out/predictions.json")["annotations"]
    assert len(rows) == len(annotations)
    for row, one in zip(rows, annotations, strict=True):
        left, top, width, height = one["bbox"]
        sides = [float(row[name]) for name in ("x1", "y1", "x2", "y2")]
        assert np.allclose(sides, [left, top, left + width, top + height], atol=0.01)
        assert float(row["score"]) == pytest.approx(one["score"], abs=1e-4)
        assert row["class"] == {4: "ball", 9: "cube & more"}[one["category_id"]]


def test_labels_for_labelme_and_cvat(model: Model, images: Path) -> None:
    run(model, images, "labelme", "cvat", "json", score=best(model, images))
    out = images.parent / "out"
    coco = read(out / "predictions.json")
    names = {4: "ball", 9: "cube & more"}
    tree = ElementTree.parse(out / "cvat.xml").getroot()
    assert tree.findtext("version") == "1.1"
    assert [one.text for one in tree.iterfind("meta/task/labels/label/name")] == [*names.values()]
    shown = tree.findall("image")
    assert len(shown) == len(coco["images"]) == 7
    for entry, node in zip(coco["images"], shown, strict=True):
        assert node.get("name") == entry["file_name"]
        rows = [row for row in coco["annotations"] if row["image_id"] == entry["id"]]
        boxes = node.findall("box")
        path = (out / "labelme" / entry["file_name"]).with_suffix(".json")
        label = read(path)
        assert (path.parent / label["imagePath"]).resolve() == images / entry["file_name"]
        assert (label["imageWidth"], label["imageHeight"]) == (entry["width"], entry["height"])
        for row, box, shape in zip(rows, boxes, label["shapes"], strict=True):
            left, top, width, height = row["bbox"]
            corners = [left, top, left + width, top + height]
            assert box.get("label") == shape["label"] == names[row["category_id"]]
            sides = [float(box.get(side, "")) for side in ("xtl", "ytl", "xbr", "ybr")]
            assert np.allclose(sides, corners, atol=0.01)
            assert np.allclose(np.ravel(shape["points"]), corners, atol=0.01)


def test_drawn_images_and_the_sheet(model: Model, images: Path) -> None:
    summary = run(model, images, *DEFAULT_KINDS, score=best(model, images))
    out = images.parent / "out"
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.jpg")) == [
        *(f"images/{n}.jpg" for n in (0, 1, 2, 4, 5, 6)),
        "images/below/3.jpg",
        "sheet.jpg",
    ]
    with Image.open(out / "images/0.jpg") as drawn:
        assert drawn.size == (640, 480)
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    blue = np.abs(pixels - [0, 0x72, 0xB2]).max(axis=2) < 40
    orange = np.abs(pixels - [0xE6, 0x9F, 0]).max(axis=2) < 40
    assert blue.sum() + orange.sum() > 500
    with Image.open(out / "sheet.jpg") as sheet:
        assert sheet.width == 1100
    assert (out / "sheet.jpg").stat().st_size <= 150_000
    assert summary.kinds == DEFAULT_KINDS


def test_bad_files_are_skipped_and_listed(model: Model, images: Path) -> None:
    (images / "1.png").write_bytes(b"no image")
    (images / "7.png").write_bytes((images / "6.png").read_bytes()[:500])
    summary = run(model, images, "json")
    assert summary.images == 6
    assert [one.name for one in summary.skipped] == ["1.png", "7.png"]
    with (images.parent / "out/skipped.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["file", "1.png", "7.png"]
    assert "known format" in rows[1][1]
    mark = read(images.parent / "out/predict.json")
    assert (mark["images"], mark["skipped"], mark["finished"]) == (6, 2, True)


def test_the_folder_is_new_or_of_an_earlier_run(model: Model, images: Path) -> None:
    out = images.parent / "out"
    out.mkdir()
    assert not run(model, images, "json").was_there
    (out / "labels").mkdir()
    (out / "labels/mine.txt").write_text("mine")
    (out / ".predictions.json.99-abc").write_text("[")
    assert run(model, images, "csv").was_there
    assert (out / "labels/mine.txt").read_text() == "mine"
    assert not (out / ".predictions.json.99-abc").exists()
    (out / "predict.json").unlink()
    with pytest.raises(DataError, match=r"out: holds labels, which `runkey predict` has not"):
        run(model, images, "csv")
    with pytest.raises(DataError, match="not a folder"):
        run(model, images, "csv", out="images/0.png")


def test_a_link_in_the_place_of_an_output_is_not_followed(model: Model, images: Path) -> None:
    precious = images.parent / "precious.txt"
    precious.write_text("precious")
    run(model, images, "yolo", "csv", "images")
    for name in ("yolo/labels/0.txt", "predictions.csv", "images/0.jpg"):
        path = images.parent / "out" / name
        path.unlink()
        path.symlink_to(precious)
    run(model, images, "yolo", "csv", "images")
    assert precious.read_text() == "precious"


class Interrupting:
    """The model's network, which asks the process to stop at its n-th batch."""

    def __init__(self, network: Any, at: int, error: BaseException | None = None) -> None:
        self.network, self.at, self.error, self.calls = network, at, error, 0

    def __call__(self, images: Any) -> Any:
        self.calls += 1
        if self.calls == self.at and self.error:
            raise self.error
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return self.network(images)


def test_an_interrupt_keeps_what_was_written(model: Model, images: Path) -> None:
    stopping = Model(model.card, Interrupting(model.network, 4))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(
            stopping, images, "json", "csv", "cvat", "images", batch_size=1, tiling=Tiling(400, 400)
        )
    assert signal.getsignal(signal.SIGINT) is before
    out = images.parent / "out"
    coco = read(out / "predictions.json")
    assert [one["file_name"] for one in coco["images"]] == ["0.png", "1.png", "2.png"]
    assert len(coco["annotations"]) == 72
    assert len(ElementTree.parse(out / "cvat.xml").getroot().findall("image")) == 3
    assert len(list((out / "images").iterdir())) == 3
    assert read(out / "predict.json")["finished"] is False
    assert not list(out.glob(".*"))


def test_a_full_disk_leaves_no_half_list(model: Model, images: Path) -> None:
    run(model, images, "json", score=1.0)
    before = (images.parent / "out/predictions.json").read_bytes()
    full = WriteError(Path("x"), OSError(28, "No space left on device"))
    stopping = Model(model.card, Interrupting(model.network, 3, full))
    with pytest.raises(WriteError):
        run(stopping, images, "json", "csv", batch_size=1, tiling=Tiling(400, 400))
    assert (images.parent / "out/predictions.json").read_bytes() == before
    assert not (images.parent / "out/predictions.csv").exists()


def test_a_model_that_gives_nan_is_named(model: Model, images: Path) -> None:
    def network(batch: Any) -> Any:
        scores, labels, boxes = model.network(batch)
        return scores, labels, boxes * np.nan

    with pytest.raises(ModelError, match=r"0\.png: the model predicts NaN"):
        run(Model(model.card, network), images, "json")


def test_kinds_and_numbers_that_are_none() -> None:
    with pytest.raises(DataError, match="--write xml: not one of json, results, csv"):
        Options(kinds=("json", "xml"))
    with pytest.raises(DataError, match="--nms 0: an IoU above 0"):
        Options(nms=0.0)


def test_nothing_to_predict_on(model: Model, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images and no videos"):
        run(model, tmp_path / "empty", "json")


def test_files_of_one_name_but_for_the_suffix_get_labels_of_their_own(
    model: Model, images: Path
) -> None:
    photograph(9).save(images / "0.jpg")
    run(model, images, "yolo", "voc", "images")
    out = images.parent / "out"
    for folder, suffix in (("yolo/labels", "txt"), ("voc", "xml"), ("images", "jpg")):
        found = {path.name for path in (out / folder).iterdir()}
        assert {f"0.jpg.{suffix}", f"0.png.{suffix}", f"1.{suffix}"} <= found


def test_the_sheet_shows_images_of_the_whole_run(tmp_path: Path, model: Model) -> None:
    """Memory is bounded: of a thousand images fewer than fifty wait, from the first to the last."""
    detections = replace(model(photograph(0), score=0.0), image=None)
    about = writers.About(model.card.classes, tmp_path, 1000)
    with writers.Outputs(tmp_path, ["sheet"], about) as outputs:
        (sheet,) = outputs.writers
        for number in range(1000):
            picture = Image.new("RGB", (80, 60), (number % 256, 0, 0))
            outputs.add(writers.Prediction(str(number), str(number), "", detections, picture))
            assert len(sheet._kept) < 48
        kept = [number for number, _ in sheet._kept]
        assert kept[0] == 0
        assert kept[-1] > 950
        assert len(kept) >= 24


@pytest.mark.skipif(not has_av(), reason="`make env-export` installs PyAV")
def test_labels_of_a_video_have_its_frames_beside_them(model: Model, images: Path) -> None:
    film(images / "clip.mp4")
    summary = run(model, images, "json", "csv", "yolo", "labelme", every=5)
    out = images.parent / "out"
    names = ["clip_frame_000000", "clip_frame_000005"]
    assert summary.images == 9
    assert sorted(path.stem for path in (out / "frames").iterdir()) == names
    assert {f"{name}.txt" for name in names} <= {p.name for p in (out / "yolo/labels").iterdir()}
    label = read(out / f"labelme/{names[1]}.json")
    with Image.open(out / "labelme" / label["imagePath"]) as frame:
        assert frame.size == (64, 48) == (label["imageWidth"], label["imageHeight"])
    entry = next(
        one
        for one in read(out / "predictions.json")["images"]
        if one["file_name"] == f"{names[1]}.jpg"
    )
    assert (entry["video"], entry["frame"], entry["seconds"]) == ("clip.mp4", 5, 1.0)
    with (out / "predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["file"] == "clip.mp4"]
    assert {(row["frame"], row["seconds"]) for row in rows} == {("0", "0.0"), ("5", "1.0")}
