"""The MLflow tracker against a real sqlite store, and what it does when the store fails."""

from __future__ import annotations

import math
import sqlite3
import time
from pathlib import Path

import pytest

from runkey.tracking.describe import note_tags
from runkey.tracking.log import JsonlLog
from runkey.tracking.mlflow_run import Pace, SystemSampler, TrackedRun
from runkey.tracking.store import NOTE, Store, open_client
from runkey.tracking.sync import RunSender, TrainingRun, event_text
from tests.support.mlflow_store import DIGEST, FAST, description, start_run, until
from tests.support.points import read_jsonl
from tests.support.trainer import begin, log_of


def test_a_run_is_recorded_whole(store: Store, tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.pt").write_bytes(b"weights")
    tracker = start_run(store)
    for step in range(600):
        tracker.log({"train/loss": 1 / (step + 1), "train/lr": 1e-4}, step)
    tracker.log({"val/AP/kite (red)": 0.5, "val/loss": math.nan}, 600)
    tracker.tag("event.early_stop", '{"epoch": 3}')
    tracker.artifact(tmp_path / "model", "model")
    run_id = tracker.close()

    assert said == []
    assert run_id is not None
    client = open_client(store)
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "lr=5e-05")
    assert run.data.params["lr"] == "5e-05"
    assert len(run.data.params) == 132
    assert run.data.tags["device"] == "cpu"
    assert run.data.tags["event.early_stop"] == '{"epoch": 3}'
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.digest, data.tags[0].value) == (DIGEST, "training")
    history = client.get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(s, 1 / (s + 1)) for s in range(600)]
    assert run.data.metrics["val/AP/kite _red_"] == 0.5
    assert math.isnan(run.data.metrics["val/loss"])
    kept = tmp_path / "mlartifacts" / run_id / "artifacts" / "model" / "weights.pt"
    assert kept.read_bytes() == b"weights"


def test_an_existing_run_is_added_to_and_stays_finished(
    store: Store, tmp_path: Path, said: list[str]
) -> None:
    run_id = start_run(store).close()
    later = TrackedRun(None, RunSender(store, str(run_id)), pace=FAST)
    later.log({"eval/AP": 0.6}, 0)
    assert later.close() == run_id
    run = open_client(store).get_run(str(run_id))
    assert run.data.metrics["eval/AP"] == 0.6
    assert run.info.status == "FINISHED"
    assert said == []


def test_a_description_is_renewed_until_a_user_writes_one(store: Store, said: list[str]) -> None:
    client = open_client(store)

    def describe(text: str) -> str:
        later = TrackedRun(None, RunSender(store, run_id), pace=FAST)
        for name, value in note_tags(text).items():
            later.tag(name, value)
        later.close()
        return str(client.get_run(run_id).data.tags[NOTE])

    run_id = str(start_run(store).close())
    assert describe("AP 0.5") == "AP 0.5"
    assert describe("AP 0.6") == "AP 0.6"
    client.set_tag(run_id, NOTE, "AP 0.6, for the paper")
    assert describe("AP 0.7") == "AP 0.6, for the paper"
    experiment = client.get_experiment(client.get_run(run_id).info.experiment_id)
    assert "COCO's AP on the held-out images" in experiment.tags[NOTE]
    client.set_experiment_tag(experiment.experiment_id, NOTE, "ours")
    start_run(store).close()
    assert client.get_experiment(experiment.experiment_id).tags[NOTE] == "ours"
    assert said == []


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        (
            "hint.loader",
            {"step": 9, "seen": "it waits", "change": "raise lr"},
            "it waits; raise lr",
        ),
        ("skipped_step", {"step": 49, "image_ids": [4, 7]}, "step 49, image_ids 4 7"),
        (
            "class_scores",
            {"mean_AP50": 0.21156789, "never_found": []},
            "mean_AP50 0.211568, never_found none",
        ),
        ("odd", {}, ""),
    ],
)
def test_the_tag_of_an_event_is_for_people(kind: str, fields: dict[str, object], text: str) -> None:
    assert event_text(kind, fields) == text


def test_system_metrics_are_sampled(store: Store, said: list[str], tmp_path: Path) -> None:
    pace = Pace(flush_seconds=0.2)
    shown = tmp_path / "logs" / "system.jsonl"
    log = JsonlLog(tmp_path / "key" / "system.jsonl", shown)
    began = time.time_ns() // 1_000_000 - 3_600_000
    about = description(started_ms=began)
    training = TrainingRun("detection", about, tmp_path / "key", logs=(log.path,))
    sampler = SystemSampler(log, 0.1)
    tracker = TrackedRun(None, RunSender(store, training), sampler=sampler, pace=pace)
    run_id = tracker.run_id(60)
    until(lambda: len(list(read_jsonl(log.path))) > 3)
    sampler.finish()
    tracker.close()
    entries = list(read_jsonl(shown))
    assert all(3600 <= entry["step"] < 3700 for entry in entries)  # seconds since it began
    assert 0 <= entries[0]["values"]["system/cpu_utilization_percentage"] <= 100
    history = open_client(store).get_metric_history(str(run_id), "system/process_memory_megabytes")
    first = {entry["step"]: entry["values"] for entry in reversed(entries)}  # of each second
    assert {m.step: m.value for m in history} == {
        step: values["system/process_memory_megabytes"] for step, values in first.items()
    }
    assert len(history) == len(first)
    assert history[0].value > 50
    assert said == []


def test_a_locked_database_is_waited_for_and_nothing_is_lost(
    store: Store, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # MLflow waits 20 s for a lock by itself; shortened, so that the failure is really seen.
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    tracker = start_run(store)
    run_id = tracker.run_id(60)
    assert store.database is not None
    other = sqlite3.connect(store.database, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    for step in range(100):
        tracker.log({"train/loss": float(step)}, step)
    assert time.monotonic() - started < 0.5  # training does not wait for the database
    time.sleep(1.0)
    other.execute("COMMIT")
    other.close()
    assert tracker.close() == run_id
    history = open_client(store).get_metric_history(str(run_id), "train/loss")
    assert [m.value for m in history] == [float(s) for s in range(100)]


def test_a_store_that_is_lost_in_the_middle_stops_nothing(
    store: Store, tmp_path: Path, said: list[str]
) -> None:
    tracker = begin(store, tmp_path / "key")
    tracker.log({"train/loss": 3.0}, 0)
    run_id = tracker.run_id(60)
    history = open_client(store).get_metric_history
    until(lambda: history(str(run_id), "train/loss"))
    assert store.database is not None
    with sqlite3.connect(store.database) as database:
        database.execute("DROP TABLE metrics")
    database.close()
    for step in range(1, 5):
        tracker.log({"train/loss": 3.0 - step}, step)
    until(lambda: said)

    assert tracker.close() == run_id
    assert [e["step"] for e in read_jsonl(log_of(tracker).path)] == [0, 1, 2, 3, 4]
    assert len(said) == 3, said
    assert said[0].startswith("MLflow: ")
    assert said[0].endswith("the work goes on, values are kept and sent later")
    assert said[1].startswith(f"MLflow: run {run_id} lacks 4 values (")
    assert said[2] == f"MLflow: `runkey replay rk2-555555555555` sends the rest from {tmp_path}/key"


def test_a_run_that_was_made_and_could_not_be_described_has_a_name(
    store: Store, tmp_path: Path, said: list[str]
) -> None:
    assert store.database is not None
    with sqlite3.connect(store.database) as database:
        database.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON params BEGIN SELECT RAISE(FAIL, 'full'); END"
        )
    database.close()
    tracker = begin(store, tmp_path / "key")
    tracker.log({"train/loss": 3.0}, 0)
    run_id = tracker.close()
    assert open_client(store).get_run(str(run_id)).info.status == "RUNNING"
    assert said[0].endswith("the work goes on, values are kept and sent later")
    assert said[1].startswith(f"MLflow: run {run_id} lacks 1 value (")


def test_a_store_that_comes_back_gets_everything(store: Store, said: list[str]) -> None:
    mlflow = start_run(store)
    run_id = mlflow.run_id(60)
    assert store.database is not None
    with sqlite3.connect(store.database) as database:
        database.execute("ALTER TABLE metrics RENAME TO hidden")
    mlflow.log({"train/loss": 1.0}, 1)
    until(lambda: said)
    with database:
        database.execute("ALTER TABLE hidden RENAME TO metrics")
    database.close()
    until(lambda: said[1:])
    assert mlflow.close() == run_id
    assert said[-1] == "MLflow: recording again"
    assert open_client(store).get_run(str(run_id)).data.metrics["train/loss"] == 1.0


def test_a_server_that_is_not_there_costs_seconds_and_no_run(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    nobody = Store("http://127.0.0.1:9", None, tmp_path)
    tracker = start_run(nobody)
    tracker.log({"train/loss": 1.0}, 1)
    started = time.monotonic()
    assert tracker.close() is None
    assert time.monotonic() - started < 60
    assert said[-2].startswith("MLflow: no run was recorded (")
    assert all("\n" not in line for line in said)


def test_a_missing_artifact_is_said_and_the_rest_is_kept(
    store: Store, tmp_path: Path, said: list[str]
) -> None:
    (tmp_path / "there.txt").write_text("x")
    tracker = start_run(store)
    tracker.artifact(tmp_path / "absent.txt")
    tracker.artifact(tmp_path / "there.txt")
    run_id = tracker.close()
    assert said == [f"MLflow: {tmp_path}/absent.txt is not there and was not kept with the run"]
    assert (tmp_path / "mlartifacts" / str(run_id) / "artifacts" / "there.txt").is_file()
