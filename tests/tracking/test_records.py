"""What MLflow has of a run, against a real store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from runkey.errors import TrackingError
from runkey.identity.record import LoggedRun, Record
from runkey.registry.library import LocalLibrary
from runkey.tracking.store import Store, open_client, set_tag
from runkey.tracking.transfer import logged_run, write_details
from tests.support.mlflow_store import RECORD, start_run


def test_a_run_is_told_when_it_begins_and_when_it_ends(store: Store) -> None:
    changes: list[LoggedRun] = []
    running = start_run(store, on_change=changes.append)
    running.log({"train/loss": 2.0, "system/cpu": 50.0}, 1)
    running.log({"train/loss": float("nan")}, 2)
    running.log({"train/loss": 1.5}, 3)
    running.tag("key.audit", "ok")
    run_id = running.close()
    assert [(run.run_id, run.status, run.metrics) for run in changes] == [
        (run_id, "RUNNING", {}),
        (run_id, "FINISHED", {"train/loss": 1.5}),
    ]
    assert changes[1].tags["key.audit"] == "ok"
    assert not [name for name in changes[1].tags if name.startswith("mlflow.")]
    assert changes[1] == logged_run(open_client(store).get_run(str(run_id)))
    assert changes[1].started_ms <= int(changes[1].ended_ms or 0)


def test_runs_of_dead_processes_are_ended_once(store: Store) -> None:
    client = open_client(store)
    dead, done = (client.create_run("0", run_name=name).info.run_id for name in ("dead", "done"))
    client.set_terminated(done, "FINISHED")
    changes: list[LoggedRun] = []
    run_id = start_run(store, done, "0" * 32, dead, on_change=changes.append).close()
    assert [(run.run_id, run.status) for run in changes] == [
        (run_id, "RUNNING"),
        (dead, "KILLED"),
        (run_id, "FINISHED"),
    ]
    assert client.get_run(done).info.status == "FINISHED"


def test_details_are_kept_with_the_run_and_can_be_replaced(store: Store) -> None:
    run_id = str(start_run(store).close())
    open_client(store).set_tag(run_id, "key", f"rk2-{'0' * 64}")
    assert read_again(store).details is None
    first = write_details(store, run_id, RECORD)
    assert read_again(store) == Record(run=first, details=RECORD)
    more = replace(RECORD, outcomes=[{"identical": True}])
    second = write_details(store, run_id, more, {"reproduced": "identical"})
    assert read_again(store) == Record(run=second, details=more)
    assert second.tags["reproduced"] == "identical"


def read_again(store: Store) -> Record:
    """The store's one run, as `runkey index` reads it."""
    library = LocalLibrary(store.home, uri=store.uri)
    library.rebuild()
    (record,) = library.matching("")
    return record


def test_a_tag_is_set_without_mlflow(store: Store, tmp_path: Path) -> None:
    run_id = str(start_run(store).close())

    def never(path: str, content: dict[str, str]) -> None:
        raise AssertionError(path)

    for value in ("first", "second"):
        set_tag(store, run_id, "reused", value, never)
    assert open_client(store).get_run(run_id).data.tags["reused"] == "second"
    empty = Store(f"sqlite:///{tmp_path}/empty.db", None, tmp_path)
    with pytest.raises(TrackingError, match="no such table"):
        set_tag(empty, run_id, "reused", "x", never)
    sent: list[tuple[str, dict[str, str]]] = []
    server = Store("http://127.0.0.1:9", None, tmp_path)
    set_tag(server, run_id, "reused", "x", lambda path, content: sent.append((path, content)))
    assert sent == [("runs/set-tag", {"run_id": run_id, "key": "reused", "value": "x"})]
