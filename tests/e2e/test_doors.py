"""Every way to use a model gives the AP that `evaluate` computes, on the sample's 100 val images.

    RUNKEY_SAMPLE_RUN=FOLDER make test-all ARGS="tests/e2e/test_doors.py -s"

prints a table. The folder is a checkout after `make repro`, of any data with `val/`; without it the
model has random weights, and the ground truth is what it finds best, so that any other
preprocessing lowers AP.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import runkey
from runkey.data.index import (
    ClassName,
    CocoDetection,
    ImageRecord,
    read_classes,
    read_index,
)
from runkey.data.prepare import prepare
from runkey.errors import LockError
from runkey.evaluation.coco import evaluate_results
from runkey.evaluation.detections import DetectionArrays
from runkey.evaluation.per_image import judge_images
from runkey.evaluation.thresholds import best_thresholds
from runkey.files import write_json
from runkey.hashing import sha256_file
from runkey.identity.record import Record
from runkey.inference.extras import import_extra
from runkey.inference.model import load_model_folder
from runkey.inference.try_page import TryPage, export_network, write_try_page
from runkey.model.detr import build_model
from runkey.model.weights import CardClass, ModelCard, Sizes, load_model, save_model
from runkey.params import Params, load_params
from runkey.params.render import render_preset
from runkey.pipeline.export import ExportChoice, export_model
from runkey.pipeline.validation import build_validation
from runkey.tracking.logged_model import ModelDescription, log_model, promote
from runkey.tracking.store import Store, experiment_id, free_port, locate_store, open_client
from tests.support.chromium import open_chromium
from tests.support.records import key_of, make_run, write_record
from tests.support.tried import RUNTIME, detect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

REPOSITORY = Path(__file__).parents[2]
SAMPLE = REPOSITORY / "sample-data/files/md5"
Rows = list[CocoDetection]


@dataclass
class Evaluated:
    """A workspace, a run of its model in a store, and what `evaluate` finds."""

    root: Path
    params: Params
    records: list[ImageRecord]
    classes: list[ClassName]
    found: Rows
    store: Store
    record: Record

    @property
    def images(self) -> list[Path]:
        return [self.root / self.params.data.path / record.file for record in self.records]

    def ap(self, rows: Rows) -> float:
        found = DetectionArrays.from_results(rows, self.classes)
        value = evaluate_results(self.records, self.classes, found).summary["AP"]
        assert value is not None
        return value

    def loaded(self, reference: str | Path) -> Rows:
        model = runkey.load(reference, device="cpu")
        stream = model.stream(self.images, score=0)
        pairs = zip(self.records, stream, strict=True)
        return [CocoDetection(**row) for record, one in pairs for row in one.to_coco(record.id)]

    def tabled(self, table: pd.DataFrame) -> Rows:
        ids = {one.name: one.id for one in self.classes}
        return [
            CocoDetection(
                image_id=self.records[int(row["image"])].id,
                category_id=ids[row["class"]],
                bbox=[row["x1"], row["y1"], row["x2"] - row["x1"], row["y2"] - row["y1"]],
                score=row["score"],
            )
            for row in table.to_dict("records")
        ]


def sample_data(root: Path) -> None:
    (listing,) = SAMPLE.glob("*/*.dir")
    for one in json.loads(listing.read_bytes()):
        path = root / "data" / one["relpath"]
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SAMPLE / one["md5"][:2] / one["md5"][2:], path)


def random_model(root: Path, params: Params) -> None:
    torch.manual_seed(0)
    classes = read_classes(root / "prepared/classes.json")
    sizes = Sizes(max(params.data.short_sides), params.data.long_side)
    card = ModelCard(params.model, tuple(CardClass(c.index, c.id, c.name) for c in classes), sizes)
    save_model(root / "model", build_model(params.model, len(classes)).state_dict(), card)


def with_truth(record: ImageRecord, rows: Rows, classes: list[ClassName]) -> ImageRecord:
    """The record with the best detections as its objects: against them, AP is no zero."""
    best = [row for row in rows if row["image_id"] == record.id and min(row["bbox"][2:]) > 0][:4]
    label_of = {one.id: one.index for one in classes}
    return replace(
        record,
        boxes_xywh=tuple(tuple(row["bbox"]) for row in best),
        labels=tuple(label_of[row["category_id"]] for row in best),
        areas=tuple(row["bbox"][2] * row["bbox"][3] for row in best),
        crowd=(False,) * len(best),
        annotation_ids=tuple(range(len(best))),
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluated]:
    root = tmp_path_factory.mktemp("doors") / "checkout"
    trained = os.environ.get("RUNKEY_SAMPLE_RUN")
    (root / "stages").mkdir(parents=True)
    if trained:
        shutil.copyfile(Path(trained) / "params.yaml", root / "params.yaml")
        for name in ("data", "model"):
            shutil.copytree(Path(trained) / name, root / name)
    else:
        (root / "params.yaml").write_text(render_preset("sample"))
        sample_data(root)
    params = load_params(root / "params.yaml")
    prepare(params.data, root, root / "prepared", params.model.num_queries)
    if not trained:
        random_model(root, params)
    detector, card = load_model(root / "model")
    validation = build_validation(params, card.model, root, torch.device("cpu"))
    arrays = validation(detector).detections
    rows = list(arrays.rows(validation.classes))
    records, classes = read_index(root / "prepared/val.safetensors"), validation.classes
    if not trained:
        records = [with_truth(record, rows, classes) for record in records]
    weights = root / "model/weights.safetensors"
    judged = judge_images(records, arrays)
    (root / "evaluation").mkdir()
    path = root / "evaluation/thresholds.json"
    write_json(path, best_thresholds(judged, classes, sha256_file(weights)))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
            patch.delenv(name, raising=False)
        patch.chdir(root)
        store = locate_store(root)
        record = recorded(root, store, path)
        yield Evaluated(root, params, records, classes, rows, store, record)


def recorded(root: Path, store: Store, thresholds: Path) -> Record:
    """Record the model in MLflow, and promote it."""
    client, key = open_client(store), key_of("doors")
    experiment = experiment_id(client, store, "detection")
    run_id = client.create_run(experiment, tags={"key": key}).info.run_id
    client.log_param(run_id, "key", key)
    files = {path.name: path for path in (root / "model").iterdir() if path.name != "key.json"}
    stored = {f"model/{name}": path.read_bytes() for name, path in files.items()}
    stored["evaluation/thresholds.json"] = thresholds.read_bytes()
    made = make_run(root, key, run_id, files=stored)
    record = replace(made, run=replace(made.run, experiment_id=experiment))
    write_record(store.cache, record)
    described = ModelDescription(f"detector-{record.label}", key, "", {})
    example = next((root / "data/val").iterdir())
    log_model(store, run_id, described, files | {"thresholds.json": thresholds}, example)
    promote(store, record, "production")
    return record


def environment_without_runkey(folder: Path) -> Path:
    """An environment with the packages of this one, but without runkey; return its bin folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    # Its .pth files are not read: the editable runkey there is not seen.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    uvicorn = folder / "bin/uvicorn"
    uvicorn.write_text(f'#!/bin/sh\nexec {folder}/bin/python -m uvicorn "$@"\n')
    uvicorn.chmod(0o755)
    command = [folder / "bin/python", "-P", "-c", "import runkey"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 1
    return folder / "bin"


class Served:
    """`mlflow models serve` in an empty folder, without runkey on its path."""

    def __init__(self, store: Store, folder: Path) -> None:
        programs, here = environment_without_runkey(folder / "environment"), folder / "empty"
        here.mkdir()
        self.address = f"http://127.0.0.1:{free_port()}"
        kept = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "DVC_ROOT")}
        kept |= {"MLFLOW_TRACKING_URI": store.full_uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
        kept["PATH"] = f"{programs}:{kept['PATH']}"
        command = [programs / "python", "-m", "mlflow", "models", "serve"]
        options = ["-m", "models:/detection@production", "--env-manager", "local", "--port"]
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [*command, *options, self.address.rpartition(":")[2]],
            cwd=here,
            env=kept,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self) -> None:
        end = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/ping", timeout=5).close()
                return
            except OSError:
                self.log.seek(0)
                assert self.process.poll() is None, self.log.read()
                assert time.monotonic() < end, self.log.read()
                time.sleep(0.5)

    def ask(self, images: list[bytes], **params: float) -> pd.DataFrame:
        records = [{"image": base64.b64encode(image).decode()} for image in images]
        body: dict[str, Any] = {"dataframe_records": records}
        body |= {"params": params} if params else {}
        request = urllib.request.Request(
            f"{self.address}/invocations",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return pd.DataFrame(json.load(answer)["predictions"])

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)
        self.log.close()


@pytest.fixture(scope="module")
def served(evaluated: Evaluated, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(evaluated.store, tmp_path_factory.mktemp("served"))
    try:
        server.wait()
        yield server
    finally:
        server.end()


def predicted(evaluated: Evaluated, folder: Path) -> Rows:
    """By `runkey predict`, with the image ids of the data."""
    annotations = evaluated.root / "data/annotations/instances_val.json"
    options = ["--score", "0", "--write", "results", "--coco", annotations, "--out", folder / "out"]
    command = [sys.executable, "-m", "runkey", "predict", "model", "data/val", *options]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=evaluated.root, env=environment, check=True, capture_output=True)
    rows: Rows = json.loads((folder / "out/results.json").read_text())
    return rows


def tried(evaluated: Evaluated, folder: Path) -> Rows:
    """In the page to try a model, opened from its file in Chromium."""
    card = load_model_folder(evaluated.root / "model", "cpu").card
    made = TryPage(card, export_network(evaluated.root / "model"), "sample")
    rows, times = [], []
    with open_chromium(folder) as page:
        page.open(write_try_page(made, folder / "try.html").as_uri())
        page.wait_for("Ready.")
        for record, path in zip(evaluated.records, evaluated.images, strict=True):
            found = detect(page, path.read_bytes())
            times.append(found["milliseconds"]["all"])
            for one in found["detections"]:
                left, top, right, bottom = one["box"]
                bbox, label = [left, top, right - left, bottom - top], one["label"]
                ids = {"image_id": record.id, "category_id": evaluated.classes[label].id}
                rows.append(CocoDetection(**ids, bbox=bbox, score=one["score"]))
        assert (page.errors, page.requests_elsewhere(page.requests[0])) == ([], [])
    sys.stdout.write(f"in the page: {np.median(times):.0f} ms an image\n")
    return rows


def test_every_door_has_the_ap_of_evaluate(
    evaluated: Evaluated, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    key = evaluated.record.label
    doors = {
        "evaluate": evaluated.found,
        'runkey.load("model")': evaluated.loaded("model"),
        "runkey.load(KEY)": evaluated.loaded(key),
        'runkey.load("models:/detection@production")': evaluated.loaded(
            "models:/detection@production"
        ),
        "runkey predict": predicted(evaluated, tmp_path),
    }
    contents = [path.read_bytes() for path in evaluated.images]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", evaluated.store.full_uri)
    loaded = mlflow.pyfunc.load_model("models:/detection@production")
    frame = pd.DataFrame({"image": pd.Series(contents, dtype=object)})
    frame.columns = pd.Index(["image"], dtype=object)
    table = loaded.predict(frame, params={"score": 0.0})
    doors["mlflow.pyfunc"] = evaluated.tabled(table)
    answers = []
    for start in range(0, len(contents), 25):
        part = served.ask(contents[start : start + 25], score=0.0)
        part["image"] += start
        answers.append(part)
    doors["mlflow models serve"] = evaluated.tabled(pd.concat(answers))
    try:
        import_extra("onnxruntime"), import_extra("onnx")
    except LockError:
        pass
    else:
        images = evaluated.images[:2]
        choice = ExportChoice("onnx", "fp32")
        export_model(Path("model"), tmp_path / "onnx", choice, store=None, images=images)
        doors["ONNX"] = evaluated.loaded(tmp_path / "onnx")
        if RUNTIME.is_file() and shutil.which("chromium"):
            doors["runkey report --try"] = tried(evaluated, tmp_path)
    scores = {door: evaluated.ap(rows) for door, rows in doors.items()}
    for door, ap in scores.items():
        sys.stdout.write(f"{door:45} AP {ap:.4f}, {len(doors[door]):,} detections\n")
    assert scores["evaluate"] > 0.3
    assert {round(ap, 3) for ap in scores.values()} == {round(scores["evaluate"], 3)}
    assert len({len(rows) for rows in doors.values()}) == 1


def test_the_served_model_answers_with_its_thresholds_and_clipped_boxes(
    evaluated: Evaluated, served: Served
) -> None:
    model = runkey.load("model", device="cpu")
    images = evaluated.images[:10]
    table = served.ask([path.read_bytes() for path in images])
    found = model(images)
    assert 0 < len(table) == sum(map(len, found)) < 300
    for row, one in enumerate(found):
        rows = table[table["image"] == row]
        assert rows["class"].tolist() == one.names
        assert np.allclose(rows["score"], one.scores, rtol=1e-5, atol=1e-6)
        corners = rows[["x1", "y1", "x2", "y2"]].to_numpy()
        height, width = one.image_size
        assert (corners >= 0).all()
        assert (corners <= [width, height, width, height]).all()
        assert np.allclose(corners, one.boxes_xyxy, rtol=1e-4, atol=1e-3)
    few = served.ask([images[0].read_bytes()], score=0.0, nms=0.3)
    assert len(few) < 100
