"""Layer drop: which layers a step trains, that it is a function of (seed, step), and exact."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from runkey import params
from runkey.errors import ParamsError
from runkey.model.criterion import build_criterion
from runkey.model.detr import build_model
from runkey.training.build import Replacements, build_training
from runkey.training.device import draw_depth
from runkey.training.distributed import World
from runkey.training.loop import take_step
from runkey.training.state import LoopState
from runkey.training.step import accumulate_gradients, train_step
from tests.support import toy
from tests.support.ranks import InFloat64, machinery
from tests.support.squares import SquaresLoader, detector_params, held_out_loss, make_detector
from tests.support.squares import make_window as window_of

CPU = torch.device("cpu")


def test_depths_are_drawn_as_stated():
    depths = [draw_depth(0.4, 4, 0, step) for step in range(3000)]
    shares = {depth: count / 3000 for depth, count in Counter(depths).items()}
    assert shares.pop(4) == pytest.approx(0.6, abs=0.03)
    assert shares == {depth: pytest.approx(0.4 / 3, abs=0.03) for depth in (1, 2, 3)}
    # Written out: another machine or version must draw the same.
    assert depths[:12] == [4, 2, 2, 4, 4, 1, 1, 4, 3, 4, 4, 4]
    assert {draw_depth(1.0, 3, 0, step) for step in range(99)} == {1, 2}
    assert {draw_depth(0.0, 3, 0, step) for step in range(99)} == {3}
    assert depths != [draw_depth(0.4, 4, 1, step) for step in range(3000)]


def test_one_layer_cannot_be_dropped():
    with pytest.raises(ParamsError, match="layer_drop needs at least 2 decoder_layers"):
        detector_params(model={"layer_drop": 0.5, "decoder_layers": 1})


@pytest.mark.parametrize("preset", ["fast", "detr"])
def test_a_dropped_layer_repeats_the_prediction_before_it(preset, monkeypatch):
    section = params.Model(
        preset=preset, hidden_dim=16, num_heads=2, feedforward_dim=16, decoder_layers=3
    )
    torch.manual_seed(0)
    model = build_model(section, 3)
    images = torch.rand(2, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    whole = model(images, None)
    model.transformer.decoder.depth = 2
    ran = []
    decoder, run = model.transformer.decoder, model.transformer.decoder.run

    def noted(index, *inputs):
        ran.append(index)
        return run(index, *inputs)

    monkeypatch.setattr(decoder, "run", noted)
    cut = model(images, None)
    assert ran == [0, 1]
    for ours, full in ((cut.logits, whole.logits), (cut.boxes_cxcywh, whole.boxes_cxcywh)):
        assert ours.shape == full.shape
        torch.testing.assert_close(ours[:2], full[:2])
        torch.testing.assert_close(ours[2], ours[1])
    model.eval()(images, None)
    assert ran == [0, 1, 0, 1, 2], "in evaluation all layers run"


def parts_of(preset: str, layer_drop: float):
    """A small detector in float64 whose norms do not follow the data."""
    section = params.Model(
        preset=preset,
        hidden_dim=16,
        num_heads=2,
        feedforward_dim=16,
        decoder_layers=3,
        num_queries=6,
        layer_drop=layer_drop,
    )
    torch.manual_seed(0)
    model = build_model(section, 3).train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    parts = machinery(InFloat64(model), build_criterion(section, 3), World())
    # `reseed` looks for the detector's decoder.
    parts.model.transformer = model.transformer
    return replace(parts, layer_drop=layer_drop)


IDS = [1, 2, 3, 7, 5, 4, 6, 8]


@pytest.mark.parametrize("preset", ["fast", "detr"])
def test_the_micro_batch_does_not_change_the_gradient(preset):
    step = next(step for step in range(99) if draw_depth(0.5, 3, 0, step) == 2)
    found = []
    for micro_batch in (8, 3, 1):
        parts = parts_of(preset, 0.5)
        window = toy.make_window(IDS, micro_batch, dtype=torch.float64, size=32)
        losses = accumulate_gradients(parts, window, reseed=lambda p=parts: p.reseed(0, step, 0))
        grads = {n: p.grad for n, p in parts.model.named_parameters() if p.grad is not None}
        found.append((losses.values["loss"], grads))
    (loss, whole), *others = found
    assert not [name for name in whole if "decoder.layers.2" in name]
    assert [name for name in whole if "decoder.layers.1" in name]
    for other_loss, other in others:
        assert torch.allclose(loss, other_loss, rtol=1e-9)
        assert whole.keys() == other.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-6, atol=1e-9)


def test_every_rank_draws_the_same_depth():
    parts = parts_of("fast", 0.7)
    for step in range(20):
        depths = set()
        for rank in range(3):
            parts.reseed(0, step, rank)
            depths.add(parts.model.transformer.decoder.depth)
        assert depths == {draw_depth(0.7, 3, 0, step)}


def test_a_dropped_layer_has_state_from_the_first_step_on():
    """Its gradient is zero: memory is that of a whole step, and ranks agree."""
    parts = parts_of("fast", 0.5)
    parts.model.transformer.decoder.depth = 1
    layer = parts.model.transformer.decoder.layers[2]
    before = layer.linear1.weight.clone()
    train_step(parts, toy.make_window(IDS, 4, dtype=torch.float64, size=32), 1.0)
    assert not layer.linear1.weight.grad.any()
    state = parts.optimizer.state[layer.linear1.weight]
    assert state["step"] == 1
    assert not state["exp_avg"].any()
    # Weight decay alone: lr 1e-2 x 1e-4.
    torch.testing.assert_close(layer.linear1.weight, before * (1 - 1e-6))


class Evaluated:
    """A training of the squares' detector, stopped anywhere."""

    def __init__(self, layer_drop: float) -> None:
        self.parameters = detector_params(
            model={"layer_drop": layer_drop, "decoder_layers": 3, "denoising": {"groups": 2}},
            training={"epochs": 2, "evaluate_every": 1},
        )

    def fit(self, checkpoints=None):
        model = make_detector(self.parameters)
        return toy.fit(
            model,
            build_criterion(self.parameters.model, 3),
            SquaresLoader(),
            held_out_loss(self.parameters),
            self.parameters,
            checkpoints=checkpoints,
        )


@pytest.mark.parametrize("stop_after", [2, 5, 7])
def test_a_resumed_training_is_the_same(stop_after):
    training = Evaluated(0.5)
    whole = training.fit()
    saved = toy.SavedInMemory(stop_after=stop_after)
    with pytest.raises(toy.StoppedError):
        training.fit(saved)
    saved.stop_after = None
    resumed = training.fit(saved)
    for name, tensor in whole.best_weights.items():
        assert torch.equal(tensor, resumed.best_weights[name]), name
    losses = [[epoch["train/epoch_loss"] for epoch in r.history] for r in (whole, resumed)]
    assert losses[0] == losses[1]


def test_the_noise_of_a_step_is_that_without_layer_drop():
    """A step that runs all layers has the same bits with and without it; others have not."""
    step = next(step for step in range(99) if draw_depth(0.5, 3, 0, step) == 3)
    dropping = next(step for step in range(99) if draw_depth(0.5, 3, 0, step) < 3)
    for number, same in ((step, True), (dropping, False)):
        weights = []
        for layer_drop in (0.0, 0.5):
            parameters = Evaluated(layer_drop).parameters
            model = make_detector(parameters)
            criterion, loader = build_criterion(parameters.model, 3), SquaresLoader()
            context = build_training(
                parameters, 3, CPU, replace=Replacements(model, criterion, loader)
            )
            context.step.model.train()
            take_step(context, LoopState(step=number), window_of(IDS, 4, size=32), [])
            weights.append(torch.cat([p.flatten() for p in model.parameters()]))
        assert torch.equal(*weights) is same
