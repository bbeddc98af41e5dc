"""What a training does when its numbers go wrong, on the real model, loss and checkpoints."""

import dataclasses
import json
import math

import pytest
import torch

from runkey.errors import ModelError, TrainingError
from runkey.model.criterion import build_criterion
from runkey.training.checkpoint.file import read_file
from runkey.training.checkpoint.names import find_saved
from runkey.training.distributed import World
from runkey.training.guard.pins import find_pins
from runkey.training.loop import fit, take_step
from runkey.training.setup import build_setup
from runkey.training.state import LoopState, host_weights
from runkey.training.tracker import Quiet
from tests.support.planted import plant
from tests.support.squares import (
    CLASSES,
    CPU,
    SquaresLoader,
    detector_params,
    folder_checkpoints,
    make_detector,
    train_detector,
)

LAYER = "transformer.encoder.layers.0.linear2"
GUARD = {"max_skips": 3, "window_steps": 50, "anchor_steps": 4, "max_rollbacks": 1}


def poisoned(steps, factor=1e38):
    """Windows with one true box whose numbers are huge, at some steps."""

    def change(step, window):
        if step not in steps:
            return window
        boxes = window[0].boxes_cxcywh.clone()
        boxes[0] *= factor
        return (dataclasses.replace(window[0], boxes_cxcywh=boxes), *window[1:])

    return change


def guarded(guard=None, **sections):
    training = {"epochs": 4, "guard": GUARD | (guard or {})} | sections.pop("training", {})
    return detector_params(training=training, **sections)


def setup_of(parameters, model, loader):
    return build_setup(
        model,
        build_criterion(parameters.model, CLASSES),
        loader,
        lambda _: {},
        parameters,
        device=CPU,
        tracker=Quiet(),
        say=print,
        world=World(),
    )


def bits(tree):
    """All tensors as bytes (torch.equal takes -0 for 0), but for the planted module's counter."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone().contiguous().numpy().tobytes()
    if isinstance(tree, dict):
        return {k: bits(v) for k, v in tree.items() if not str(k).endswith((".count", "updates"))}
    return [bits(item) for item in tree] if isinstance(tree, list | tuple) else tree


@pytest.mark.parametrize("precision", ["off", "fp16"])
@pytest.mark.parametrize("how", ["forward", "backward"])
def test_a_skipped_step_leaves_nothing_behind(how, precision):
    """Weights, moments, counters, batch norm's statistics and the average, bit for bit."""
    parameters = guarded(training={"precision": precision})
    model = make_detector(parameters)
    plant(model, LAYER, how, {7})
    loader = SquaresLoader()
    setup, state = setup_of(parameters, model, loader), LoopState()
    model.train()
    windows = [*loader.epoch(0), *loader.epoch(1)]
    for window in windows[:3]:
        take_step(setup, state, window, [])
    before = bits({name: part.state_dict() for name, part in setup.parts.items()})
    result, _ = take_step(setup, state, windows[3], [])
    assert result.skipped == 1
    assert math.isnan(result.losses["loss"]) == (how == "forward")
    after = bits({name: part.state_dict() for name, part in setup.parts.items()})
    before.pop("scaler", None), after.pop("scaler", None)
    # The schedule's rate is set before anyone knows.
    for parts in (before, after):
        for group in parts["optimizer"]["param_groups"]:
            del group["lr"]
    assert before == after
    result, _ = take_step(setup, state, windows[4], [])
    assert result.skipped == 0


def test_a_forward_pass_that_is_not_finite_is_a_skipped_step(events):
    parameters = guarded()
    model, lines = make_detector(parameters), []
    plant(model, LAYER, "forward", {7})
    result = train_detector(parameters, model=model, tracker=events, say=lines.append)
    assert (result.steps, result.skipped_steps) == (12, 1)
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
    assert all(tensor.isfinite().all() for tensor in result.best_state.values())
    assert all(math.isfinite(epoch["train/epoch_loss"]) for epoch in result.history)
    assert [epoch["train/skipped_steps"] for epoch in result.history] == [0, 1, 1, 1]


def test_goes_back_when_the_budget_is_used_up(events, tmp_path):
    lines = []
    result = train_detector(
        guarded(),
        loader=SquaresLoader(change=poisoned({6, 7, 8})),
        folder=tmp_path,
        tracker=events,
        say=lines.append,
    )
    assert (result.steps, result.skipped_steps) == (12, 3)
    # Step 8 is known to be skipped after step 9; no anchor was written at step 8.
    assert events.of("rollback") == [
        {
            "step": 9,
            "to": 4,
            "reason": "loss or gradients were not finite in 3 of the last 8 steps",
        }
    ]
    [line] = [line for line in lines if "back to the weights of step 4" in line]
    assert line.startswith("after step 9: loss or gradients were not finite in 3 of the last 8")
    report = json.loads((tmp_path / "bad-step-6.json").read_text())
    assert report["step"] == 6
    assert [skip["step"] for skip in report["skips"]] == [6, 7, 8]
    assert report["skips"][0]["values"]["train/loss_l1"] == "inf"
    assert report["outcome"].startswith("back to the weights of step 4")
    assert len(report["latest_grad_norms"]) == 8
    assert find_pins(tmp_path).keys() == {6}
    content = folder_checkpoints(tmp_path).load()
    assert (content.step, content.state["epoch"]) == (12, 4)
    assert content.state["guard"]["skips"] == []
    assert len(content.state["guard"]["rollbacks"]) == 1


def test_after_going_back_all_is_as_it_was(tmp_path):
    """Steps 10 to 12 from the anchor of step 4, with their own images, rates and noise."""
    parameters, loader = guarded(), SquaresLoader(change=poisoned({6, 7, 8}))
    model = make_detector(parameters)
    train_detector(parameters, model=model, loader=loader, folder=tmp_path)
    expected = make_detector(parameters)
    setup, state = setup_of(parameters, expected, loader), LoopState()
    expected.train()
    windows = [window for epoch in range(4) for window in loader.epoch(epoch)]
    for window in windows[:4]:
        take_step(setup, state, window, [])
    state.step = 9
    for window in windows[9:]:
        take_step(setup, state, window, [])
    assert bits(dict(model.state_dict())) == bits(dict(expected.state_dict()))


class KilledError(Exception):
    """Ends a training, as far as a test in one process goes."""


@pytest.mark.parametrize("steps", [(8, 9), (10,), (9, 10, 11)], ids=str)
def test_an_interrupted_training_goes_back_in_the_same_way(tmp_path, steps):
    change = poisoned({6, 7, 8})
    parameters = guarded({"spike_history": 3, "spike_score": 1.0})
    train_detector(parameters, loader=SquaresLoader(change=change), folder=tmp_path / "whole")

    def killed_before(step):
        def killing(number, window):
            if number == step:
                raise KilledError
            return change(number, window)

        return killing

    for step in steps:
        loader = SquaresLoader(change=killed_before(step))
        with pytest.raises(KilledError):
            train_detector(parameters, loader=loader, folder=tmp_path / "cut", seconds=0)
    train_detector(parameters, loader=SquaresLoader(change=change), folder=tmp_path / "cut")
    whole, cut = (folder_checkpoints(tmp_path / name).load() for name in ("whole", "cut"))
    assert bits(whole.parts) == bits(cut.parts)
    assert repr(whole.state["guard"]) == repr(cut.state["guard"])  # in which nan is nan
    assert whole.state["guard"]["spikes"] > 0


def test_stops_with_a_report_when_going_back_does_not_help(events, tmp_path):
    parameters = guarded({"max_skips": 2})
    loader = SquaresLoader(change=poisoned(set(range(5, 99))))
    with pytest.raises(TrainingError) as caught:
        train_detector(parameters, loader=loader, folder=tmp_path, tracker=events)
    line = str(caught.value)
    assert "\n" not in line
    # Skipped: 5, 6; back after 7; 7 is known, and 8, 9 in a row: 8 is known after 9.
    assert line.startswith("step 8 (lr 0.00")
    report = tmp_path / "bad-step-7.json"
    assert f"; gone back 1 times already; see {report}, and `runkey debug-step --step 7`" in line
    content = json.loads(report.read_text())
    assert content["outcome"] == "stopped: gone back 1 times already"
    assert [(one["at"], one["to"]) for one in content["rollbacks"]] == [(7, 4)]
    assert [skip["step"] for skip in content["skips"]] == [7, 8]
    assert len(content["skips"][0]["image_ids"]) == 8
    assert events.of("gave_up")[0]["step"] == 9
    assert (tmp_path / "bad-step-5.json").is_file()


def test_without_anchors_it_stops_at_once():
    loader = SquaresLoader(change=poisoned({2, 3, 4}))
    with pytest.raises(TrainingError, match=r"^step 4 .*there is no anchor to go back to; a lower"):
        train_detector(guarded(), loader=loader)


def breaks_weights(model, step):
    """Weights that become infinite right before a step, as an update could leave them."""

    def change(number, window):
        if number == step:
            with torch.no_grad():
                model.get_submodule(LAYER).weight[0, 0] = torch.inf
        return window

    return change


@pytest.mark.parametrize("step", [5, 12], ids=["in an epoch", "before an evaluation"])
def test_weights_that_are_not_finite_are_noticed_after_one_step_more(events, tmp_path, step):
    """No ten skips are waited for: none of them could help."""
    # Without an average: it would stay finite, and be evaluated.
    parameters = guarded({"max_skips": 10}, training={"ema_decay": 0.0})
    model = make_detector(parameters)
    loader = SquaresLoader(change=breaks_weights(model, step))
    result = train_detector(parameters, model=model, loader=loader, folder=tmp_path, tracker=events)
    [rollback] = events.of("rollback")
    assert rollback["reason"] == "weights are not finite"
    assert rollback["step"] == min(step + 1, 12)
    assert rollback["to"] == (4 if step == 5 else 8)
    assert all(tensor.isfinite().all() for tensor in result.best_state.values())
    assert math.isfinite(result.best_metrics["val/loss"])


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


def test_a_spike_is_told_and_changes_nothing(events):
    change = poisoned({9}, factor=30.0)
    lines, results = [], []
    for score in (6.0, 0.0):
        parameters = guarded({"spike_history": 6, "spike_score": score})
        results.append(
            train_detector(
                parameters,
                loader=SquaresLoader(change=change),
                tracker=events if score else Quiet(),
                say=lines.append,
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
    assert bits(results[0].best_state) == bits(results[1].best_state)


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
    assert {saved.step for saved in find_saved(tmp_path)} == {0, 11, 12}
    assert pin.stat().st_nlink == 1


def test_a_model_that_predicts_nan_is_not_the_end(events):
    """An evaluation says so; the weights kept are of a finite one, and training has gone on."""
    parameters, evaluated = guarded(training={"evaluate_every": 1}), []

    def evaluate(module):
        evaluated.append(1)
        if len(evaluated) == 2:
            raise ModelError("the model predicts NaN or infinity")
        return {"val/loss": float(len(evaluated))}

    lines = []
    result = fit(
        make_detector(parameters),
        build_criterion(parameters.model, CLASSES),
        SquaresLoader(),
        evaluate,
        parameters,
        device=CPU,
        tracker=events,
        say=lines.append,
    )
    assert (result.steps, result.best_epoch) == (12, 1)
    assert [math.isnan(epoch["val/loss"]) for epoch in result.history] == [
        False,
        True,
        False,
        False,
    ]
    assert events.of("evaluation_failed")[0]["step"] == 6
    assert lines[-1].startswith(
        "all 4 epochs done; kept the weights of epoch 1 (val/loss 1); held-"
    )


def test_the_gap_and_what_was_kept_are_told(events):
    """Training loss falls, held-out loss rises after epoch 2: the weights of epoch 2 are kept."""
    parameters = guarded(
        training={
            "evaluate_every": 1,
            "epochs": 9,
            "early_stopping": {"metric": "val/loss", "mode": "min", "patience": 2},
        }
    )
    values = iter([20.0, 15.0, 16.0, 17.0])
    seen, lines = [], []

    def evaluate(module):
        seen.append(host_weights(module))
        return {"val/loss": next(values)}

    result = fit(
        make_detector(parameters),
        build_criterion(parameters.model, CLASSES),
        SquaresLoader(),
        evaluate,
        parameters,
        device=CPU,
        tracker=events,
        say=lines.append,
    )
    assert bits(result.best_state) == bits(seen[1])
    assert lines[-1].startswith(
        "early stop: best val/loss 15 at evaluation 2 of 4, then 16, 17: 2 without improvement; "
        "kept the weights of epoch 2 (val/loss 15); held-out loss minus training loss: "
    )
    gaps = [epoch["val/loss_gap"] for epoch in result.history]
    assert gaps == [e["val/loss"] - e["train/epoch_loss"] for e in result.history]
    assert f"{gaps[1]:.3g} there, {gaps[3]:.3g} at the end" in lines[-1]
