"""What the loop makes of its evaluations: the weights that it keeps, early stops, lower rates."""

import math

import pytest
import torch

from tests.support import toy
from tests.support.toy import run, same


class Scripted:
    """An evaluation with given values; keeps the weights that it was shown."""

    def __init__(self, values, name="val/AP"):
        self.values, self.name, self.seen = list(values), name, []

    def __call__(self, module):
        self.seen.append({k: v.clone() for k, v in module.state_dict().items()})
        return {self.name: self.values[len(self.seen) - 1]}


def scripted_params(epochs, *, enabled=True, patience=2, every=1, **training):
    stopping = {"metric": "val/AP", "mode": "max", "patience": patience, "enabled": enabled}
    return toy.make_params(
        training={"epochs": epochs, "evaluate_every": every, "early_stopping": stopping} | training
    )


NAN = float("nan")


@pytest.mark.parametrize("enabled", [True, False])
def test_best_weights_not_the_last(enabled):
    evaluate = Scripted([0.1, 0.4, 0.3, 0.35])
    result = run(scripted_params(4, enabled=enabled, patience=3), evaluate=evaluate)
    assert (result.best.epoch, result.best.step, result.best.metrics) == (2, 6, {"val/AP": 0.4})
    assert same(result.best_weights, evaluate.seen[1])
    assert not same(result.best_weights, evaluate.seen[3])


def test_better_by_less_than_min_delta_is_still_the_model():
    evaluate = Scripted([0.4, 0.41, 0.42, 0.9])
    parameters = toy.make_params(
        training={"epochs": 4}
        | {"early_stopping": {"metric": "val/AP", "patience": 2, "min_delta": 0.1}}
    )
    result = run(parameters, evaluate=evaluate)
    assert result.best.epoch == 3
    assert result.stop_reason.startswith("early stop: best val/AP 0.4 at evaluation 1 of 3")


def test_early_stop_counts_evaluations_not_epochs():
    evaluate = Scripted([0.5, 0.4, 0.4, 0.9])
    result = run(scripted_params(9, every=2), evaluate=evaluate)
    assert len(evaluate.seen) == 3
    assert result.step == 6 * 3
    assert [e["epoch"] for e in result.history if "val/AP" in e] == [2, 4, 6]


def test_the_last_epoch_has_an_evaluation():
    evaluate = Scripted([0.5, 0.6])
    result = run(scripted_params(3, every=2), evaluate=evaluate)
    assert [e["epoch"] for e in result.history if "val/AP" in e] == [2, 3]
    assert result.best.epoch == 3


def test_nan_is_never_the_best():
    result = run(scripted_params(3, patience=9), evaluate=Scripted([NAN, -1.0, NAN]))
    assert result.best.epoch == 2
    result = run(scripted_params(2, patience=9), evaluate=Scripted([NAN, NAN]))
    assert result.best.epoch == 1
    assert math.isnan(result.best.metrics["val/AP"])


def test_plateau_drops_the_rate():
    tracker = toy.MemoryTracker()
    stopping = {"metric": "val/AP", "patience": 9}
    run(
        toy.make_params(
            lr=1e-3,
            schedule={"name": "plateau", "patience": 1, "warmup_fraction": 0},
            training={"epochs": 4, "early_stopping": stopping},
        ),
        evaluate=Scripted([0.5, 0.4, 0.6, 0.6]),
        tracker=tracker,
    )
    rates = [v["train/lr"] for _, v in tracker.logged if "train/loss" in v]
    assert rates == pytest.approx([1e-3] * 6 + [1e-4] * 6)


def test_evaluates_and_keeps_the_average():
    evaluate = Scripted([0.5])
    model = toy.ToyModel()
    result = run(scripted_params(1, ema_decay=0.9), model=model, evaluate=evaluate)
    assert same(result.best_weights, evaluate.seen[0])
    assert not same(result.best_weights, dict(model.state_dict()))


def test_best_state_loads_anywhere(tmp_path):
    result = run(toy.make_params(training={"epochs": 1}))
    assert all(t.is_contiguous() and not t.requires_grad for t in result.best_weights.values())
    torch.save(result.best_weights, tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    toy.ToyModel().load_state_dict(loaded, strict=True)
