"""PostgreSQL behind a real MLflow server ends in the middle of transactions, and comes back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runkey.tracking.mlflow_run import Pace
from runkey.tracking.store import Store
from tests.support.mlflow_store import Server, until
from tests.support.points import assert_the_same_points
from tests.support.team_servers import (
    Postgres,
    needs_packages,
    needs_postgres,
    postgres,
    with_packages,
)
from tests.support.trainer import begin, log_of, log_steps

__all__ = ["postgres"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_packages, needs_postgres]


def test_a_transaction_that_ends_in_its_middle_is_sent_again(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name, value in with_packages(dict(os.environ)).items():
        monkeypatch.setenv(name, value)
    server = Server(Store(postgres.uri, tmp_path / "artifacts", tmp_path))
    server.start()
    try:
        remote = Store(server.address, None, tmp_path)
        tracker = begin(remote, tmp_path / "key", pace=Pace(flush_seconds=0.2, retry_seconds=0.5))
        log_steps(tracker, 1, 20)
        run_id = tracker.run_id(120)
        assert run_id
        for number, table in enumerate(("metrics", "latest_metrics", "tags"), start=1):
            with postgres.locked(table):
                log_steps(tracker, 20 * number + 1, 20 * number + 20)
                until(lambda: postgres.waiting)
                postgres.end()
            until(lambda: said)
            postgres.start()
            until(lambda: said[-1] == "MLflow: recording again")
            assert len(said) == 2
            assert said[0].endswith("the work goes on, values are kept and sent later")
            said.clear()
        log_steps(tracker, 81, 90)
        assert tracker.close() == run_id
        assert said == []
        assert_the_same_points(log_of(tracker).path, remote, run_id)
    finally:
        server.kill()
