"""What a training tells of its losses: spikes, an evaluation that failed, the held-out gap."""

import math

from runkey.errors import ModelError
from runkey.training.tensors import host_weights
from tests.support.guarded import bits, guarded, poisoned
from tests.support.squares import SquaresLoader, train_detector


def test_a_spike_is_logged_and_changes_nothing(events, lines):
    change = poisoned({9}, factor=30.0)
    results = []
    for score in (6.0, 0.0):
        parameters = guarded({"spike_history": 6, "spike_score": score})
        results.append(
            train_detector(
                parameters,
                loader=SquaresLoader(change=change),
                tracker=events if score else None,
            )
        )
    [spike] = events.of("loss_spike")
    assert spike["step"] == 9
    assert spike["score"] > 6
    assert len(spike["image_ids"]) == 4
    told = [line for line in lines if "spikes to" in line]
    assert len(told) == 1
    assert told[0].startswith("step 9 (images ")
    assert [epoch["train/loss_spikes"] for epoch in results[0].history] == [0, 0, 1, 1]
    assert bits(results[0].best_weights) == bits(results[1].best_weights)


def test_a_model_that_predicts_nan_is_not_the_end(events, lines):
    """An evaluation says so; the weights kept are of a finite one, and training has gone on."""
    parameters, evaluated = guarded(training={"evaluate_every": 1}), []

    def evaluate(module):
        evaluated.append(1)
        if len(evaluated) == 2:
            raise ModelError("the model predicts NaN or infinity")
        return {"val/loss": float(len(evaluated))}

    result = train_detector(parameters, evaluate=evaluate, tracker=events)
    assert (result.step, result.best.epoch) == (12, 1)
    assert [math.isnan(epoch["val/loss"]) for epoch in result.history] == [
        False,
        True,
        False,
        False,
    ]
    assert events.of("evaluation_failed")[0]["step"] == 6
    assert lines[-1].startswith("all 4 epochs done; kept the weights of epoch 1 (val/loss 1); gen")


def test_the_gap_and_what_was_kept_are_logged(events, lines):
    """Training loss falls, held-out loss rises after epoch 2: the weights of epoch 2 are kept."""
    parameters = guarded(
        training={
            "evaluate_every": 1,
            "epochs": 9,
            "early_stopping": {"metric": "val/loss", "mode": "min", "patience": 2},
        }
    )
    values = iter([20.0, 15.0, 16.0, 17.0])
    seen = []

    def evaluate(module):
        seen.append(host_weights(module))
        return {"val/loss": next(values)}

    result = train_detector(parameters, evaluate=evaluate, tracker=events)
    assert bits(result.best_weights) == bits(seen[1])
    assert lines[-1].startswith(
        "early stop: best val/loss 15 at evaluation 2 of 4, then 16, 17: 2 without improvement; "
        "kept the weights of epoch 2 (val/loss 15); generalisation gap (val loss - train loss): "
    )
    gaps = [epoch["val/loss_gap"] for epoch in result.history]
    assert gaps == [e["val/loss"] - e["train/epoch_loss"] for e in result.history]
    assert f"{gaps[1]:.3g} at the best epoch, {gaps[3]:.3g} at the end" in lines[-1]


def test_the_gap_is_said_once_if_the_best_epoch_is_the_last(events, lines):
    stopping = {"metric": "val/loss", "mode": "min"}
    parameters = guarded(training={"evaluate_every": 1, "epochs": 3, "early_stopping": stopping})
    values = iter([20.0, 16.0, 15.0])
    result = train_detector(
        parameters, evaluate=lambda _: {"val/loss": next(values)}, tracker=events
    )
    assert result.best.epoch == 3
    gap = result.history[-1]["val/loss_gap"]
    assert lines[-1].endswith(f"(val loss - train loss): {gap:.3g} at the best epoch, the last")
