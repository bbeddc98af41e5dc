"""One optimizer step: accumulation, clipping after unscaling, and steps that must not count."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from runkey import params
from runkey.data.dataset import normalise
from runkey.model.criterion import build_criterion
from runkey.model.detr import build_model
from runkey.model.matcher import Targets
from runkey.training.device import Precision
from runkey.training.optimizer import Clipper, Ema, build_optimizer, trained_parameters
from runkey.training.step import TrainStep, accumulate_gradients, train_step
from tests.support import toy

CPU = torch.device("cpu")
IDS = [1, 2, 3, 7, 5, 4, 6, 8]  # image 5 is empty; 1 to 4 boxes in the others
PARTIAL = [11, 15, 12, 13, 14]  # the last window of an epoch


def machinery(model, criterion, *, dtype=None, clip=("none", 1.0), lr=1e-2, **optimizer):
    return TrainStep(
        model=model,
        criterion=criterion,
        optimizer=build_optimizer(model, params.Optimizer(**optimizer), lr),
        precision=Precision(CPU, dtype),
        channels_last=False,
        clipper=Clipper(*clip, CPU),
    )


class InFloat64(nn.Module):
    """The real detector in fp64; normalised images come in fp32."""

    def __init__(self, model):
        super().__init__()
        self.model = model.double()

    def forward(self, images, padding_mask, targets):
        return self.model(images.double(), padding_mask, targets)


def real(preset):
    section = params.Model(
        preset=preset,
        hidden_dim=16,
        num_heads=2,
        feedforward_dim=16,
        decoder_layers=2,
        num_queries=6,
        loss=params.schema.LossWeights(classification=1.0 if preset == "detr" else 2.0),
    )
    torch.manual_seed(0)
    model = InFloat64(build_model(section, 3)).train()
    # Batch statistics are a micro-batch's own: no accumulation is exact with them.
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return machinery(model, build_criterion(section, 3))


def gradients_of(parts, ids, micro_batch):
    parts.optimizer.zero_grad()
    window = toy.make_window(ids, micro_batch, dtype=torch.float64, size=32)
    losses = accumulate_gradients(parts, window).values
    return losses, {
        n: p.grad.clone() for n, p in parts.model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("preset", ["fast", "detr"])
@pytest.mark.parametrize("ids", [IDS, PARTIAL, [5, 10]], ids=["whole", "partial", "all-empty"])
def test_accumulation_changes_no_gradient(preset, ids):
    """1 x 8 = 2 x 4 = 4 x 2 = 8 x 1, with unequal numbers of boxes, on the real model."""
    parts = real(preset)
    losses, whole = gradients_of(parts, ids, 8)
    assert len(whole) > 50
    largest = max(g.abs().max().item() for g in whole.values())
    assert largest > 1e-3
    for micro_batch in (4, 2, 1):
        other_losses, other = gradients_of(parts, ids, micro_batch)
        assert whole.keys() == other.keys()
        for name, gradient in whole.items():
            assert (gradient - other[name]).abs().max().item() < 1e-10 * largest, name
        for name, value in losses.items():
            assert other_losses[name].item() == pytest.approx(value.item(), rel=1e-10), name


def test_every_parameter_gets_a_gradient():
    for preset in ("fast", "detr"):
        parts = real(preset)
        _, found = gradients_of(parts, [5], 1)
        assert found.keys() == {n for n, p in parts.model.named_parameters() if p.requires_grad}


def test_loss_names():
    losses, _ = gradients_of(real("fast"), IDS, 4)
    assert set(losses) == {"loss", "loss_classification", "loss_l1", "loss_giou"}
    total = sum(value for name, value in losses.items() if name != "loss")
    assert losses["loss"].item() == pytest.approx(total.item())
    assert not any(value.requires_grad for value in losses.values())


def test_the_toy_accumulates_too():
    """Negative control: a normaliser of each micro-batch's own would fail the test above."""
    torch.manual_seed(0)
    parts = machinery(toy.ToyModel(norm=False).double(), toy.ToyCriterion())
    _, whole = gradients_of_toy(parts, 8)
    _, halves = gradients_of_toy(parts, 4)
    own = [gradients_of_toy(parts, 4, ids)[1] for ids in (IDS[:4], IDS[4:])]
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, halves[name], rtol=0, atol=1e-10)
        mean_of_means = (own[0][name] + own[1][name]) / 2
        assert (mean_of_means - gradient).abs().max() > 1e-5


def gradients_of_toy(parts, micro_batch, ids=IDS):
    parts.optimizer.zero_grad()
    window = toy.make_window(ids, micro_batch, dtype=torch.float64)
    losses = accumulate_gradients(parts, window).values
    return losses, {n: p.grad.clone() for n, p in parts.model.named_parameters()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_clips_what_is_unscaled(dtype):
    """In fp16 the gradients carry a factor of 65,536 until they are unscaled."""
    torch.manual_seed(0)
    parts = machinery(toy.ToyModel(norm=False), toy.ToyCriterion(), dtype=dtype, clip=("norm", 0.1))
    result = train_step(parts, toy.make_window(IDS, 4), 1.0)
    assert result.skipped.item() == 0
    norm = torch.stack([p.grad.norm() for p in parts.model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.1, rel=1e-4)
    assert result.scalars["train/grad_norm_clipped"].item() == pytest.approx(0.1, rel=1e-4)
    torch.manual_seed(0)
    exact = machinery(toy.ToyModel(norm=False), toy.ToyCriterion())
    expected = train_step(exact, toy.make_window(IDS, 8), 1.0)
    tolerance = 1e-5 if dtype is None else 0.05
    assert result.scalars["train/grad_norm"].item() == pytest.approx(
        expected.scalars["train/grad_norm"].item(), rel=tolerance
    )
    assert result.scalars["train/loss"].item() == pytest.approx(
        expected.scalars["train/loss"].item(), rel=0.02
    )


def test_clip_by_value():
    parts = machinery(toy.ToyModel(), toy.ToyCriterion(), clip=("value", 1e-3))
    result = train_step(parts, toy.make_window(IDS, 8), 1.0)
    assert max(p.grad.abs().max().item() for p in parts.model.parameters()) == pytest.approx(1e-3)
    assert result.scalars["train/grad_norm_clipped"] < result.scalars["train/grad_norm"]


def test_rate_of_the_step():
    """Adam's first step moves each weight by its rate, whatever the gradient."""
    parts = machinery(
        toy.ToyModel(), toy.ToyCriterion(), backbone_lr_factor=0.1, weight_decay=0, lr=1e-3
    )
    before = copy.deepcopy(dict(parts.model.named_parameters()))
    train_step(parts, toy.make_window(IDS, 8), 0.5)
    moved = {n: (p - before[n]).abs().max().item() for n, p in parts.model.named_parameters()}
    assert moved["head.weight"] == pytest.approx(0.5e-3, rel=1e-3)
    assert moved["backbone.3.weight"] == pytest.approx(0.5e-4, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_gradients_that_are_not_finite_change_nothing(value, dtype):
    """One bad element in one micro-batch: weights, moments, counters and batch norm's statistics
    stay, bit for bit."""
    torch.manual_seed(0)
    parts = machinery(toy.ToyModel(), toy.ToyCriterion(), dtype=dtype)
    train_step(parts, toy.make_window(IDS, 8), 1.0)
    weights = copy.deepcopy(parts.model.state_dict())
    moments = copy.deepcopy(parts.optimizer.state_dict()["state"])
    calls = []

    def poison(gradient):
        calls.append(1)
        if len(calls) != 2:
            return gradient
        bad = gradient.clone()
        bad.view(-1)[3] = value
        return bad

    handle = parts.model.head.weight.register_hook(poison)
    result = train_step(parts, toy.make_window(IDS, 2), 1.0)
    handle.remove()
    assert len(calls) == 4
    assert result.skipped.item() == 1
    assert all(torch.equal(weights[k], v) for k, v in parts.model.state_dict().items())
    for index, state in parts.optimizer.state_dict()["state"].items():
        assert all(torch.equal(moments[index][k], v) for k, v in state.items())
    # The step after is as if nothing had been.
    assert train_step(parts, toy.make_window(IDS, 2), 1.0).skipped.item() == 0
    assert not torch.equal(weights["head.weight"], parts.model.head.weight)


def test_a_loss_that_is_not_finite_changes_nothing():
    """A NaN loss can come with finite gradients (it may be a term without any)."""

    class WithoutGradient(toy.ToyCriterion):
        def __call__(self, outputs, targets, normaliser):
            losses = super().__call__(outputs, targets, normaliser)
            return type(losses)(losses.total + float("nan"), losses.parts)

    parts = machinery(toy.ToyModel(), WithoutGradient())
    before = copy.deepcopy(parts.model.state_dict())
    result = train_step(parts, toy.make_window(IDS, 4), 1.0)
    assert result.skipped.item() == 1
    assert all(torch.equal(before[n], t) for n, t in parts.model.state_dict().items())


def test_a_forward_pass_that_is_not_finite_changes_nothing():
    """A huge weight in front of batch norm: its statistics become infinite, then NaN."""
    model = toy.ToyModel()
    parts = machinery(model, toy.ToyCriterion())
    train_step(parts, toy.make_window(IDS, 4), 1.0)
    with torch.no_grad():
        model.backbone[0].weight[0] = 1e38
    before = copy.deepcopy(model.state_dict())
    saved = parts.statistics.copy()
    accumulate_gradients(parts, toy.make_window(IDS, 4))
    assert not model.backbone[1].running_var.isfinite().all()  # what the guard is for
    parts.statistics.restore(saved, torch.tensor(1.0))
    result = train_step(parts, toy.make_window(IDS, 4), 1.0)
    assert result.skipped.item() == 1
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_statistics_move_in_a_step_that_counts():
    model = toy.ToyModel()
    train_step(machinery(model, toy.ToyCriterion()), toy.make_window(IDS, 2), 1.0)
    norm = model.backbone[1]
    assert norm.num_batches_tracked == 4
    assert not torch.equal(norm.running_mean, torch.zeros(8))


def test_fp16_scale_halves_after_an_overflow():
    parts = machinery(toy.ToyModel(norm=False), toy.ToyCriterion(), dtype=torch.float16)
    scaler = parts.precision.scaler
    first = scaler.get_scale()
    handle = parts.model.head.weight.register_hook(lambda g: g * float("inf"))
    train_step(parts, toy.make_window(IDS, 8), 1.0)
    handle.remove()
    assert scaler.get_scale() == first / 2
    train_step(parts, toy.make_window(IDS, 8), 1.0)
    assert scaler.get_scale() == first / 2


def test_frozen_parameters_do_not_move():
    model = toy.ToyModel()
    model.backbone[0].requires_grad_(False)
    parts = machinery(model, toy.ToyCriterion())
    before = copy.deepcopy(model.state_dict())
    train_step(parts, toy.make_window(IDS, 8), 1.0)
    assert torch.equal(before["backbone.0.weight"], model.backbone[0].weight)
    assert not torch.equal(before["backbone.3.weight"], model.backbone[3].weight)
    assert all(p.grad is not None for p in trained_parameters(parts.optimizer))


@pytest.mark.gpu
@pytest.mark.parametrize("clip", ["norm", "percentile"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_step_waits_once_for_the_gpu(dtype, clip):
    """Only the matcher may wait: with the toy's fixed matching, nothing does, skipped or not."""
    device = torch.device("cuda", 0)
    model = toy.ToyModel().to(device)
    parts = dataclasses.replace(
        machinery(model, toy.ToyCriterion()),
        precision=Precision(device, dtype),
        clipper=Clipper(clip, 0.1, device),
    )
    ema = Ema(model, 0.9)
    window = tuple(batch.pin_memory() for batch in toy.make_window(IDS, 4))
    ema.update(train_step(parts, window, 1.0).skipped)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [train_step(parts, window, 1.0)]
        ema.update(results[0].skipped)
        model.head.bias.register_hook(lambda gradient: gradient * float("nan"))
        results.append(train_step(parts, window, 1.0))
        ema.update(results[1].skipped)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [result.skipped.item() for result in results] == [0, 1]
    assert all(tensor.isfinite().all() for tensor in ema.module.state_dict().values())


def test_a_batch_of_full_images_is_computed_without_a_mask():
    """The same numbers but for rounding; the smaller image of another batch keeps its mask."""
    seen = []

    class Watched(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images, padding_mask, targets):
            seen.append(padding_mask)
            return self.model(images, padding_mask, targets)

    parts = real("fast")
    model, criterion = parts.model, parts.criterion
    parts = dataclasses.replace(parts, model=Watched(model))
    (full,) = toy.make_window([1, 2], 2, size=32)
    accumulate_gradients(parts, (full,))
    gradients = [p.grad.clone() for p in model.parameters()]
    smaller = dataclasses.replace(full, sizes=torch.tensor([[32, 32], [32, 24]]))
    accumulate_gradients(parts, (smaller,))
    assert seen[0] is None
    assert seen[1].sum() == 32 * 8
    model.zero_grad()
    images, mask = normalise(full)
    targets = Targets(full.boxes_cxcywh, full.labels, full.counts)
    losses = criterion(model(images, mask, targets), targets, criterion.normaliser(full.counts))
    losses.total.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
