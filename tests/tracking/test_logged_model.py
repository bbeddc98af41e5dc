"""A run's model in MLflow: with signature, example and weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runkey.errors import TrackingError
from runkey.hashing import sha256_file
from runkey.inference.pyfunc import OUTPUT_COLUMNS
from runkey.model.detr import build_model
from runkey.model.weights import CardClass, ModelCard, Sizes, save_model
from runkey.params import Model
from runkey.tracking.describe import log_model
from runkey.tracking.store import Store, experiment_id, open_client
from runkey.tracking.transfer import delete_run

CLASSES = (CardClass(0, 7, "a"), CardClass(1, 3, "b"))


def test_the_model_is_recorded_once_loads_and_detects(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Model(hidden_dim=32, num_heads=2, feedforward_dim=48, num_queries=8)
    card = ModelCard(model, CLASSES, Sizes(48, 80))
    save_model(tmp_path / "model", build_model(model, 2).state_dict(), card)
    half = {"score": 0.0, "precision": 1, "recall": 1, "f1": 1}
    weights = sha256_file(tmp_path / "model" / "weights.safetensors")
    scores = {"iou": 0.5, "weights": weights, "classes": {"a": half, "b": half}}
    (tmp_path / "model" / "thresholds.json").write_text(json.dumps(scores))
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    client = open_client(store)
    run_id = client.create_run(experiment_id(client, store, "detection")).info.run_id
    client.log_artifacts(run_id, str(tmp_path / "model"), "model")

    arguments = (
        store,
        run_id,
        "detector-fast",
        tmp_path / "image.png",
        tmp_path / "model",
        {"key": "rk2-1"},
    )
    model_id = log_model(*arguments)
    assert log_model(*arguments) == model_id
    recorded = client.get_logged_model(model_id)
    assert (recorded.name, recorded.source_run_id) == ("detector-fast", run_id)
    assert recorded.tags["key"] == "rk2-1"
    kept = [path for path in (tmp_path / "mlartifacts" / "models").rglob("*") if path.is_file()]
    assert "weights.safetensors" in {path.name for path in kept}

    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    loaded = mlflow.pyfunc.load_model(f"models:/{model_id}")
    assert loaded.metadata.get_input_schema().input_names() == ["image"]
    assert loaded.metadata.get_output_schema().input_names() == list(OUTPUT_COLUMNS)
    found = loaded.predict(loaded.input_example)
    assert list(found.columns) == list(OUTPUT_COLUMNS)
    assert len(found) > 1
    assert set(found["class"]) <= {"a", "b"}
    assert found["score"].is_monotonic_decreasing

    delete_run(store, run_id)
    assert client.search_logged_models([recorded.experiment_id]) == []


def test_a_store_that_refuses_is_told_in_one_line(store: Store, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"any")
    with pytest.raises(TrackingError, match=r"db: the model is not recorded \(") as refused:
        log_model(store, "f" * 32, "detector", tmp_path / "image.png", tmp_path / "model", {})
    assert "\n" not in str(refused.value)
