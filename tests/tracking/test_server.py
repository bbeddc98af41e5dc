"""A real MLflow server that goes away in the middle of a run, and comes back."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from runkey.registry.claims import open_claims
from runkey.registry.library import open_library
from runkey.registry.once import decide
from runkey.registry.rest import list_page
from runkey.tracking.mlflow_run import Pace
from runkey.tracking.replay import send_saved
from runkey.tracking.store import VIEW, Store, experiment_id, open_client
from tests.support.mlflow_store import Server, until
from tests.support.points import assert_the_same_points, read_jsonl
from tests.support.stored_runs import log_runs
from tests.support.trainer import begin, log_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PACE = Pace(flush_seconds=0.5, retry_seconds=1.0)


def test_a_server_that_dies_comes_back_and_dies_for_good(
    server: Server, store: Store, tmp_path: Path, said: list[str]
) -> None:
    assert list_page(server.address, "detection", VIEW) == server.address  # not there yet
    remote = Store(server.address, None, tmp_path)
    tracker = begin(remote, tmp_path / "key", pace=PACE)
    tracker.log({"train/loss": 2.0}, 1)
    run_id = tracker.run_id(120)
    assert run_id is not None
    number = experiment_id(open_client(store), store, "detection")
    page = list_page(server.address, "detection", VIEW)
    assert f"/#/experiments/{number}/runs?viewStateShareKey=runkey&" in page
    assert "viewStateShareKey" not in list_page(server.address, "detection", "other")

    server.kill()
    for step in range(2, 30):
        tracker.log({"train/loss": 2.0 / step}, step)
    until(lambda: said)
    assert len(said) == 1
    assert said[0].endswith("the work goes on, values are kept and sent later")
    server.start()
    until(lambda: said[1:])
    assert said[1:] == ["MLflow: recording again"]
    history = open_client(store).get_metric_history(run_id, "train/loss")
    assert [m.step for m in history] == list(range(1, 30))

    server.kill()
    tracker.log({"train/loss": 1.0}, 30)
    started = time.monotonic()
    assert tracker.close() == run_id
    assert time.monotonic() - started < 60
    assert said[-2].startswith(f"MLflow: run {run_id} lacks 1 value (")
    assert [entry["step"] for entry in read_jsonl(log_of(tracker).path)] == list(range(1, 31))

    server.start()
    kept = shutil.copytree(tmp_path / "key", tmp_path / "kept")
    sent = send_saved(remote, tmp_path / "key")
    assert (sent.run_id, sent.status, sent.values) == (run_id, "FINISHED", 1)
    assert_the_same_points(kept / "train.jsonl", remote, run_id)
    assert send_saved(remote, kept).values == 0


def test_a_server_that_comes_back_on_another_port(
    server: Server, store: Store, tmp_path: Path
) -> None:
    """What is not sent yet goes to the same run; a finished run is found and its files are read."""
    first = Store(server.address, None, tmp_path)
    tracker = begin(first, tmp_path / "key", pace=PACE)
    tracker.log({"train/loss": 2.0}, 1)
    run_id = tracker.run_id(120)
    assert run_id is not None
    server.kill()
    tracker.log({"train/loss": 1.0}, 2)
    assert tracker.close() == run_id
    kept = shutil.copytree(tmp_path / "key", tmp_path / "kept")

    moved = Server(store)
    assert moved.address != server.address
    moved.start()
    try:
        there = Store(moved.address, None, tmp_path)
        sent = send_saved(there, tmp_path / "key")
        assert (sent.run_id, sent.status) == (run_id, "FINISHED")
        assert sent.values in (1, 2)  # the first was perhaps under way
        assert_the_same_points(kept / "train.jsonl", there, run_id)

        made = log_runs(store, tmp_path)[0]
        library = open_library(moved.address, tmp_path)
        found = decide(library, open_claims(moved.address, tmp_path), made.key)
        assert found.record is not None
        assert found.record.run.run_id == made.run.run_id
    finally:
        moved.kill()
