"""Initial weights are got and tried before anything runs; training loads what was checked."""

from __future__ import annotations

import pytest
import torch

from runkey.errors import ModelError, RegistryError
from runkey.model.detr import build_model
from runkey.model.weights import CardClass, ModelCard, Sizes, load_initial_weights, save_model
from runkey.params import parse_params
from runkey.pipeline.initial_weights import check_initial_weights
from tests.support.records import key_of, make_run

KEY = key_of("start")
SMALL = {"hidden_dim": 24, "num_heads": 2, "feedforward_dim": 16}
NAMES = ["cat", "dog"]


def params(value, **model):
    return parse_params({"lr": 1e-3, "seed": 0, "model": SMALL | {"init_from": value} | model})


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A store with a run that has a real model."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    model = params(None).model
    card = ModelCard(model, tuple(CardClass(i, i, n) for i, n in enumerate(NAMES)), Sizes(48, 64))
    save_model(tmp_path / "saved", build_model(model, 2).state_dict(), card)
    files = {f"model/{file.name}": file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    make_run(tmp_path, KEY, files=files)
    return tmp_path


def weights(checkout, value):
    model = params(value).model
    detector = build_model(model, 2)
    load_initial_weights(detector, model, NAMES, checkout)
    return detector.state_dict()


def test_a_run_a_folder_and_a_file_give_the_same_weights(checkout):
    check_initial_weights(params(KEY[:12]), checkout)
    expected = weights(checkout, "saved/weights.safetensors")
    for value in (KEY[:12], KEY, "saved"):
        found = weights(checkout, value)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), value


def test_a_run_whose_file_was_changed_is_refused(checkout):
    (file,) = (checkout / "mlartifacts").rglob("weights.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(RegistryError, match=r"weights.safetensors: not what run .* recorded"):
        check_initial_weights(params(KEY), checkout)
    assert not list((checkout / ".runkey/initial").rglob("weights.*"))


def test_a_copy_that_was_damaged_is_got_again(checkout):
    check_initial_weights(params(KEY), checkout)
    (copy,) = (checkout / ".runkey/initial").rglob("weights.safetensors")
    copy.write_bytes(b"")
    check_initial_weights(params(KEY), checkout)
    assert copy.stat().st_size > 1000


@pytest.mark.parametrize("value", [KEY, "saved"])
def test_weights_of_another_architecture_are_refused(checkout, value):
    other = params(value, preset="detr", hidden_dim=32, backbone="resnet18")
    with pytest.raises(ModelError, match=r"only 1 of its \d+ tensors fits this model"):
        check_initial_weights(other, checkout)


def test_what_is_no_weights_file_is_refused(checkout):
    (checkout / "text.pt").write_text("hello")
    with pytest.raises(ModelError, match=r"text.pt: no weights file that is safe to load"):
        check_initial_weights(params("text.pt"), checkout)
