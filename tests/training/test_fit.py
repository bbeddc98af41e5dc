"""The loop as a whole, on a small real task: it learns, and the same bits come out again."""

import pytest
import torch

from runkey.training.device import configure_torch
from tests.support import toy
from tests.support.toy import PATIENT, run, same, seeded


def without_clock(values):
    return {k: v for k, v in values.items() if "per_second" not in k and "wait" not in k}


def test_learns():
    parameters = toy.make_params(lr=3e-3, training={"epochs": 12, "early_stopping": PATIENT})
    result = run(parameters)
    assert result.history[-1]["train/epoch_loss"] < 0.6 * result.history[0]["train/epoch_loss"]
    assert result.best.metrics["val/loss"] < result.history[0]["val/loss"]
    assert result.step == 12 * 3
    assert result.stop_reason == "all 12 epochs done"


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_twice_the_same_bits(ema):
    parameters = toy.make_params(training={"epochs": 2, "ema_decay": ema})
    results, trackers = [], []
    for _ in range(2):
        trackers.append(toy.MemoryTracker())
        model = toy.ToyModel  # dropout: its noise must come back too
        configure_torch(0, deterministic=True)
        results.append(run(parameters, model=model(dropout=0.3), tracker=trackers[-1]))
        torch.rand(7)  # somebody else draws in between
    assert same(results[0].best_weights, results[1].best_weights)
    logged = [[(s, without_clock(v)) for s, v in t.logged] for t in trackers]
    assert logged[0] == logged[1]


def test_another_seed_gives_other_weights():
    first = run(toy.make_params(seed=0, training={"epochs": 1}))
    second = run(toy.make_params(seed=1, training={"epochs": 1}))
    assert not same(first.best_weights, second.best_weights)


def test_noise_is_a_function_of_the_step():
    """Dropout's draws do not depend on what was drawn before the step."""
    parameters = toy.make_params(training={"epochs": 1})
    states = []
    for draws in (0, 1000):
        configure_torch(0, deterministic=True)
        model = toy.ToyModel(dropout=0.5)

        class Drawing(toy.ToyLoader):
            def epoch(self, epoch, start_step=0):
                for window in super().epoch(epoch, start_step):
                    torch.rand(draws)  # noqa: B023
                    yield window

        loader = Drawing()
        states.append(run(parameters, model=model, loader=loader).best_weights)
    assert same(*states)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_micro_batch_changes_rounding_only(micro_batch):
    parameters = toy.make_params(lr=1e-3, training={"epochs": 2})
    whole, parts = (
        run(parameters, model=seeded(), loader=toy.ToyLoader(micro_batch=size))
        for size in (8, micro_batch)
    )
    for name, tensor in whole.best_weights.items():
        torch.testing.assert_close(parts.best_weights[name], tensor, rtol=0, atol=2e-4)
    losses = [[epoch["train/epoch_loss"] for epoch in r.history] for r in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_log_every_changes_no_weight():
    results = [
        run(toy.make_params(runtime={"log_every": every}), tracker=toy.MemoryTracker())
        for every in (1, 7)
    ]
    assert same(results[0].best_weights, results[1].best_weights)


def test_overfits_one_batch():
    parameters = toy.make_params(
        lr=3e-3, training={"epochs": 110, "evaluate_every": 110, "early_stopping": PATIENT}
    )
    result = run(parameters, loader=toy.ToyLoader(images=8), model=seeded())
    first, last = result.history[0], result.history[-1]
    assert last["train/epoch_loss"] < 0.1 * first["train/epoch_loss"]
