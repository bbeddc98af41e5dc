"""A run's model in MLflow: complete in itself, described, registered under an alias."""

from __future__ import annotations

import ast
import base64
import json
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from runkey.errors import DataError, RegistryError, TrackingError
from runkey.hashing import sha256_file
from runkey.identity.record import LoggedRun, Record
from runkey.inference.pyfunc import OUTPUT_COLUMNS
from runkey.model.weights import ModelCard, Sizes, save_model
from runkey.params import Model
from runkey.registry.models import Promotion, promotions, registered_run
from runkey.tracking.logged_model import (
    ModelDescription,
    log_model,
    packages_of,
    promote,
    withdraw,
)
from runkey.tracking.store import Store, experiment_id, open_client
from runkey.tracking.transfer import delete_run
from tests.support.small_model import CLASSES, photograph


class Logged:
    """Runs of a store whose model is logged."""

    def __init__(self, store: Store, model: Path, folder: Path) -> None:
        self.store, self.client, self.folder = store, open_client(store), folder
        names = ("ball", "cube & more")
        low = {"score": 0.0, "precision": 1, "recall": 1, "f1": 1}
        weights = sha256_file(model / "weights.safetensors")
        thresholds = {"iou": 0.5, "weights": weights, "classes": dict.fromkeys(names, low)}
        (folder / "thresholds.json").write_text(json.dumps(thresholds))
        self.files = {path.name: path for path in sorted(model.iterdir())}
        self.files["thresholds.json"] = folder / "thresholds.json"
        self.example = folder / "image.png"
        photograph(3).save(self.example)
        self.experiment = experiment_id(self.client, store, "detection")

    def run(self, digit: str) -> Record:
        key = f"rk2-{digit * 64}"
        run = self.client.create_run(self.experiment, tags={"key": key}, run_name=digit)
        self.client.log_param(run.info.run_id, "key", key)
        info = {**dict(run.info), "run_name": digit}
        return Record(run=LoggedRun.from_mlflow(info, {"key": key}, {}, {}), details=None)

    def log(self, record: Record, ap: float = 0.5) -> str:
        name = f"detector-fast-{record.label}"
        described = ModelDescription(name, record.key, f"**AP {ap}**", {"eval/AP": ap})
        return log_model(self.store, record.run.run_id, described, self.files, self.example)


def imported_packages(folder: Path) -> set[str]:
    """The packages that the code in a folder imports, at its top or in a function.

    Of a package that is not installed the name of the import stands for it.
    """
    names = set[str]()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {one.name.split(".")[0] for one in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    providers = packages_distributions()
    return {
        re.sub("_", "-", providers.get(name, [name])[0].lower())
        for name in names - set(sys.stdlib_module_names) - {"runkey"}
    }


@pytest.fixture
def logged(store: Store, small_model_folder: Path, tmp_path: Path) -> Logged:
    return Logged(store, small_model_folder, tmp_path)


@pytest.mark.parametrize("backbone", ["lite0", "timm:convnext_atto"])
def test_a_model_requires_timm_if_its_body_is_of_timm(tmp_path: Path, backbone: str) -> None:
    card = ModelCard(Model(backbone=backbone), CLASSES, Sizes(48, 80))
    save_model(tmp_path, {}, card)
    required = packages_of(tmp_path / "model.json")
    assert "torch" in required
    assert ("timm" in required) == backbone.startswith("timm:")


@pytest.mark.parametrize("step", [0, 3])
def test_the_metrics_of_a_model_double_no_point_of_its_run(logged: Logged, step: int) -> None:
    """MLflow writes a metric that names a model into the run too."""
    record = logged.run("a")
    run_id = record.run.run_id
    logged.client.log_metric(run_id, "eval/AP", 0.5, 1_700_000_000_000, step)
    logged.log(record)
    logged.log(record)
    points = logged.client.get_metric_history(run_id, "eval/AP")
    assert [(one.value, one.timestamp, one.step) for one in points] == [
        (0.5, 1_700_000_000_000, step)
    ]
    logged.client.log_metric(run_id, "eval/AP", 0.6, 1_700_000_000_001, step + 1)
    model_id = logged.log(record, 0.6)
    points = logged.client.get_metric_history(run_id, "eval/AP")
    assert sorted(one.value for one in points) == [0.5, 0.6]
    shown = logged.client.get_logged_model(model_id).metrics
    assert {one.key: one.value for one in shown} == {"eval/AP": 0.6}


def test_the_model_is_complete_and_has_signature_example_metrics_and_description(
    logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = logged.run("a")
    model_id = logged.log(record)
    assert logged.log(record) == model_id
    recorded = logged.client.get_logged_model(model_id)
    assert recorded.name == "detector-fast-rk2-aaaaaaaaaaaa"
    assert recorded.source_run_id == record.run.run_id
    assert recorded.tags["key"] == record.key
    assert recorded.tags["mlflow.note.content"] == "**AP 0.5**"
    assert {one.key: one.value for one in recorded.metrics} == {"eval/AP": 0.5}
    artifacts = Path(recorded.artifact_location.removeprefix("file://"))
    data = {path.name for path in (artifacts / "data/data").iterdir()}
    assert data == {"model.json", "weights.safetensors", "thresholds.json", "run.json"}
    code = {path.relative_to(artifacts).as_posix() for path in (artifacts / "code").rglob("*.py")}
    assert "code/runkey/inference/pyfunc.py" in code
    assert not any(part in str(code) for part in ("runkey/api.py", "/tracking/", "/registry/"))
    required = re.findall(
        r"^([\w.-]+)==", (artifacts / "requirements.txt").read_text(), re.MULTILINE
    )
    # timm is imported for its own networks alone.
    imported = imported_packages(artifacts / "code")
    assert imported - {name.lower() for name in required} == {"timm"}

    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", logged.store.uri)
    loaded = mlflow.pyfunc.load_model(f"models:/{model_id}")
    assert loaded.metadata.get_input_schema().input_names() == ["image"]
    assert loaded.metadata.get_output_schema().input_names() == list(OUTPUT_COLUMNS)
    found = loaded.predict(loaded.input_example)
    assert list(found.columns) == list(OUTPUT_COLUMNS)
    assert len(found) == 24
    assert set(found["class"]) <= {"ball", "cube & more"}
    assert found["score"].is_monotonic_decreasing
    corners = found[["x1", "y1", "x2", "y2"]].to_numpy()
    assert (corners >= 0).all()
    assert (corners <= [80, 60, 80, 60]).all()

    content = logged.example.read_bytes()
    columns = pd.Index(["image"], dtype=object)
    text = pd.DataFrame([[base64.b64encode(content).decode()]], columns=columns)
    assert np.array_equal(loaded.predict(text)["score"], found["score"])
    least = float(found["score"].median())
    some = loaded.predict(loaded.input_example, params={"score": least})
    assert 0 < len(some) < 24
    for wrong in ({"score": 1.5}, {"score": -0.5}, {"nms": -1.0}, {"nms": 2.0}):
        ((name, value),) = wrong.items()
        with pytest.raises(DataError, match=f"{name} {value:g}: "):
            loaded.predict(loaded.input_example, params=wrong)


def test_another_evaluation_gives_another_model_only_if_its_files_differ(logged: Logged) -> None:
    record = logged.run("a")
    first = logged.log(record)
    assert logged.log(record, ap=0.6) == first
    recorded = logged.client.get_logged_model(first)
    assert recorded.tags["mlflow.note.content"] == "**AP 0.6**"
    text = logged.files["thresholds.json"].read_text()
    logged.files["thresholds.json"].write_text(text.replace("0.0", "0.25"))
    second = logged.log(record)
    assert second != first
    assert promote(logged.store, record, "production").version == "1"
    (version,) = logged.client.search_model_versions("name = 'detection'")
    assert version.source == logged.client.get_logged_model(second).artifact_location


@pytest.mark.parametrize("cut_off", ["log_model_artifacts", "log_outputs"])
def test_a_model_that_a_kill_cut_off_is_completed(
    logged: Logged, monkeypatch: pytest.MonkeyPatch, cut_off: str
) -> None:
    from mlflow import MlflowClient

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    record = logged.run("a")
    with monkeypatch.context() as during:
        during.setattr(MlflowClient, cut_off, kill)
        with pytest.raises(KeyboardInterrupt):
            logged.log(record)
    model_id = logged.log(record)
    (only,) = logged.client.search_logged_models([logged.experiment])
    assert (only.model_id, only.status) == (model_id, "READY")
    outputs = logged.client.get_run(record.run.run_id).outputs
    assert outputs
    assert [one.model_id for one in outputs.model_outputs] == [model_id]
    assert logged.client.list_logged_model_artifacts(model_id)


def test_promoting_moves_the_alias_and_says_from_where(logged: Logged) -> None:
    one, two = logged.run("a"), logged.run("b")
    logged.log(one)
    model_id = logged.log(two)
    first = promote(logged.store, one, "production")
    assert (first.name, first.version, first.before) == ("detection", "1", None)
    assert promote(logged.store, one, "production") == first
    second = promote(logged.store, two, "production")
    assert (second.version, second.before) == ("2", ("1", one.run.run_id))
    assert promote(logged.store, one, "staging").version == "1"
    uri = logged.store.full_uri
    assert promotions(uri) == [
        Promotion("detection", "production", two.run.run_id),
        Promotion("detection", "staging", one.run.run_id),
    ]
    for reference, record in (
        ("models:/detection@production", two),
        ("models:/detection/1", one),
        (f"models:/{model_id}", two),
    ):
        assert registered_run(uri, reference) == record.run.run_id
    with pytest.raises(RegistryError, match="models:/detection/3: no model of a run"):
        registered_run(uri, "models:/detection/3")
    with pytest.raises(TrackingError, match=r"detection@production is of run .*nothing is removed"):
        withdraw(logged.store, one, "production")
    withdraw(logged.store, two, "production")
    assert [str(found) for found in promotions(uri)] == ["detection@staging"]

    delete_run(logged.store, one.run.run_id)
    names = {model.name for model in logged.client.search_logged_models([logged.experiment])}
    assert names == {f"detector-fast-{two.label}"}
    versions = logged.client.search_model_versions("name = 'detection'")
    assert [one.version for one in versions] in (["2"], [2])


def test_a_run_that_was_not_evaluated_is_refused(logged: Logged) -> None:
    record = logged.run("a")
    with pytest.raises(TrackingError, match=r"has no model in MLflow, .*`dvc repro -f evaluate`"):
        promote(logged.store, record, "production")
    assert logged.client.search_registered_models() == []


def test_a_store_that_refuses_is_told_in_one_line(logged: Logged) -> None:
    described = ModelDescription("detector", "rk2-1", "", {})
    with pytest.raises(TrackingError, match=r"db: the model is not recorded \(") as refused:
        log_model(logged.store, "f" * 32, described, logged.files, logged.example)
    assert not re.search("\n", str(refused.value))
