"""When training stops, and what it says."""

import pytest

from runkey.errors import TrainingError
from runkey.params import EarlyStopping
from runkey.training.schedule import (
    check_watched,
    decide_stop,
    improvements,
    loss_gap,
)

NAN = float("nan")

TABLE = [
    # history, mode, min_delta, patience, stops, waited
    ([], "max", 0, 1, False, 0),
    ([0.1], "max", 0, 1, False, 0),
    ([0.1, 0.1], "max", 0, 1, True, 1),  # the same again is no improvement
    ([0.1, 0.1], "max", 0, 2, False, 1),
    ([0.1, 0.2, 0.3], "max", 0, 1, False, 0),
    ([0.3, 0.2, 0.1], "max", 0, 2, True, 2),
    ([0.3, 0.2, 0.1], "min", 0, 2, False, 0),
    ([0.1, 0.2, 0.3], "min", 0, 2, True, 2),
    ([0.3, 0.2, 0.31, 0.2], "max", 0, 2, False, 1),
    ([0.3, 0.2, 0.31, 0.2], "max", 0.05, 2, True, 3),  # 0.01 more is too little
    ([0.30, 0.33, 0.36], "max", 0.05, 2, False, 0),  # measured from the best that counted
    ([NAN], "max", 0, 1, True, 1),
    ([NAN, 0.1], "max", 0, 2, False, 0),
    ([NAN, 0.1], "min", 0, 2, False, 0),
    ([0.1, NAN, NAN], "max", 0, 2, True, 2),
    ([0.1, NAN, NAN], "min", 0, 2, True, 2),
    ([float("-inf"), float("-inf")], "max", 0, 3, False, 2),
    ([float("inf"), 5.0], "min", 0, 2, False, 0),
]


@pytest.mark.parametrize(("history", "mode", "min_delta", "patience", "stops", "waited"), TABLE)
def test_table(history, mode, min_delta, patience, stops, waited):
    assert len(history) - max(improvements(history, mode, min_delta), default=0) == waited
    section = EarlyStopping(mode=mode, min_delta=min_delta, patience=patience)
    reason = decide_stop(history, section)
    assert bool(reason) == stops
    assert f": {waited} without improvement" in reason or not stops
    assert decide_stop(history, section.model_copy(update={"enabled": False})) == ""


def test_says_what_it_saw():
    section = EarlyStopping(min_delta=0.01, patience=2)
    assert decide_stop([0.2, 0.3125, 0.3, 0.31], section) == (
        "early stop: best val/AP 0.3125 at evaluation 2 of 4, then 0.3, 0.31: "
        "2 without improvement by more than 0.01"
    )
    reason = decide_stop([NAN, NAN], EarlyStopping(patience=2))
    assert reason == "early stop: val/AP was never a number: 2 without improvement"
    reason = decide_stop([0.5, *(n / 100 for n in range(10))], EarlyStopping(patience=10))
    assert "of 11, then ... 0.02, 0.03, " in reason


def test_gap_is_of_what_both_losses_have():
    values = {"train/epoch_loss": 3.0, "train/epoch_loss_denoising": 0.5, "train/epoch_loss_l1": 1}
    assert loss_gap(values, {"val/loss": 2.75, "val/AP": 0.5}) == {"val/loss_gap": 0.25}
    assert loss_gap(values, {"val/AP": 0.5}) == {}
    del values["train/epoch_loss_denoising"]
    assert loss_gap(values, {"val/loss": 2.75}) == {"val/loss_gap": -0.25}


def test_a_metric_that_is_not_there_is_named():
    with pytest.raises(TrainingError) as caught:
        check_watched({"val/loss": 1.0, "val/AP": 0.5}, "val/ap")
    assert str(caught.value) == (
        "params.yaml: training.early_stopping.metric = 'val/ap' is not logged at evaluations; "
        "there are: val/AP, val/loss"
    )
