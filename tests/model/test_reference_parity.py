"""Preset detr against the reference implementation: names, outputs, losses, gradients.

Without the reference, a golden file made by it (`RUNKEY_WRITE_GOLDEN=1` renews it) stands in.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from runkey.model.criterion import build_criterion
from runkey.model.detr import build_model
from runkey.model.matcher import Outputs
from runkey.model.postprocess import build_postprocess

GOLDEN = Path(__file__).parent / "golden_detr.json"
TOLERANCE = 1e-9
K = 91
# torchvision calls the reference's way of asking for no weights outdated.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchvision")


@pytest.fixture
def scene(formula):
    """Images of two sizes padded to one, and unequal numbers of boxes."""
    images = formula.images(2, 96, 128)
    padding = torch.zeros(2, 96, 128, dtype=torch.bool)
    padding[1, 70:] = True
    padding[1, :, 100:] = True
    images = images.masked_fill(padding[:, None], 0.0)
    return images, padding, formula.targets((5, 2), K)


def as_dicts(targets):
    boxes, labels = (x.split(targets.counts) for x in (targets.boxes_cxcywh, targets.labels))
    return [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]


def run_ours(model_params, formula, scene):
    images, padding, targets = scene
    net = build_model(model_params, K).double()
    formula.fill(net)
    criterion = build_criterion(model_params, K)
    outputs = net(images, padding, targets)
    normaliser = criterion.normaliser(targets.counts)
    losses = criterion(outputs, targets, normaliser)
    losses.total.backward()
    layers = [
        criterion(
            Outputs(outputs.logits[i : i + 1], outputs.boxes_cxcywh[i : i + 1]), targets, normaliser
        ).parts
        for i in range(len(outputs.logits))
    ]
    return net, outputs, losses, layers


def run_reference(reference, built, formula, scene):
    images, padding, targets = scene
    net, criterion = built
    net, criterion = net.double().train(), criterion.double()
    # The reference rounds this weight to float32, which would show at 1e-8.
    criterion.empty_weight[-1] = criterion.eos_coef
    formula.fill(net)
    outputs = net(reference.misc.NestedTensor(images, padding))
    losses = criterion(outputs, as_dicts(targets))
    total = sum(losses[name] * weight for name, weight in criterion.weight_dict.items())
    total.backward()
    layers = [*outputs["aux_outputs"], outputs]
    logits = torch.stack([layer["pred_logits"] for layer in layers])
    boxes = torch.stack([layer["pred_boxes"] for layer in layers])
    return net, Outputs(logits, boxes), losses, total


def layer_names(num_layers):
    """The reference's suffix of each layer's losses."""
    return [*(f"_{i}" for i in range(num_layers - 1)), ""]


@pytest.mark.parametrize(
    ("backbone", "dilation"),
    [
        ("resnet18", False),
        ("resnet34", False),
        ("resnet50", False),
        ("resnet50", True),
        ("resnet101", False),
        ("resnet101", True),
    ],
)
def test_state_dict_has_the_references_names(backbone, dilation, detr_params, reference):
    model = detr_params(backbone=backbone, dilation=dilation)
    with torch.device("meta"):  # names and shapes, without the seconds that random weights take
        theirs, ours = reference.build(model)[0], build_model(model, K)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    trained = {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == trained


def test_state_dict_loads_with_its_values(detr_params, reference):
    theirs, ours = reference.build(detr_params())[0], build_model(detr_params(), K)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_live_norms_load_the_references_state_dict_too(detr_params, reference):
    model = detr_params(norm="live", frozen_stages=0)
    build_model(model, K).load_state_dict(reference.build(model)[0].state_dict(), strict=True)


@pytest.mark.parametrize(
    ("backbone", "dilation"), [("resnet18", False), ("resnet50", False), ("resnet50", True)]
)
def test_outputs_losses_and_gradients_are_the_references(
    backbone, dilation, detr_params, reference, formula, scene
):
    model = detr_params(backbone=backbone, dilation=dilation)
    net, outputs, losses, layers = run_ours(model, formula, scene)
    built = reference.build(model)
    their_net, theirs, their_losses, their_total = run_reference(reference, built, formula, scene)

    torch.testing.assert_close(outputs.logits, theirs.logits, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(outputs.boxes_cxcywh, theirs.boxes_cxcywh, rtol=0, atol=TOLERANCE)
    assert losses.total.item() == pytest.approx(their_total.item(), rel=TOLERANCE)
    names = {"classification": ("loss_ce", 1), "l1": ("loss_bbox", 5), "giou": ("loss_giou", 2)}
    for parts, suffix in zip(layers, layer_names(len(layers)), strict=True):
        for ours, (name, weight) in names.items():
            expected = their_losses[name + suffix].item() * weight
            assert parts[ours].item() == pytest.approx(expected, rel=TOLERANCE), name + suffix
    gradients = {name: p.grad for name, p in their_net.named_parameters()}
    for name, parameter in net.named_parameters():
        expected = gradients[name]
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None:
            scale = expected.abs().max().item()
            worst = (parameter.grad - expected).abs().max().item()
            assert worst <= TOLERANCE * scale + 1e-15, f"{name}: {worst} of {scale}"


def test_detections_are_the_references(detr_params, reference, formula, scene):
    model = detr_params()
    built = reference.build(model)
    outputs = run_reference(reference, built, formula, scene)[1]
    sizes = torch.tensor([[480, 640], [333, 500]])
    last = {"pred_logits": outputs.logits[-1], "pred_boxes": outputs.boxes_cxcywh[-1]}
    theirs = reference.detr.PostProcess()(last, sizes)
    for ours, expected in zip(build_postprocess(model)(outputs, sizes), theirs, strict=True):
        order = expected["scores"].sort(descending=True, stable=True).indices
        torch.testing.assert_close(ours.scores, expected["scores"][order])
        assert torch.equal(ours.labels, expected["labels"][order])
        torch.testing.assert_close(ours.boxes_xyxy, expected["boxes"][order])


def test_golden_numbers_of_the_reference(detr_params, formula, scene, request):
    """What the reference computed where this file was made; runs without it."""
    model = detr_params()
    if os.environ.get("RUNKEY_WRITE_GOLDEN"):
        reference = request.getfixturevalue("reference")
        built = reference.build(model)
        net, outputs, losses, total = run_reference(reference, built, formula, scene)
        weighted = {n: losses[n].item() for n in built[1].weight_dict}
        golden = summary(net, outputs) | {"total": total.item(), "losses": weighted}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    net, outputs, losses, layers = run_ours(model, formula, scene)
    ours = summary(net, outputs)
    for part in ("logits", "boxes"):
        found, expected = torch.tensor(ours[part]), torch.tensor(golden[part])
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert losses.total.item() == pytest.approx(golden["total"], rel=TOLERANCE)
    for parts, suffix in zip(layers, layer_names(len(layers)), strict=True):
        expected = golden["losses"]
        assert parts["classification"].item() == pytest.approx(expected["loss_ce" + suffix])
        assert parts["l1"].item() == pytest.approx(5 * expected["loss_bbox" + suffix])
        assert parts["giou"].item() == pytest.approx(2 * expected["loss_giou" + suffix])
    assert ours["gradient_norms"].keys() == golden["gradient_norms"].keys()
    for name, norm in golden["gradient_norms"].items():
        assert ours["gradient_norms"][name] == pytest.approx(norm, rel=1e-8, abs=1e-10), name


def summary(net, outputs):
    """A 3 x 3 slice of the logits per layer and image, boxes of 3 queries, norms of gradients."""
    norms = {n: p.grad.norm().item() for n, p in net.named_parameters() if p.grad is not None}
    return {
        "logits": outputs.logits[:, :, :3, :3].tolist(),
        "boxes": outputs.boxes_cxcywh[:, :, :3].tolist(),
        "gradient_norms": norms,
    }


def test_a_changed_weight_breaks_the_golden_numbers(detr_params, formula, scene):
    """The comparison above can fail: another weight of giou gives another loss."""
    golden = json.loads(GOLDEN.read_text())
    model = detr_params()
    changed = model.model_copy(update={"loss": model.loss.model_copy(update={"giou": 2.001})})
    losses = run_ours(changed, formula, scene)[2]
    assert losses.total.item() != pytest.approx(golden["total"], rel=1e-6)
