"""Training that goes back to an anchor when its numbers go wrong, or stops, on real checkpoints."""

import json
import math

import pytest
import torch

from runkey.errors import TrainingError
from runkey.training.guard import find_pins
from runkey.training.loop import take_step
from runkey.training.state import LoopState
from tests.support.guarded import LAYER, bits, context_of, guarded, poisoned
from tests.support.squares import SquaresLoader, folder_checkpoints, make_detector, train_detector


def test_goes_back_when_the_budget_is_used_up(events, lines, tmp_path):
    result = train_detector(
        guarded(),
        loader=SquaresLoader(change=poisoned({6, 7, 8})),
        folder=tmp_path,
        tracker=events,
    )
    assert (result.step, result.skipped_steps) == (12, 3)
    # Step 8 is known to be skipped after step 9; no anchor was written at step 8.
    assert events.of("rollback") == [
        {
            "step": 9,
            "to": 4,
            "reason": "loss or gradients were not finite in 3 of the last 8 steps",
        }
    ]
    [line] = [line for line in lines if "rolled back to the weights of step 4" in line]
    assert line.startswith("after step 9: loss or gradients were not finite in 3 of the last 8")
    report = json.loads((tmp_path / "bad-step-6.json").read_text())
    assert report["step"] == 6
    assert [skip["step"] for skip in report["skips"]] == [6, 7, 8]
    assert report["skips"][0]["values"]["train/loss_l1"] == "inf"
    assert report["outcome"].startswith("rolled back to the weights of step 4")
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
    context, state = context_of(parameters, expected, loader), LoopState()
    expected.train()
    windows = [window for epoch in range(4) for window in loader.epoch(epoch)]
    for window in windows[:4]:
        take_step(context, state, window, [])
    state.step = 9
    for window in windows[9:]:
        take_step(context, state, window, [])
    assert bits(dict(model.state_dict())) == bits(dict(expected.state_dict()))


class KilledError(Exception):
    """Ends a training, as far as a test in one process goes."""


@pytest.mark.parametrize("steps", [(8, 9), (10,), (9, 10, 11)], ids=str)
def test_an_interrupted_training_goes_back_in_the_same_way(tmp_path, steps):
    change = poisoned({6, 7, 8})
    parameters = guarded({"spike_history": 3, "spike_score": 0.5})
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
    assert f"; already rolled back 1 time; see {report}, and `runkey debug-step --step 7`" in line
    content = json.loads(report.read_text())
    assert content["outcome"] == "stopped: already rolled back 1 time"
    assert [(one["at"], one["to"]) for one in content["rollbacks"]] == [(7, 4)]
    assert [skip["step"] for skip in content["skips"]] == [7, 8]
    assert len(content["skips"][0]["image_ids"]) == 8
    assert events.of("gave_up")[0]["step"] == 9
    assert (tmp_path / "bad-step-5.json").is_file()


def test_without_anchors_it_stops_at_once():
    loader = SquaresLoader(change=poisoned({2, 3, 4}))
    with pytest.raises(
        TrainingError, match=r"^step 4 .*there is no anchor to roll back to; a lower"
    ):
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
    assert all(tensor.isfinite().all() for tensor in result.best_weights.values())
    assert math.isfinite(result.best.metrics["val/loss"])
