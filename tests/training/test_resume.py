"""Training that goes on from a checkpoint at any step is the training that was never stopped."""

import dataclasses
import json

import pytest
import torch

from runkey.training.checkpoint import Checkpoint
from runkey.training.device import configure_torch
from runkey.training.state import LoopState
from tests.support import toy
from tests.support.fitting import fit


@pytest.fixture(scope="module")
def parameters():
    """All that has state: an average, plateau, early stopping, a partial last window."""
    return toy.make_params(
        lr=3e-3,
        schedule={"name": "plateau", "patience": 1, "warmup_fraction": 0.1},
        training={
            "epochs": 6,
            "evaluate_every": 2,
            "ema_decay": 0.9,
            "early_stopping": {"metric": "val/loss", "mode": "min", "patience": 2},
        },
    )


def train(parameters, checkpoints=None, tracker=None, workers=None):
    configure_torch(parameters.seed, deterministic=True)
    model = toy.ToyModel(dropout=0.3)
    result = fit(
        model,
        toy.ToyCriterion(),
        toy.ToyLoader(micro_batch=3),
        toy.val_loss,
        parameters,
        tracker=tracker,
        checkpoints=checkpoints,
    )
    return result, model


def equal(left, right):
    """Bit for bit, through all that is nested."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.stride() == right.stride()
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


def without_clock(value):
    """The same without what no two trainings share: times and paces."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if "second" not in k and "wait" not in k}
        return {k: without_clock(v) for k, v in kept.items()}
    return [without_clock(v) for v in value] if isinstance(value, list | tuple) else value


def events_but_resumed(tracker):
    return [(k, without_clock(f)) for k, f in tracker.events if k != "resumed"]


@pytest.fixture(scope="module")
def uninterrupted(parameters):
    """Result, checkpoints and log of a training that nobody stopped."""
    tracker, checkpoints = toy.MemoryTracker(), toy.SavedInMemory()
    result, _ = train(parameters, checkpoints, tracker)
    assert checkpoints.saved == 1 + 18 + 6 + 1
    return result, checkpoints, tracker


# The start, 18 steps and 6 ends of epochs.
@pytest.mark.parametrize("stop_after", range(1, 26))
def test_stopped_anywhere_it_is_the_same_training(parameters, uninterrupted, stop_after):
    whole, whole_checkpoints, whole_tracker = uninterrupted
    stopped, tracker = toy.SavedInMemory(stop_after=stop_after), toy.MemoryTracker()
    with pytest.raises(toy.StoppedError):
        train(parameters, stopped, tracker)
    torch.rand(3)
    again = toy.SavedInMemory(stopped.content)
    resumed, _ = train(parameters, again, tracker)

    assert equal(resumed.best_weights, whole.best_weights)
    assert equal(again.content.parts, whole_checkpoints.content.parts)
    assert without_clock(again.content.state) == without_clock(whole_checkpoints.content.state)
    fields = [dataclasses.asdict(r) | {"best_weights": None} for r in (resumed, whole)]
    assert without_clock(fields[0]) == without_clock(fields[1])
    assert without_clock(tracker.logged) == without_clock(whole_tracker.logged)
    assert events_but_resumed(tracker) == events_but_resumed(whole_tracker)
    assert again.saved == 26 - stop_after


def test_checkpoints_change_nothing(parameters):
    without, model = train(parameters, None, first := toy.MemoryTracker())
    with_them, same = train(parameters, toy.SavedInMemory(), second := toy.MemoryTracker())
    assert equal(with_them.best_weights, without.best_weights)
    assert equal(same.state_dict(), model.state_dict())
    assert without_clock(first.logged) == without_clock(second.logged)


def test_resumes_after_the_end(parameters, lines):
    """A process that dies between the last step and the recorded run has nothing to train again."""
    kept = toy.SavedInMemory()
    whole, _ = train(parameters, kept)
    configure_torch(parameters.seed, deterministic=True)
    again = fit(
        toy.ToyModel(dropout=0.3),
        toy.ToyCriterion(),
        toy.ToyLoader(micro_batch=3),
        lambda _: pytest.fail("evaluated again"),
        parameters,
        checkpoints=toy.SavedInMemory(kept.content),
    )
    assert again.seconds == whole.seconds
    assert equal(again.best_weights, whole.best_weights)
    assert "resuming after step 18 of 18" in lines


def test_the_state_is_plain_and_whole(parameters):
    kept = toy.SavedInMemory(stop_after=12)
    with pytest.raises(toy.StoppedError):
        train(parameters, kept)
    plain = kept.content.state
    read = json.loads(json.dumps(plain))
    assert read == plain
    state = LoopState.from_plain(read, {})
    assert state.as_plain() == plain
    assert state.best.step == 6
    assert {f.name for f in dataclasses.fields(state)} == {*plain, "best_weights"}


def test_what_is_saved_does_not_change_with_the_training(parameters):
    """`as_plain` copies: a content may be written while training goes on."""
    state = LoopState()
    plain = state.as_plain()
    state.evaluations.append({"val/AP": 0.1})
    state.running.add_values({"loss": 1.0})
    assert plain == LoopState().as_plain()
    assert isinstance(Checkpoint(0, plain, {}, {}, {}).state["running"]["sums"], dict)
