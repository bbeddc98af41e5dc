"""The score of a spike, and the budget of skips, against their definitions."""

import math
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runkey.errors import TrainingError
from runkey.training.build import safe_tracker
from runkey.training.guard import Guard, robust_score
from runkey.training.state import LoopState, StepValues
from tests.support.guarded import context_of
from tests.support.squares import SquaresLoader, detector_params, make_detector

numbers = st.floats(-1e6, 1e6)
histories = st.lists(numbers, min_size=1, max_size=40)


@given(histories, numbers)
def test_score_is_finite_and_has_the_sign_of_the_distance(history, value):
    score = robust_score(value, history)
    assert math.isfinite(score)
    assert (score > 0) == (value > median(history))


@given(st.lists(st.integers(1, 1000), min_size=3, max_size=20), st.integers(1, 1000))
def test_score_does_not_depend_on_the_unit(history, value):
    doubled = robust_score(2.0 * value, [2.0 * h for h in history])
    assert doubled == pytest.approx(robust_score(value, history), rel=1e-9, abs=1e-12)


def test_score_of_a_normal_sample_is_in_standard_deviations():
    from statistics import NormalDist

    sample = [NormalDist(5, 2).inv_cdf((i + 0.5) / 1001) for i in range(1001)]
    assert robust_score(5 + 3 * 2, sample) == pytest.approx(3, rel=0.01)


def test_a_few_wild_values_do_not_hide_a_spike():
    history = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02, 0.98, 1e30, 1e30]
    assert robust_score(3.0, history) > 10


def test_equal_losses_do_not_make_everything_a_spike():
    assert robust_score(1.001, [1.0] * 20) == pytest.approx(1.0)
    assert robust_score(2.0, [1.0] * 20) > 100


@pytest.fixture(scope="module")
def context():
    guard = {"max_skips": 3, "window_steps": 7, "anchor_steps": 1}
    parameters = detector_params(training={"guard": guard})
    return context_of(parameters, make_detector(parameters), SquaresLoader())


def reading(step, skipped):
    loss = math.nan if skipped else 1.0
    values = {"train/loss": loss, "train/grad_norm": loss, "skipped": float(skipped)}
    return StepValues(step, (1, 2), {"train/lr": 1e-3}, values)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.booleans(), min_size=1, max_size=30),
    st.sets(st.integers(1, 30)),
    st.sets(st.integers(1, 30)),
)
def test_budget_is_used_up_when_the_window_holds_so_many(context, flags, settled, resumed):
    """Whenever checkpoints made values known earlier, or training went on from one."""
    state = LoopState()
    guard, noted, stopped = Guard(context, state, safe_tracker(None), None), 0, None

    def note(step):
        nonlocal noted
        if step > noted:
            guard.note(reading(step, flags[step - 1]))
            noted = step

    for step in range(1, len(flags) + 1):
        state.step = step
        if step > 1:
            note(step - 1)
        try:
            guard.act()
        except TrainingError:
            stopped = step
            break
        if step in settled | resumed:
            note(step)
        if step in resumed:
            state = LoopState.from_plain(state.as_plain(), {})
            guard = Guard(context, state, safe_tracker(None), None)
    expected = next(
        (
            step
            for step in range(2, len(flags) + 1)
            if sum(flags[max(0, step - 1 - 7) : step - 1]) >= 3
        ),
        None,
    )
    assert stopped == expected
