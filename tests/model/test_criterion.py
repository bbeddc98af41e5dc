from __future__ import annotations

import pytest
import torch

from runkey import params
from runkey.memory.trace.record import fixed_matches
from runkey.memory.trace.torch_private import fake_tensors
from runkey.model.boxes import cxcywh_to_xyxy, overlaps
from runkey.model.criterion import QualityLoss, build_criterion
from runkey.model.detr import build_model
from runkey.model.matcher import Layers, Targets

K = 4
COUNTS = (3, 0, 7, 1, 0, 12, 2, 5)  # one image with more boxes than queries
SMALL = {
    "hidden_dim": 16,
    "num_heads": 2,
    "feedforward_dim": 24,
    "num_queries": 10,
    "norm": "frozen",
}


def split(targets: Targets, size: int):
    """Micro-batches of `size` images."""
    first = 0
    for start in range(0, len(targets.counts), size):
        counts = targets.counts[start : start + size]
        own = slice(first, first + sum(counts))
        first += sum(counts)
        yield (
            slice(start, start + size),
            Targets(targets.boxes_cxcywh[own], targets.labels[own], counts),
        )


@pytest.mark.parametrize("preset", ["fast", "detr"])
def test_micro_batches_add_up_to_the_window(preset, formula):
    """1 x 8 = 2 x 4 = 4 x 2 = 8 x 1 in gradient and loss, boxes unequal, some images empty."""
    model = params.Model.model_validate(SMALL | {"preset": preset})
    net = build_model(model, K).double()
    formula.fill(net)
    criterion = build_criterion(model, K)
    images, targets = formula.images(8, 32, 40), formula.targets(COUNTS, K)
    normaliser = criterion.normaliser(COUNTS)
    results = []
    for size in (8, 4, 2, 1):
        net.zero_grad()
        total = 0.0
        for own, part in split(targets, size):
            losses = criterion(net(images[own], None, part), part, normaliser)
            losses.total.backward()
            total += losses.total.item()
        results.append((total, {n: p.grad.clone() for n, p in net.named_parameters()}))
    expected_total, expected = results[0]
    for total, gradients in results[1:]:
        assert total == pytest.approx(expected_total, rel=1e-10)
        for name, gradient in gradients.items():
            scale = max(1.0, expected[name].abs().max().item())
            assert (gradient - expected[name]).abs().max().item() < 1e-10 * scale, name


def test_a_normaliser_per_micro_batch_would_be_wrong(formula):
    """The check above can fail: it does with each micro-batch's own numbers."""
    model = params.Model.model_validate(SMALL)
    criterion = build_criterion(model, K)
    window = criterion.normaliser(COUNTS)
    assert window.boxes == 30
    assert criterion.normaliser(COUNTS[:4]).boxes == 11
    assert criterion.normaliser((0, 0)).boxes == 1


def test_class_weights_of_the_window_are_counted():
    """Softmax: matched queries weigh 1, all others `no_object`; a box too many counts nothing."""
    criterion = build_criterion(params.Model.model_validate(SMALL | {"preset": "detr"}), K)
    matched = 3 + 7 + 1 + 10 + 2 + 5
    expected = matched + 0.1 * (80 - matched)
    assert criterion.normaliser(COUNTS).classification == pytest.approx(expected)


@pytest.mark.parametrize("counts", [(2, 0), (0, 0)])
@pytest.mark.parametrize(("preset", "groups"), [("fast", 0), ("fast", 2), ("detr", 0)])
def test_every_parameter_has_a_gradient(preset, counts, groups, formula):
    """Data-parallel training waits for all of them, also where no image has a box."""
    model = params.Model.model_validate(
        SMALL | {"preset": preset, "denoising": {"groups": groups}, "norm": "live"}
    )
    net = build_model(model, K)
    criterion = build_criterion(model, K)
    targets = formula.targets(counts, K)
    targets = Targets(targets.boxes_cxcywh.float(), targets.labels, counts)
    losses = criterion(
        net(formula.images(2, 32, 40).float(), None, targets), targets, criterion.normaliser(counts)
    )
    losses.total.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_parts_sum_to_the_total(formula):
    model = params.Model.model_validate(SMALL | {"denoising": {"groups": 3}})
    net, criterion = build_model(model, K).double(), build_criterion(model, K)
    targets = formula.targets((3, 1), K)
    losses = criterion(
        net(formula.images(2, 32, 40), None, targets), targets, criterion.normaliser((3, 1))
    )
    assert set(losses.parts) == {"classification", "l1", "giou", "denoising"}
    assert sum(p.item() for p in losses.parts.values()) == pytest.approx(losses.total.item())
    assert not any(p.requires_grad for p in losses.parts.values())


@pytest.mark.parametrize(("preset", "groups"), [("fast", 2), ("detr", 0)])
def test_forward_and_losses_look_at_no_value(preset, groups, formula):
    """No device is waited for but in the matcher; the memory profile runs this on fake tensors."""
    model = params.Model.model_validate(
        SMALL | {"preset": preset, "denoising": {"groups": groups}, "norm": "live"}
    )
    criterion = build_criterion(model, K)
    targets = formula.targets((3, 1), K)
    targets = Targets(targets.boxes_cxcywh.float(), targets.labels, targets.counts)
    with fake_tensors() as mode, fixed_matches():
        mode.allow_non_fake_inputs = True
        fake = build_model(model, K)
        images = torch.empty(2, 3, 32, 40)
        padding = torch.zeros(2, 32, 40, dtype=torch.bool)
        losses = criterion(fake(images, padding, targets), targets, criterion.normaliser((3, 1)))
    assert losses.total.shape == ()


def test_quality_loss_is_its_formula():
    """IoU is the target where matched; elsewhere 0, with weight p^gamma."""
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.5], [-0.7, 0.1]], dtype=torch.float64)
    iou = torch.tensor([0.8], dtype=torch.float64)
    found = QualityLoss(1.5).loss(logits, torch.tensor([1]), torch.tensor([0]), iou)
    p = logits.sigmoid()
    expected = (p**1.5 * -(1 - p).log()).sum()
    expected += p[1, 0] ** 1.5 * (1 - p[1, 0]).log()
    expected -= 0.8 * p[1, 0].log() + 0.2 * (1 - p[1, 0]).log()
    torch.testing.assert_close(found, expected)


def test_box_losses_are_their_formula(formula):
    model = params.Model.model_validate(SMALL | {"preset": "detr"})
    net, criterion = build_model(model, K).double(), build_criterion(model, K)
    targets = formula.targets((3, 1), K)
    outputs = net(formula.images(2, 32, 40), None)
    layers = Layers(("first", "second"), outputs.logits, outputs.boxes_cxcywh)
    matches = criterion.matcher(layers, targets)
    parts = criterion(outputs, targets, criterion.normaliser((3, 1))).parts
    found = outputs.boxes_cxcywh.flatten(0, 2)[matches.predictions]
    true = targets.boxes_cxcywh[matches.targets]
    assert len(found) == 2 * 4
    assert parts["l1"].item() == pytest.approx(5 * (found - true).abs().sum().item() / 4)
    giou = overlaps(cxcywh_to_xyxy(found), cxcywh_to_xyxy(true))[1]
    assert parts["giou"].item() == pytest.approx(2 * (1 - giou).sum().item() / 4)
