"""Initial weights and saved models.  Files are real, and a download really fails."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from runkey import params
from runkey.errors import ModelError
from runkey.model.detr import build_model
from runkey.model.weights import (
    CARD,
    NUM_COCO_IDS,
    OLD_WEIGHTS,
    WEIGHTS,
    CardClass,
    ModelCard,
    Sizes,
    coco_names,
    load_initial_weights,
    load_model,
    read_source,
    save_model,
)
from tests.support.shared import shared_data

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_dim": 16, "num_heads": 2, "feedforward_dim": 24, "num_queries": 10}


def card(model, *names):
    classes = tuple(CardClass(index, 10 + index, name) for index, name in enumerate(names))
    return ModelCard(model, classes, Sizes(120, 160))


def model_params(**changes):
    return params.Model.model_validate(SMALL | changes)


def saved(folder, names, **changes):
    """A model of ours on disk; its state."""
    model = model_params(**changes)
    state = build_model(model, len(names)).state_dict()
    save_model(folder, state, card(model, *names))
    return state


def test_a_saved_model_comes_back_whole(tmp_path):
    model = model_params(denoising={"groups": 2})
    net = build_model(model, 2).to(memory_format=torch.channels_last)
    save_model(tmp_path, net.state_dict(), card(model, "a", "ü"))
    found, read = load_model(tmp_path)
    assert not found.training
    assert read.model == model
    assert [(c.index, c.id, c.name) for c in read.classes] == [(0, 10, "a"), (1, 11, "ü")]
    assert (read.sizes.short_side, read.sizes.long_side) == (120, 160)
    for name, value in net.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_the_same_model_is_the_same_bytes(tmp_path):
    model = model_params()
    state = build_model(model, 2).state_dict()
    other = {
        n: v.to(memory_format=torch.channels_last) if v.dim() == 4 else v for n, v in state.items()
    }
    for folder, values in (("a", state), ("b", other)):
        save_model(tmp_path / folder, values, card(model, "x", "y"))
    for file in (WEIGHTS, CARD):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_random_weights_are_reported_as_new():
    net = build_model(model_params(), 2)
    report = load_initial_weights(net, model_params(), ["a", "b"])
    assert (report.loaded, report.dropped, report.warnings) == ((), (), ())
    assert set(report.new) == set(net.state_dict())
    assert report.lines()[0] == "initial weights: random weights"


def test_heads_are_carried_over_by_class_name(tmp_path):
    theirs = saved(tmp_path / "old", ["cat", "Dog", "cow"], denoising={"groups": 1})
    model = model_params(init_from="old", denoising={"groups": 1}, num_queries=12)
    net = build_model(model, 3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = load_initial_weights(net, model, ["horse", "dog ", "cat"], tmp_path)
    ours = net.state_dict()
    heads = ["class_embed.weight", "class_embed.bias", "proposal_head.class_embed.weight"]
    for head in [*heads, "denoiser.label_embed.weight"]:
        assert torch.equal(ours[head][0], before[head][0]), head
        assert torch.equal(ours[head][1], theirs[head][1]), head
        assert torch.equal(ours[head][2], theirs[head][0]), head
    assert torch.equal(ours["query_content.weight"][:10], theirs["query_content.weight"])
    assert torch.equal(ours["query_content.weight"][10:], before["query_content.weight"][10:])
    for name in ("bbox_embed.layers.2.weight", "backbone.0.body.conv1.weight"):
        assert torch.equal(ours[name], theirs[name])
    assert "class_embed.weight (2 of 3 classes; new: horse; 1 of its 3 dropped)" in report.loaded
    assert "query_content.weight (queries 1 to 10 of 12)" in report.loaded
    assert (report.new, report.dropped) == ((), ())


def test_heads_without_class_names_start_anew(tmp_path):
    state = saved(tmp_path / "old", ["cat", "dog"])
    torch.save({"model": state}, tmp_path / "bare.pth")
    model = model_params(init_from="bare.pth")
    net = build_model(model, 2)
    before = net.class_embed.weight.clone()
    report = load_initial_weights(net, model, ["cat", "dog"], tmp_path)
    assert torch.equal(net.class_embed.weight, before)
    assert "class_embed.weight: it does not say its classes" in report.dropped
    assert "class_embed.weight" in report.new


def test_the_references_coco_rows_are_found_by_id(tmp_path):
    """Its checkpoint of 91 ids and no-object, with its command line inside."""
    model = model_params(preset="detr", backbone="resnet18")
    theirs = build_model(model, NUM_COCO_IDS).state_dict()
    checkpoint = {"model": theirs, "epoch": 3, "args": Namespace(lr=1e-4, masks=False)}
    torch.save(checkpoint, tmp_path / "detr.pth")
    ours = build_model(model, 3)
    start = model_params(preset="detr", backbone="resnet18", init_from="detr.pth")
    report = load_initial_weights(ours, start, ["zebra", "unicorn", "person"], tmp_path)
    rows, old = ours.class_embed.weight, theirs["class_embed.weight"]
    assert torch.equal(rows[0], old[24])
    assert torch.equal(rows[2], old[1])
    assert torch.equal(rows[3], old[91])
    assert not torch.equal(rows[1], old[2])
    note = "class_embed.weight (2 of 3 classes and no-object; new: unicorn; 78 of its 80 dropped)"
    assert note in report.loaded
    assert any(note in line for line in report.lines())


def test_coco_names_are_those_of_its_files():
    names = coco_names()
    assert len([name for name in names if name]) == 80
    for number, name in {1: "person", 13: "stop sign", 27: "backpack", 90: "toothbrush"}.items():
        assert names[number] == name
    file = next((shared_data("coco-tiny") / "annotations").glob("instances*.json"))
    for entry in json.loads(file.read_text())["categories"]:
        assert names[entry["id"]] == entry["name"]


def test_another_preset_gives_its_backbone_and_encoder_only(tmp_path):
    theirs = saved(tmp_path / "old", ["a"], preset="detr")
    model = model_params(init_from="old")
    net = build_model(model, 1)
    report = load_initial_weights(net, model, ["a"], tmp_path)
    name = "transformer.encoder.layers.0.linear1.weight"
    assert torch.equal(net.state_dict()[name], theirs[name])
    assert {n.split(".")[0] for n in report.loaded} == {"backbone", "transformer"}
    assert "bbox_embed.layers.0.weight: preset detr computes something else with it" in (
        report.dropped
    )


def test_a_backbone_file_of_torchvision_loads(tmp_path):
    theirs = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(theirs, tmp_path / "r18.pth")
    model = model_params(backbone="resnet18", backbone_weights="r18.pth", norm="frozen")
    net = build_model(model, 2)
    report = load_initial_weights(net, model, ["a", "b"], tmp_path)
    for name, value in net.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(value, theirs[name.removeprefix("backbone.0.body.")]), name
    assert all(name.startswith("backbone.") for name in report.loaded)
    assert not any(name.startswith("backbone.") for name in report.new)
    assert report.dropped == ("fc.weight: not of the body", "fc.bias: not of the body")
    assert (report.renamed, report.warnings) == ((), ())


def test_a_detectors_backbone_serves_as_backbone_weights(tmp_path):
    theirs = saved(tmp_path / "old", ["a"])
    model = model_params(backbone_weights="old", hidden_dim=32)
    net = build_model(model, 1)
    report = load_initial_weights(net, model, ["a"], tmp_path)
    name = "backbone.0.body.conv1.weight"
    assert torch.equal(net.state_dict()[name], theirs[name])
    assert all(n.startswith("backbone.") for n in report.loaded)


def wrong_files(folder):
    (folder / "text.pt").write_text("hello")
    (folder / "page.pt").write_text("<html>404</html>")
    torch.save({"model": torch.nn.Linear(1, 1)}, folder / "code.pt")
    torch.save({"model": {"weight": 3}}, folder / "number.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"model": {"weight": torch.ones(2)}}, folder / "stranger.pt")
    whole = (folder / "stranger.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("absent.pt", "not found"),
        ("text.pt", "safe to load (torch.save has not written it, or it holds more than tensors);"),
        ("page.pt", "safe to load (torch.save has not written it, or it holds more than tensors);"),
        ("code.pt", "safe to load (torch.save has not written it, or it holds more than tensors);"),
        ("cut.pt", "no weights file that is safe to load"),
        ("number.pt", "'weight' is no tensor"),
        ("list.pt", "holds no state dict"),
        ("stranger.pt", "none of its 1 tensor fits this model"),
    ],
)
@pytest.mark.parametrize("field", ["init_from", "backbone_weights"])
def test_files_that_are_no_weights_are_refused(field, file, text, tmp_path):
    wrong_files(tmp_path)
    model = model_params(**{field: file})
    with pytest.raises(ModelError) as caught:
        load_initial_weights(build_model(model, 2), model, ["a", "b"], tmp_path)
    assert str(tmp_path / file) in str(caught.value)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"norm": "frozen"}, "model.norm: frozen without pretrained weights"),
        ({"frozen_stages": 2}, "model.frozen_stages: 2 without pretrained weights"),
    ],
)
def test_quietly_bad_settings_are_warned_of(changes, start):
    model = model_params(backbone="resnet18", **changes)
    report = load_initial_weights(build_model(model, 1), model, ["a"])
    assert [w.startswith(start) for w in report.warnings] == [True]
    assert report.lines()[-1].startswith(f"  warning: {start}")


def damage_card(folder):
    (folder / CARD).write_text("{")


def damage_format(folder):
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {"format": 99}))


def damage_weights(folder):
    (folder / WEIGHTS).write_bytes(b"PK")


def swap_weights(folder):
    save_file({"x": torch.ones(1)}, folder / WEIGHTS)


def damage_header(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:8] + b"[" + data[9:])


def cut_short(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


@pytest.mark.parametrize(
    ("damage", "file", "text"),
    [
        (lambda f: (f / CARD).unlink(), CARD, "not found; run `dvc repro train` first"),
        (lambda f: (f / WEIGHTS).unlink(), WEIGHTS, "not found; run `dvc repro train` first"),
        (damage_card, CARD, "no model card"),
        (damage_format, CARD, "format 99, this program reads 1"),
        (damage_weights, WEIGHTS, "damaged"),
        (damage_header, WEIGHTS, "damaged"),
        (cut_short, WEIGHTS, "damaged"),
        (swap_weights, WEIGHTS, "does not fit model.json"),
    ],
)
def test_damaged_models_are_refused(damage, file, text, tmp_path):
    saved(tmp_path, ["a"])
    damage(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / file))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


class Attack:
    def __reduce__(self):
        return (open, ("attacked", "w"))


def as_saved_by_0_1(folder, content=None):
    """Turn a saved model into what runkey 0.1 wrote."""
    state = load_file(folder / WEIGHTS)
    torch.save({"model": state} if content is None else content, folder / OLD_WEIGHTS)
    (folder / WEIGHTS).unlink()
    return state


def test_a_model_of_runkey_0_1_loads(tmp_path):
    saved(tmp_path, ["a", "b"])
    state = as_saved_by_0_1(tmp_path)
    model, card = load_model(tmp_path)
    assert [one.name for one in card.classes] == ["a", "b"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert read_source(tmp_path).class_names == ["a", "b"]


def test_an_older_file_that_would_run_code_is_refused_unrun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, ["a"])
    as_saved_by_0_1(tmp_path, {"model": Attack()})
    with pytest.raises(ModelError, match="damaged"):
        load_model(tmp_path)
    assert not (tmp_path / "attacked").exists()
