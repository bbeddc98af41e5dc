"""The gate of `runkey export-model`: what differs from the model is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from runkey.cli import app
from runkey.errors import DataError, ModelError
from runkey.hashing import sha256_bytes
from runkey.inference.extras import import_extra
from runkey.inference.module import EXPORTED, InferenceModule
from runkey.inference.networks import TorchNetwork, read_export_card
from runkey.model.weights import load_model
from runkey.pipeline import export
from runkey.pipeline.export import ExportChoice, export_model
from runkey.pipeline.run_images import Pixels, Sample
from runkey.tracking.store import Store
from tests.support.exportable import save_images, save_small_model, write_best_scores
from tests.support.records import key_of, make_run

REPOSITORY = Path(__file__).parents[2]
INSTALLED = any(REPOSITORY.glob(".venv-export/lib/python3*/site-packages"))
pytestmark = pytest.mark.skipif(not INSTALLED, reason="`make env-export` installs ONNX Runtime")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_small_model(tmp_path_factory.mktemp("run") / "model")
    write_best_scores(folder, ball=0.25)
    return folder


def change_weights(file: Path, by: float) -> None:
    """Multiply the largest weight matrix of an ONNX file."""
    onnx = import_extra("onnx")
    proto = onnx.load(str(file))
    (largest, *_) = sorted(proto.graph.initializer, key=lambda one: -len(one.raw_data))
    values = onnx.numpy_helper.to_array(largest)
    largest.raw_data = (values * np.float32(by)).tobytes()
    onnx.save(proto, str(file))


def test_an_export_passes_and_says_what_was_compared(model, tmp_path):
    images = save_images(tmp_path / "images")
    done = export_model(model, tmp_path / "out", ExportChoice(), store=None, images=images)
    assert done.parity.passed
    assert done.folder == tmp_path / "out"
    assert done.parity.compared == "4 given images"
    assert 0 <= done.parity.score_difference <= 1e-5
    parity = json.loads((done.folder / "parity.json").read_text())
    assert parity["passed"] is True
    assert parity["ap"] is None
    assert parity["limits"]["score_difference"] == 1e-5
    card = json.loads((done.folder / "card.json").read_text())
    assert card["thresholds"] == {"ball": 0.25}
    assert card["classes"][1] == {"index": 1, "id": 9, "name": "cube"}
    assert card["environment"]["onnxruntime"]
    assert done.recorded == "not recorded: the run is not known"
    with pytest.raises(ModelError, match="out: is there already; name a new folder with --out"):
        export_model(model, tmp_path / "out", ExportChoice(), store=None, images=images)


def test_what_killed_exports_to_the_folder_left_is_removed(model, tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = f".out-{gone.pid}-a1_bcdef"
    others = [f".out-{os.getpid()}-a1_bcdef", f".out-2-{gone.pid}-a1_bcdef", ".out-mine"]
    for name in (left, *others):
        (tmp_path / name / "0").mkdir(parents=True)
    images = save_images(tmp_path / "images")
    export_model(model, tmp_path / "out", ExportChoice(), store=None, images=images)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"images", "out", *others}


@pytest.mark.parametrize("by", [1.001, float("nan")])
def test_a_weight_that_was_changed_after_the_export_is_refused(model, tmp_path, monkeypatch, by):
    write = export.write_export

    def broken(detector, card, folder, **options):
        write(detector, card, folder, **options)
        change_weights(folder / card["file"], by)

    monkeypatch.setattr(export, "write_export", broken)
    words = ["export-model", str(model), "--out", str(tmp_path / "out")]
    words += ["--images", str(save_images(tmp_path / "images")[0].parent)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 3, done.output
    assert "refused: scores differ by " in done.output
    assert not (tmp_path / "out").exists()
    refused = json.loads((tmp_path / "out.refused/parity.json").read_text())
    assert refused["passed"] is False
    monkeypatch.undo()
    assert CliRunner().invoke(app, words).exit_code == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["images", "out", "out.refused"], "nothing else is left"


def test_without_ground_truth_boxes_are_compared(model, tmp_path, monkeypatch):
    images = save_images(tmp_path / "images")
    opened = export.open_export

    class Shifted:
        def __init__(self, network, offset):
            self.network, self.offset = network, offset

        def __call__(self, pixels):
            scores, labels, boxes = self.network(pixels)
            return scores, labels, boxes + np.float32(self.offset)

    for number, offset in enumerate((0.05, float("nan"))):
        monkeypatch.setattr(
            export,
            "open_export",
            lambda folder, by=offset: replace(
                opened(folder), network=Shifted(opened(folder).network, by)
            ),
        )
        out = tmp_path / f"out{number}"
        done = export_model(model, out, ExportChoice(), store=None, images=images)
        assert done.parity.faults == ("0% of the boxes are equal, at least 90%",)
        assert done.folder == tmp_path / f"out{number}.refused"


def test_a_damaged_key_file_is_no_run(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    for text in ("[]", "{}", '{"key": "rk2-1"}', '{"key": "rk2-1", "preimages": []}'):
        (folder / "key.json").write_text(text)
        with pytest.raises(DataError, match="which run made the model is not known"):
            export_model(folder, tmp_path / "o", ExportChoice(), store=None, root=tmp_path)


def sample_of(model_answers, count: int = 20) -> Sample:
    """Images whose truth is what the model finds best, so that its AP is high."""
    from runkey.data.index import ClassName, ImageRecord

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (1, 3, 48, 64), dtype=np.uint8) for _ in range(count)]
    records = []
    for number, image in enumerate(images):
        _, labels, boxes = model_answers(image)
        left, top, right, bottom = (boxes[0, 0] * [64, 48, 64, 48]).tolist()
        box = (left, top, right - left, bottom - top)
        records.append(
            ImageRecord(number, f"{number}.png", 64, 48, 0, False, (box,), (int(labels[0, 0]),),
                        (box[2] * box[3],), (False,), (number,))
        )  # fmt: skip
    pixels = [Pixels(image, (number,), ((48, 64),)) for number, image in enumerate(images)]
    classes = [ClassName(0, 4, "ball"), ClassName(1, 9, "cube")]
    return Sample("20 made images", count, lambda: iter(pixels), records, classes)


def test_ap_lost_decides_on_int8(model, tmp_path, monkeypatch):
    """With the calibration that was drawn, then without, then not at all."""
    sample = sample_of(TorchNetwork(InferenceModule(load_model(model)[0])))
    given = [pixels.images[0] for pixels in sample.batches()][:4]
    object.__setattr__(sample, "calibration", lambda: given)
    monkeypatch.setattr(export, "find_sample", lambda *arguments: sample)
    choice = ExportChoice(precision="int8", max_ap_loss=100)
    done = export_model(model, tmp_path / "loose", choice, store=None)
    assert done.parity.passed
    assert done.parity.ap_model > 0.5
    assert json.loads((done.folder / "parity.json").read_text())["calibration_images"] == 4
    lost = done.parity.ap_lost
    assert lost == pytest.approx(100 * (done.parity.ap_model - done.parity.ap))
    strict = ExportChoice(precision="int8", max_ap_loss=lost - 0.01)
    write, tried = export.write_export, []

    def counted(*arguments, **options):
        tried.append(len(options["calibration"]))
        write(*arguments, **options)

    monkeypatch.setattr(export, "write_export", counted)
    done = export_model(model, tmp_path / "strict", strict, store=None)
    assert tried == [4, 0]
    never = ExportChoice(precision="int8", max_ap_loss=-200)
    done = export_model(model, tmp_path / "never", never, store=None)
    assert done.folder == tmp_path / "never.refused"
    assert done.parity.faults[0].startswith("loses ")


def test_a_model_without_some_layers_gets_thresholds_of_its_own(model, tmp_path, monkeypatch):
    detector, _ = load_model(model)
    cut = replace(EXPORTED, proposals_only=True)
    sample = sample_of(TorchNetwork(InferenceModule(detector, cut)))
    monkeypatch.setattr(export, "find_sample", lambda *arguments: sample)
    whole = export_model(model, tmp_path / "whole", ExportChoice(max_ap_loss=100), store=None)
    assert whole.card["thresholds"] == {"ball": 0.25}
    done = export_model(
        model, tmp_path / "cut", ExportChoice(options=cut, max_ap_loss=100), store=None
    )
    assert done.parity.passed
    best = [
        (int(labels[0, 0]), float(scores[0, 0]))
        for scores, labels, _ in map(
            TorchNetwork(InferenceModule(detector, cut)),
            (pixels.images for pixels in sample.batches()),
        )
    ]
    name = ("ball", "cube")[best[0][0]]
    assert 0 < done.card["thresholds"][name] <= max(score for _, score in best)
    assert done.card["thresholds"] != {"ball": 0.25}


def test_without_ground_truth_only_fp32_can_be_judged(model, tmp_path):
    images = save_images(tmp_path / "images")
    with pytest.raises(DataError, match="onnx-int8: AP lost cannot be measured on 4 given images"):
        export_model(
            model, tmp_path / "o", ExportChoice(precision="int8"), store=None, images=images
        )


def test_without_images_the_reason_and_the_way_out_are_said(model, tmp_path):
    with pytest.raises(DataError) as caught:
        export_model(model, tmp_path / "o", ExportChoice(), store=None, root=tmp_path)
    assert str(caught.value) == (
        "no val images of the run to compare on: which run made the model is not known (no"
        " key.json beside it); or name some by --images"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_card_names_the_run_that_it_was_started_from(model, tmp_path):
    parent = make_run(tmp_path, key_of("parent"), files={"model/weights.safetensors": b"start"})
    child = shutil.copytree(model, tmp_path / "model")
    weights = sha256_bytes(b"start")
    preimages = {"params": {"model.init_from": f"sha256:{weights}", "seed": 0}, "data": {}}
    recipe = {"key": key_of("child"), "parts": {}, "preimages": preimages}
    (child / "key.json").write_text(json.dumps(recipe))
    store = Store(f"sqlite:///{tmp_path / 'mlflow.db'}", None, tmp_path / ".runkey")
    images = save_images(tmp_path / "images")
    for one, key in ((store, parent.key), (None, None)):
        done = export_model(child, tmp_path / f"{key}", ExportChoice(), store=one, images=images)
        card = json.loads((done.folder / "card.json").read_text())
        expected = {"param": "model.init_from", "weights": weights, "key": key}
        assert card["started_from"] == expected


def test_the_card_carries_the_licence_of_published_weights(model, tmp_path):
    child = shutil.copytree(model, tmp_path / "model")
    pretrained = {"name": "resnet18", "file": "r.pth", "sha256": "0" * 64, "licence": "MIT"}
    card = json.loads((child / "model.json").read_text())
    (child / "model.json").write_text(json.dumps(card | {"pretrained": pretrained}))
    images = save_images(tmp_path / "images")
    done = export_model(child, tmp_path / "out", ExportChoice(), store=None, images=images)
    assert json.loads((done.folder / "card.json").read_text())["pretrained"] == pretrained
    assert read_export_card(done.folder / "card.json")["pretrained"] == pretrained
