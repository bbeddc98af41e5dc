"""Values of a run that is evaluated again: none at a step that has one, none twice."""

from __future__ import annotations

import math
from collections import Counter

from runkey.tracking.mlflow_run import TrackedRun
from runkey.tracking.store import Store, open_client
from runkey.tracking.sync import RunSender
from runkey.tracking.transfer import logged_run
from tests.support.mlflow_store import FAST, start_run


def again(store: Store, run_id: str, **values: float) -> dict[str, float]:
    """Add an evaluation to a run; return what the run shows then."""
    tracker = TrackedRun(None, RunSender(store, run_id), pace=FAST)
    tracker.log_again({f"eval/{name}": value for name, value in values.items()})
    assert tracker.close() == run_id
    return logged_run(open_client(store).get_run(run_id)).metrics


def points(store: Store, run_id: str, name: str) -> list[tuple[int, float]]:
    history = open_client(store).get_metric_history(run_id, f"eval/{name}")
    return sorted((one.step, one.value) for one in history)


def a_run(store: Store) -> str:
    tracker = start_run(store)
    tracker.log({"train/loss": 1.0}, 7)
    run_id = tracker.close()
    assert run_id
    return run_id


def test_each_evaluation_has_a_step_of_its_own(store: Store) -> None:
    run_id = a_run(store)
    again(store, run_id, AP=0.5, loss=2.0, AP_large=math.nan)
    again(store, run_id, AP=0.5, loss=2.0, AP_large=math.nan)
    assert points(store, run_id, "AP") == [(0, 0.5)]
    assert len(points(store, run_id, "AP_large")) == 1
    shown = again(store, run_id, AP=0.25, loss=2.0, AP_large=math.nan)
    assert shown["eval/AP"] == 0.25
    shown = again(store, run_id, AP=0.5, loss=2.5, AP_large=math.nan)  # as the first one
    assert (shown["eval/AP"], shown["eval/loss"]) == (0.5, 2.5)
    assert points(store, run_id, "AP") == [(0, 0.5), (1, 0.25), (2, 0.5)]
    for name in ("AP", "loss", "AP_large"):
        steps = Counter(step for step, _ in points(store, run_id, name))
        assert set(steps.values()) == {1}


def test_a_clock_that_was_set_back_hides_no_evaluation(store: Store) -> None:
    """Two points at step 0, as older versions left them, the newer one stamped in the future."""
    run_id, client = a_run(store), open_client(store)
    for value, stamp in ((0.5, 1_700_000_000_000), (0.6, 4_000_000_000_000)):
        client.log_metric(run_id, "eval/AP", value, timestamp=stamp, step=0)
    assert logged_run(client.get_run(run_id)).metrics["eval/AP"] == 0.6
    assert again(store, run_id, AP=0.4)["eval/AP"] == 0.4
    assert points(store, run_id, "AP") == [(0, 0.5), (0, 0.6), (1, 0.4)]
