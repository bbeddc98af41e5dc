"""`runkey replay`: a training that MLflow has not, or not whole, is sent from its folder."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runkey.cli import app
from runkey.errors import TrackingError
from runkey.identity.record import DETAILS, RunPointer
from runkey.registry.library import open_library
from runkey.tracking.replay import ARTIFACTS, DESCRIPTION, ENDED, read_training
from runkey.tracking.store import Store, open_client
from tests.support.mlflow_store import RECORD
from tests.support.points import assert_the_same_points
from tests.support.trainer import KEY, begin, log_of, log_steps

Run = Callable[..., str]


@pytest.fixture
def folder(store: Store) -> Path:
    return store.home / KEY


@pytest.fixture
def run(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command, in a checkout that holds the store."""
    (tmp_path / "params.yaml").touch()
    (tmp_path / "stages").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)

    def replay(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["replay", *arguments])
        assert result.exit_code == code, (result.output, result.exception)
        return result.output if code == 0 else f"{type(result.exception)}: {result.exception}"

    return replay


def ended_without(table: str, store: Store, folder: Path, tmp_path: Path, said: list[str]) -> Path:
    """A training that ended well, but for a table that MLflow lacks from its 10th step on.

    Returns:
        The log, as it ended.
    """
    outputs = tmp_path / "outputs"
    (outputs / "model").mkdir(parents=True)
    (outputs / "model" / "weights.pt").write_bytes(b"weights")
    (outputs / DETAILS).write_text(RECORD.as_json())
    tracker = begin(store, folder)
    log_steps(tracker, 1, 9)
    assert tracker.run_id(60)
    assert store.database is not None
    with sqlite3.connect(store.database) as database:
        database.execute(f"ALTER TABLE {table} RENAME TO hidden")
    log_steps(tracker, 10, 50)
    tracker.tag("key.audit", "ok")
    tracker.artifact(outputs / "model", "model")
    tracker.artifact(outputs / DETAILS)
    tracker.finish_logs()
    tracker.close()
    assert not tracker.is_whole
    with database:
        database.execute(f"ALTER TABLE hidden RENAME TO {table}")
    database.close()
    (outputs / "model" / "weights.pt").unlink()  # the next training's are there
    return folder / "train.jsonl"


@pytest.mark.parametrize("table", ["metrics", "runs"])
def test_a_run_that_lacks_something_is_finished(
    store: Store, folder: Path, tmp_path: Path, said: list[str], run: Run, table: str
) -> None:
    log = ended_without(table, store, folder, tmp_path, said)
    kept = tmp_path / "kept.jsonl"
    kept.write_bytes(log.read_bytes())
    assert said[-1] == f"MLflow: `runkey replay {KEY[:16]}` sends the rest from {folder}"
    pointer = RunPointer.read(folder)
    assert pointer is not None
    output = run(KEY[:10])
    assert output.startswith(f"run {pointer.run_id}, FINISHED: ")
    assert output.endswith(" values and 2 files sent\n")

    run_id = str(pointer.run_id)
    assert_the_same_points(kept, store, run_id)
    recorded = open_client(store).get_run(run_id)
    assert (recorded.info.status, recorded.data.tags["key.audit"]) == ("FINISHED", "ok")
    artifacts = tmp_path / "mlartifacts" / run_id / "artifacts"
    assert (artifacts / "model" / "weights.pt").read_bytes() == b"weights"
    (record,) = open_library(store.uri, store.home).matching(KEY)
    assert record.is_whole
    assert record.details == RECORD
    assert not folder.exists()
    said_again = f"run {run_id}, FINISHED: nothing is kept here that it could lack\n"
    assert run(KEY[:10]) == said_again
    assert json.loads(run(KEY, "--json"))["values"] == 0


def test_a_run_that_was_never_made_is_made(
    store: Store, folder: Path, tmp_path: Path, said: list[str], run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = begin(Store("http://127.0.0.1:9", None, store.home), folder)
    log_steps(tracker, 1, 30)
    tracker.close()
    assert said[-1] == f"MLflow: `runkey replay {KEY[:16]}` sends the rest from {folder}"
    ended = json.loads((folder / ENDED).read_text())["ended_ms"]
    log = tmp_path / "kept.jsonl"
    log.write_bytes((folder / "train.jsonl").read_bytes())
    answer = json.loads(run(KEY, "--json"))
    points = assert_the_same_points(log, store, answer["run_id"])
    assert answer["values"] == points.total()
    recorded = open_client(store).get_run(answer["run_id"])
    assert recorded.info.end_time == ended
    assert recorded.data.params["lr"] == "5e-05"


def test_only_what_is_missing_is_sent_and_an_interrupted_training_can_go_on(
    store: Store, folder: Path, said: list[str], run: Run
) -> None:
    tracker = begin(store, folder)
    log_steps(tracker, 1, 20)
    run_id = str(tracker.close("FAILED"))
    line = '{"step": 21, "time": 1763815420.123, "values": {"train/v1": 0.5}}\n'
    with (folder / "train.jsonl").open("a") as log:
        log.write(line)  # not sent, when its process died
    for values in (1, 0):  # the second time there is nothing to do
        answer = json.loads(run(KEY, "--json"))
        assert answer == {"run_id": run_id, "status": "FAILED", "values": values, "files": 0}
    assert_the_same_points(folder / "train.jsonl", store, run_id)
    again = begin(store, folder)
    log_of(again).resume(None)
    log_steps(again, 1, 20)
    again.log({"train/v1": 0.5}, 21)
    assert again.close() == run_id
    assert_the_same_points(folder / "train.jsonl", store, run_id)
    assert said == []


def test_a_store_that_is_still_away_leaves_everything(
    store: Store, folder: Path, tmp_path: Path, said: list[str], run: Run
) -> None:
    log = ended_without("metrics", store, folder, tmp_path, said)
    assert store.database is not None
    store.database.write_bytes(b"no database any more" * 100)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    error = run(KEY, code=1)
    assert f"{folder} is kept, try again" in error
    assert "\n" not in error
    assert {path: path.read_bytes() for path in before} == before
    assert (folder / ARTIFACTS / "model" / "weights.pt").read_bytes() == b"weights"
    assert log.is_file()


def test_a_training_that_goes_on_is_left_alone(
    store: Store, folder: Path, said: list[str], run: Run
) -> None:
    begin(store, folder).close("KILLED")
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        assert f"process {holder.pid} trains this key already" in run(KEY, code=1)
    finally:
        holder.communicate(timeout=20)
    assert "nothing" not in run(KEY)


def test_an_unknown_key_is_said(run: Run) -> None:
    assert "no run of that key" in run("rk2-abcd", code=1)


@pytest.mark.parametrize("key", ["missing", None, 7])
def test_a_description_without_a_key_is_one_line(folder: Path, key: object) -> None:
    """The others of its faults are in tests/base/test_attack.py."""
    params = {"lr": "0.1"} if key == "missing" else {"lr": "0.1", "key": key}
    description = {"name": "a", "params": params, "tags": {}, "dataset": None, "started_ms": 1}
    folder.mkdir(parents=True)
    text = json.dumps({"description": description, "experiment": "tests"})
    (folder / DESCRIPTION).write_text(text)
    with pytest.raises(TrackingError, match=r"description.json: not the description of a training"):
        read_training(folder)
