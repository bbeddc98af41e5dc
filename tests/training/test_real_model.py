"""The loop with the project's own detector, criterion and matcher."""

import pytest
import torch

from runkey.data.dataset import normalise
from runkey.model.criterion import build_criterion
from runkey.model.detr import build_model
from runkey.model.matcher import Targets
from runkey.training.device import configure_torch
from tests.support import toy
from tests.support.fitting import fit

SMALL = {"hidden_dim": 32, "num_heads": 2, "feedforward_dim": 64, "num_queries": 8}
PRESETS = {
    "fast": SMALL | {"dropout": 0.1, "denoising": {"groups": 2}},
    "detr": SMALL | {"preset": "detr", "dropout": 0.1, "loss": {"classification": 1.0}},
}
WATCHED = {"metric": "val/loss", "mode": "min", "enabled": False}


class SquaresLoader:
    """The toy's images, large enough for stride 8; the last window is partial."""

    def __init__(self, images=12, batch_size=8, micro_batch=4):
        self.images = images
        self.batch_size, self.micro_batch = batch_size, micro_batch

    @property
    def steps_per_epoch(self):
        return -(-self.images // self.batch_size)

    def epoch(self, epoch, start_step=0):
        for step in range(start_step, self.steps_per_epoch):
            first = step * self.batch_size
            ids = range(1 + first, 1 + min(self.images, first + self.batch_size))
            yield toy.make_window(ids, self.micro_batch, size=32)


def train(preset, loader, lr=1e-3, model=None, **training):
    parameters = toy.make_params(
        lr=lr,
        model=PRESETS[preset] | (model or {}),
        optimizer={"clip": {"threshold": 0.5}},
        training={"early_stopping": WATCHED} | training,
    )
    configure_torch(parameters.seed, deterministic=True)
    module = build_model(parameters.model, 3)
    criterion = build_criterion(parameters.model, 3)

    def evaluate(module):
        batch = toy.make_batch(range(1, 9), size=32)
        targets = Targets(batch.boxes_cxcywh, batch.labels, batch.counts)
        losses = criterion(module(*normalise(batch)), targets, criterion.normaliser(batch.counts))
        return {"val/loss": float(losses.total)}

    return fit(module, criterion, loader, evaluate, parameters)


@pytest.mark.parametrize("preset", ["fast", "detr"])
def test_twice_the_same_bits(preset):
    """With dropout, denoising noise, live norm, accumulation, an average, a partial window."""
    first, second = (train(preset, SquaresLoader(), epochs=2, ema_decay=0.9) for _ in range(2))
    assert first.best_weights.keys() == second.best_weights.keys()
    for name, tensor in first.best_weights.items():
        assert torch.equal(tensor, second.best_weights[name]), name
    losses = [[epoch["train/epoch_loss"] for epoch in r.history] for r in (first, second)]
    assert losses[0] == losses[1]
    assert first.skipped_steps == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_gives_the_same_loss_nearly(precision):
    plain, mixed = (
        train("fast", SquaresLoader(), epochs=1, model={"dropout": 0.0}, precision=choice)
        for choice in ("off", precision)
    )
    expected = plain.history[0]["train/epoch_loss"]
    assert mixed.history[0]["train/epoch_loss"] == pytest.approx(expected, rel=0.05)
    assert all(tensor.dtype != torch.bfloat16 for tensor in mixed.best_weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fast", "detr"])
def test_overfits_one_batch(preset):
    loader = SquaresLoader(images=8, micro_batch=8)
    still = {"dropout": 0.0, "denoising": {"groups": 0}}
    result = train(preset, loader, lr=2e-3, model=still, epochs=200, evaluate_every=200)
    assert result.history[-1]["train/epoch_loss"] < 0.1 * result.history[0]["train/epoch_loss"]
