"""`runkey speed`: measured, written beside the model, and taken by `runkey export-model`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from runkey.cli import app
from runkey.errors import ModelError
from runkey.files import WriteError
from runkey.inference.module import InferenceModule
from runkey.inference.networks import TorchNetwork
from runkey.inference.speed import AS_EVALUATED, FRONTIER_PNG, SPEED_JSON, find_report, write_report
from runkey.model.weights import load_model
from runkey.pipeline import export, speed
from tests.pipeline.test_export import sample_of
from tests.support.exportable import save_small_model
from tests.support.mlflow_store import fill

REPOSITORY = Path(__file__).parents[2]
INSTALLED = any(REPOSITORY.glob(".venv-export/lib/python3*/site-packages"))
needs_runtimes = pytest.mark.skipif(not INSTALLED, reason="`make env-export` installs runtimes")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model with a key, and val images with boxes that it finds."""
    folder = save_small_model(tmp_path / "model")
    (folder / "key.json").write_text(
        json.dumps({"key": "rk2-" + "ab" * 32, "preimages": {"params": {}}})
    )
    sample = sample_of(TorchNetwork(InferenceModule(load_model(folder)[0])))
    images = [pixels.images[0] for pixels in sample.batches()][:4]
    sample = replace(sample, calibration=lambda: images)
    monkeypatch.setattr(speed, "find_sample", lambda *arguments, **options: sample)
    monkeypatch.setattr(export, "find_sample", lambda *arguments, **options: sample)
    monkeypatch.chdir(tmp_path)
    return folder


def run(*words: str):
    return CliRunner().invoke(app, list(words))


@needs_runtimes
def test_the_choice_that_speed_found_is_exported(model, tmp_path):
    done = run("speed", str(model), "--seconds", "0", "--max-ap-loss", "100")
    assert done.exit_code == 0, done.output
    assert "openvino bf16" in done.output
    assert "proposals only" in done.output
    assert "fastest that loses at most 100 points: " in done.output
    report = find_report(model)
    assert report.key == "rk2-" + "ab" * 32
    assert report.images == 20
    assert not report.left_out
    assert report.base.ap > 0.5
    names = [one.choice.name for one in report.measured]
    assert len(names) == len(set(names)) == 10 + 4
    with Image.open(tmp_path / FRONTIER_PNG) as picture:
        assert picture.width == 900
    exported = run("export-model", str(model), "--max-ap-loss", "100")
    assert exported.exit_code == 0, exported.output
    best = report.pick(100, exported=True).choice
    assert exported.output.startswith(f"{best.name}: the fastest of `runkey speed`")
    card = json.loads((tmp_path / f"{best.runtime}-{best.precision}" / "card.json").read_text())
    assert card["options"].get("proposals_only", False) is best.options.proposals_only
    refused = run("export-model", str(model), "--max-ap-loss", "0", "--out", "other")
    assert refused.exit_code in (0, 1)  # a choice that loses nothing need not be there


def test_without_the_runtimes_torch_alone_is_measured(model, tmp_path, monkeypatch):
    def missing(name):
        raise speed.LockError(f"{name} is not installed; run `make env-export`")

    monkeypatch.setattr(speed, "import_extra", missing)
    done = run("speed", str(model), "--seconds", "0", "--json")
    assert done.exit_code == 0, done.output
    report = find_report(model)
    assert {one.choice.runtime for one in report.measured} == {"torch"}
    assert "make env-export" in report.left_out["onnx"]
    assert "make env-export" in report.left_out["openvino"]
    assert run("export-model", str(model), "--max-ap-loss", "1").exit_code == 1


def test_one_line_says_what_is_wrong(model, tmp_path):
    done = run("export-model", str(model), "--max-ap-loss", "1")
    assert isinstance(done.exception, ModelError)
    assert "speed.json: not found; `runkey speed KEY` writes it" in str(done.exception)
    done = run("speed", str(model), "--runtimes", "torch,tflite")
    assert "--runtimes: 'tflite'; runtimes are torch, compiled" in str(done.exception)
    (model / "key.json").unlink()
    done = run("speed", str(model))
    assert "no key.json, which names the run" in str(done.exception)


def test_what_does_not_run_is_left_out(model, monkeypatch):
    def broken(self, choice):
        if choice == AS_EVALUATED:
            return TorchNetwork(InferenceModule(self._detector))
        raise RuntimeError("no such kernel\non this processor")

    monkeypatch.setattr(speed.NetworkOpener, "open", broken)
    options = speed.SpeedOptions(seconds=0, runtimes=("torch",))
    report = speed.measure_speed(model, None, options, "cpu")
    assert [one.choice for one in report.measured] == [AS_EVALUATED]
    assert report.left_out["torch fp32, last heads"] == (
        "RuntimeError: no such kernel on this processor"
    )


def test_a_report_of_other_weights_is_not_taken(model, tmp_path):
    options = speed.SpeedOptions(seconds=0, runtimes=("torch",))
    report = speed.measure_speed(model, None, options, "cpu")
    write_report(tmp_path / SPEED_JSON, replace(report, weights="0" * 64))
    with pytest.raises(ModelError, match="of other weights"):
        speed.fastest_export(model, 1.0)


@pytest.mark.parametrize(("free", "written"), [(0, set()), (12288, {"speed.json"})])
def test_on_a_full_disk_a_file_is_whole_or_not_there(model, tmp_path, small_disk, free, written):
    (tmp_path / "speed").symlink_to(small_disk)
    filler = fill(small_disk)
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - free)
    done = run("speed", str(model), "--runtimes", "torch", "--seconds", "0")
    assert isinstance(done.exception, WriteError)
    line = str(done.exception)
    assert "No space left on device" in line
    assert "\n" not in line
    assert {path.name for path in small_disk.iterdir()} == {"filler"} | written
    if written:
        assert find_report(model).images == 20
