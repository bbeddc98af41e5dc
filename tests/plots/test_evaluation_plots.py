"""The pictures of an evaluation: of a good model, of one that sees nothing, of many classes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runkey.data.index import (
    ClassName,
    CocoDetection,
    ImageRecord,
    write_classes,
    write_index,
)
from runkey.errors import DataError
from runkey.evaluation.coco import evaluate_results
from runkey.evaluation.detections import DetectionArrays
from runkey.evaluation.files import (
    read_output,
    write_metrics,
    write_precision_recall,
    write_results,
)
from runkey.evaluation.intervals import bootstrap
from runkey.plots.evaluation import (
    ap_by_size,
    confusion_matrix,
    precision_recall,
    write_evaluation_plots,
    write_precision_recall_table,
)
from tests.support.figures import figure_of, labels_of

MOST_BYTES = 150_000
# Mathematics for matplotlib, long, without letters in the font, from right to left.
NAMES = (
    "US$5_{ and $10^",
    "$\\frac$",
    "白血球🔬",
    "",
    "a name that is far too long for a tag " * 3,
)
NAMES += ("Blutkörperchen", "שלום", "a\u202fb\u200cc")
PICTURES = ["precision_recall.png", "confusion.png", "ap_by_size.png", "calibration.png"]


def found(records: list[ImageRecord], classes: list[ClassName], kind: str) -> list[CocoDetection]:
    """Detections of a model that is good, has seen one epoch, or sees nothing."""
    rng = np.random.default_rng(0)
    results: list[CocoDetection] = []
    for record in records if kind != "nothing" else []:
        for box, label in zip(record.boxes_xywh, record.labels, strict=True):
            good = kind == "good"
            category = classes[label if good else int(rng.integers(len(classes)))].id
            left, top, width, height = box
            shift = float(rng.uniform(0, 0.1 if good else 0.8)) * width
            results.append(
                CocoDetection(
                    image_id=record.id,
                    category_id=category,
                    bbox=[left + shift, top, width, height],
                    score=float(rng.uniform(0.5, 1) if good else rng.uniform(0, 0.2)),
                )
            )
    return results


def evaluated(tmp_path, records, classes, results) -> tuple[Path, Path]:
    """The files that `prepare` and `evaluate` write."""
    prepared, evaluation = tmp_path / "prepared", tmp_path / "evaluation"
    prepared.mkdir()
    write_index(prepared / "val.safetensors", records)
    write_classes(prepared / "classes.json", classes)
    arrays = DetectionArrays.from_results(results, classes)
    result = evaluate_results(records, classes, arrays)
    write_metrics(evaluation / "metrics.json", result, bootstrap(result.matches, result.recalls))
    write_precision_recall(evaluation / "precision_recall.json", result)
    write_results(evaluation / "predictions.json", arrays, classes)
    return prepared, evaluation


@pytest.mark.parametrize(
    ("kind", "count", "boxes"),
    [("good", 2, 3), ("one epoch", 90, 5), ("nothing", 2, 3), ("nothing", 8, 0), ("good", 8, 5)],
)
def test_every_evaluation_gives_every_picture(image_set, tmp_path, kind, count, boxes):
    names = tuple(f"{NAMES[k % len(NAMES)]}{k}" if k > 7 else NAMES[k] for k in range(count))
    records, classes, folder = image_set([(300, 200), (64, 48), (150, 400)] * 3, names, boxes)
    files = evaluated(tmp_path, records, classes, found(records, classes, kind))
    out = tmp_path / "out"
    written = write_evaluation_plots(*files, folder, out, images=0)
    assert [path.name for path in written] == PICTURES
    for path in written:
        assert 1_000 < path.stat().st_size < MOST_BYTES
        with Image.open(path) as picture:
            assert picture.width == 900
            assert picture.height < 1_100
            assert len(picture.convert("RGB").getcolors(100_000)) > 2  # something is drawn


def test_detections_on_test_are_drawn_above_the_threshold_of_val(image_set, tmp_path):
    """On test the best threshold would show all detections of score 0.3, on val it is 0.9."""
    records, classes, folder = image_set([(64, 48)] * 3)

    def detections(score):
        return [
            CocoDetection(image_id=r.id, category_id=classes[k].id, bbox=list(box), score=score)
            for r in records
            for box, k in zip(r.boxes_xywh, r.labels, strict=True)
        ]

    prepared, evaluation = evaluated(tmp_path, records, classes, detections(0.3))
    write_index(prepared / "test.safetensors", records)
    better = DetectionArrays.from_results(detections(0.9), classes)
    write_results(evaluation / "val/predictions.json", better, classes)
    metrics = evaluation / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"split": "val"', '"split": "test"'))
    write_evaluation_plots(prepared, evaluation, folder, tmp_path, images=0)
    with (tmp_path / "confusion.csv").open(newline="") as file:
        assert {row["detected"] for row in csv.DictReader(file)} == {"(missed)"}


def test_the_table_of_confusion_has_a_row_for_each_object(image_set, tmp_path):
    records, classes, folder = image_set([(64, 48)] * 3)
    files = evaluated(tmp_path, records, classes, found(records, classes, "good"))
    write_evaluation_plots(*files, folder, tmp_path, images=0)
    with (tmp_path / "confusion.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {one.name for one in classes}
    assert {row["truth"] for row in rows} <= names | {"(background)"}
    assert {row["detected"] for row in rows} <= names | {"(missed)"}
    objects = sum(record.crowd.count(False) for record in records)
    assert len([row for row in rows if row["truth"] in names]) == objects


def test_what_is_missing_is_named(image_set, tmp_path):
    records, classes, folder = image_set([(64, 48)] * 3)
    prepared, evaluation = evaluated(tmp_path, records, classes, found(records, classes, "good"))
    written = write_evaluation_plots(prepared, evaluation, folder, tmp_path / "out", images=2)
    assert [p.name for p in written] == [*PICTURES, "best.jpg", "worst.jpg"]
    assert all(p.is_file() for p in written)
    for name in ("metrics", "precision_recall", "predictions"):
        file = evaluation / f"{name}.json"
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(DataError, match=rf"{name}\.json: not found; run `dvc repro evaluate`"):
            write_evaluation_plots(prepared, evaluation, folder, tmp_path / "out")
        file.write_bytes(content)


def test_of_many_classes_the_most_confused_are_shown(tmp_path):
    def drawn(counts, names):
        """Names on the axis of the truth, and counts by row and column."""
        (axes,) = figure_of(confusion_matrix, counts, names, 0.5, folder=tmp_path).axes
        cells = {text.get_position()[::-1]: int(text.get_text()) for text in axes.texts}
        return [label.get_text() for label in axes.get_yticklabels()], cells

    counts = 9 * np.eye(31, dtype=np.int64)
    counts[-1, -1] = 0
    counts[7, 3] = 4  # class 7 is taken for class 3
    counts[29, -1] = 2
    names = [f"class {k}" for k in range(30)]
    shown, cells = drawn(counts, names)
    assert len(shown) == 21
    assert sum(cells.values()) == counts.sum()
    assert {"class 3", "class 7", "class 29"} <= set(shown)
    assert shown[-2:] == ["other classes", "background"]
    assert cells[shown.index("class 7"), shown.index("class 3")] == 4
    assert cells[shown.index("class 29"), 20] == 2
    shown, cells = drawn(counts[:5, :5], names[:4])
    assert shown == [*names[:4], "background"]
    assert cells == {(k, k): 9 for k in range(5)}


def curves_json(path, count, *, objects=True):
    recall = [round(r / 100, 2) for r in range(101)]
    classes = [
        {
            "name": NAMES[k % len(NAMES)],
            "objects": 5 * objects,
            "ap": 0.5 if objects else None,
            "precision": [[max(0.0, 1 - r * (t + 1) / 10) for r in recall] for t in range(10)]
            if objects
            else None,
        }
        for k in range(count)
    ]
    ious = [round(0.5 + t / 20, 2) for t in range(10)]
    path.write_text(json.dumps({"iou": ious, "recall": recall, "classes": classes}))
    return path


@pytest.mark.parametrize(("count", "objects"), [(1, True), (8, True), (90, True), (3, False)])
def test_precision_recall(tmp_path, count, objects):
    curves = read_output(curves_json(tmp_path / "pr.json", count, objects=objects))
    path = precision_recall(curves, tmp_path / "out" / "pr.png")
    assert path.stat().st_size < MOST_BYTES
    table = write_precision_recall_table(curves, tmp_path / "pr.csv").read_text().splitlines()
    assert len(table) == 1 + 21 * count * objects


DRAW = """
import sys, numpy, pathlib
from runkey.plots.evaluation import confusion_matrix
confusion_matrix(numpy.eye(3, dtype=int), ["ball", "$x_{"], 0.5, pathlib.Path(sys.argv[1]))
"""


def test_settings_of_a_user_or_a_notebook_change_no_byte(tmp_path):
    """Colab's terminal has MPLBACKEND=module://..., which ends matplotlib's import elsewhere."""
    confusion_matrix(np.eye(3, dtype=int), ["ball", "$x_{"], 0.5, tmp_path / "here.svg")
    settings = "text.usetex: True\nsvg.fonttype: none\nlines.linewidth: 9\nfont.family: Fänzy\n"
    (tmp_path / "here").mkdir()
    (tmp_path / "matplotlibrc").write_bytes(settings.encode("latin-1"))
    variables = {"MPLBACKEND": "module://not_here", "MATPLOTLIBRC": str(tmp_path)}
    environment = os.environ | variables | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", DRAW, "../there.svg"]
    subprocess.run(command, cwd=tmp_path / "here", env=environment, check=True)

    assert (tmp_path / "there.svg").read_bytes() == (tmp_path / "here.svg").read_bytes()


def test_ap_is_drawn_with_its_interval_where_there_is_one(tmp_path):
    def of(ap, **ends):
        return {"AP": ap, "AP50": ap, "AR": ap, "objects": 5, "by_size": {}} | ends

    classes = {"of before": of(0.4), "kite": of(0.6, AP_low=0.3, AP_high=0.8)}
    stored = {"AP": 0.5, "AP_low": 0.45, "AP_high": 0.56, "per_class": classes}
    left, right = figure_of(ap_by_size, stored, folder=tmp_path).axes
    assert labels_of(left, "95%") == ["95%"]
    (bars,) = right.containers[-1:]
    ((start, end),) = bars.lines[2][0].get_segments()
    assert (*start, *end) == pytest.approx((0.3, 1, 0.8, 1))  # in the row of the second class
    older = {"AP": 0.5, "per_class": {"of before": of(0.4)}}
    left, right = figure_of(ap_by_size, older, folder=tmp_path).axes
    assert labels_of(left, "95%") == labels_of(right, "all") == []
