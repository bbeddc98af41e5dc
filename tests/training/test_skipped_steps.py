"""Steps that are not finite, on the real model: what they leave behind, and which of them count."""

import math

import pytest

from runkey.training.checkpoint import find_checkpoints, read_file
from runkey.training.guard import find_pins
from runkey.training.loop import take_step
from runkey.training.state import LoopState
from tests.support.guarded import LAYER, bits, context_of, guarded, poisoned
from tests.support.planted import plant
from tests.support.squares import SquaresLoader, make_detector, train_detector


@pytest.mark.parametrize("precision", ["off", "fp16"])
@pytest.mark.parametrize("how", ["forward", "backward"])
def test_a_skipped_step_leaves_nothing_behind(how, precision):
    """Weights, moments, counters, batch norm's statistics and the average, bit for bit."""
    parameters = guarded(training={"precision": precision})
    model = make_detector(parameters)
    plant(model, LAYER, how, {7})
    loader = SquaresLoader()
    context, state = context_of(parameters, model, loader), LoopState()
    model.train()
    windows = [*loader.epoch(0), *loader.epoch(1)]
    for window in windows[:3]:
        take_step(context, state, window, [])
    before = bits({name: part.state_dict() for name, part in context.parts.items()})
    result = take_step(context, state, windows[3], [])
    assert result.skipped == 1
    assert math.isnan(result.scalars["train/loss"]) == (how == "forward")
    after = bits({name: part.state_dict() for name, part in context.parts.items()})
    before.pop("scaler", None), after.pop("scaler", None)
    # The schedule's rate is set before anyone knows.
    for parts in (before, after):
        for group in parts["optimizer"]["param_groups"]:
            del group["lr"]
    assert before == after
    result = take_step(context, state, windows[4], [])
    assert result.skipped == 0


def test_a_forward_pass_that_is_not_finite_is_a_skipped_step(events, lines):
    parameters = guarded()
    model = make_detector(parameters)
    plant(model, LAYER, "forward", {7})
    result = train_detector(parameters, model=model, tracker=events)
    assert (result.step, result.skipped_steps) == (12, 1)
    [event] = events.of("skipped_step")
    assert event["step"] == 4
    assert len(event["image_ids"]) == 8
    assert event["values"]["train/loss"] == "nan"
    # The planted layer stands in the second micro-batch, before the encoder's proposals.
    assert event["faults"] == [
        "micro-batch 2: logits of the encoder's proposals, image 1 of the batch, are not finite"
    ]
    told = [line for line in lines if line.startswith("step 4 ")]
    assert len(told) == 1
    assert "is skipped: loss or gradients are not finite (micro-batch 2: logits of " in told[0]
    assert all(tensor.isfinite().all() for tensor in result.best_weights.values())
    assert all(math.isfinite(epoch["train/epoch_loss"]) for epoch in result.history)
    assert [epoch["train/skipped_steps"] for epoch in result.history] == [0, 1, 1, 1]


def test_the_loss_scalers_skips_do_not_count(events):
    """It begins at 65,536 and halves: twelve skips on end, and training goes on."""
    parameters = guarded(training={"precision": "fp16", "epochs": 5})
    model = make_detector(parameters)
    weight = model.get_submodule(LAYER).weight
    passes = []

    def overflow(gradient):
        passes.append(1)
        return gradient * math.inf if len(passes) <= 20 else gradient  # 12 steps: 20 passes

    weight.register_hook(overflow)
    result = train_detector(parameters, model=model, tracker=events)
    skips = events.of("skipped_step")
    assert [skip["step"] for skip in skips] == list(range(1, 13))
    assert not any(skip["counts"] for skip in skips)
    assert result.skipped_steps == 12
    assert not events.of("rollback")
    scales = [values["train/loss_scale"] for _, values in events.logged if "train/loss" in values]
    assert scales[0] == 65536
    assert min(scales) == 16


def test_a_loss_that_is_not_finite_counts_under_a_scaler_too(tmp_path, events):
    parameters = guarded(training={"precision": "fp16"})
    loader = SquaresLoader(change=poisoned({6, 7, 8}))
    train_detector(parameters, loader=loader, folder=tmp_path, tracker=events)
    assert [skip["counts"] for skip in events.of("skipped_step")][-3:] == [True] * 3
    assert len(events.of("rollback")) == 1


def test_an_isolated_skip_stays_within_the_budget(tmp_path, events):
    loader = SquaresLoader(change=poisoned({2, 6, 10}))
    guard = {"window_steps": 4, "max_skips": 2}
    result = train_detector(guarded(guard), loader=loader, folder=tmp_path, tracker=events)
    assert result.skipped_steps == 3
    assert not events.of("rollback")
    assert find_pins(tmp_path).keys() == {2, 6, 10}


def test_what_is_pinned_is_the_checkpoint_before_the_step(tmp_path):
    loader = SquaresLoader(change=poisoned({5}))
    train_detector(guarded({"anchor_steps": 50}), loader=loader, folder=tmp_path, seconds=0)
    pin = find_pins(tmp_path)[5]
    facts, tensors, _ = read_file(pin)
    assert facts["step"] in (3, 4)  # that of step 4 may just be being written
    assert tensors["state"]["step"] == facts["step"]
    # Its other name is gone, as it would be without the pin.
    assert {saved.step for saved in find_checkpoints(tmp_path)} == {0, 11, 12}
    assert pin.stat().st_nlink == 1
