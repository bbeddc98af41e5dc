"""A training that was interrupted goes on in the same MLflow run: no point lost, none twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from runkey.identity.record import POINTER, TOKEN, LoggedRun, RunPointer
from runkey.tracking.log import JsonlLog
from runkey.tracking.replay import save_description
from runkey.tracking.store import Store, open_client
from runkey.tracking.sync import LogTail, RunSender, open_tail
from tests.support.kill_commands import FORMS
from tests.support.points import (
    assert_the_same_points,
    doubled_lines,
    points_of_log,
    points_of_run,
)
from tests.support.trainer import begin, log_of, log_steps, training_in

Position = dict[str, int | str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ".runkey" / "key"


def interrupted(store: Store, folder: Path) -> Position:
    """What a process leaves that dies in step 30, with 25 steps sent and a checkpoint of step 20.

    Returns:
        The checkpoint's position.
    """
    log = JsonlLog(folder / "train.jsonl")
    training = training_in(folder)
    save_description(training)
    sync = RunSender(store, training)
    log_steps(log, 1, 20)
    position = log.position()
    log_steps(log, 21, 25)
    sync.update()
    log_steps(log, 26, 30)
    return position


def test_it_goes_on_in_the_same_run_with_every_point_once(
    store: Store, folder: Path, said: list[str]
) -> None:
    position = interrupted(store, folder)
    pointer = RunPointer.read(folder)
    assert pointer is not None
    assert pointer.run_id is not None
    client = open_client(store)
    client.set_terminated(pointer.run_id, "KILLED")
    assert pointer.sent["train.jsonl"] < (folder / "train.jsonl").stat().st_size
    before = points_of_run(store, pointer.run_id)
    assert {step for _, step, _, _ in before} == set(range(1, 26))

    changes: list[LoggedRun] = []
    again = begin(store, folder, device="cuda", on_change=changes.append)
    assert again.run_id(60) == pointer.run_id
    assert client.get_run(pointer.run_id).info.status == "RUNNING"
    log_of(again).resume(position)
    log_of(again).event("resumed", step=20)
    log_steps(again, 21, 50)
    again.finish_logs()
    assert again.close() == pointer.run_id

    assert said == []
    points = assert_the_same_points(folder / "train.jsonl", store, pointer.run_id)
    assert before < points
    run = client.get_run(pointer.run_id)
    assert (run.info.status, run.data.tags["device"]) == ("FINISHED", "cuda")
    assert run.data.tags["resumed"] == "1"
    assert run.data.tags["resumed.after"].startswith("step 20 at 20")
    assert run.data.tags["event.skipped_step"] == "step 49, image_ids 49"
    assert [(run.status, run.ended_ms is None) for run in changes] == [
        ("RUNNING", True),
        ("RUNNING", True),
        ("FINISHED", False),
    ]
    assert changes[1].tags["resumed"] == "1"
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_every_interruption_is_told(store: Store, folder: Path, said: list[str]) -> None:
    position = interrupted(store, folder)
    for _ in range(3):  # killed again before its next checkpoint
        again = begin(store, folder)
        log_of(again).resume(position)
        log_of(again).event("resumed", step=20)
        log_steps(again, 21, 30)
        run_id = again.close("KILLED")
    tags = open_client(store).get_run(str(run_id)).data.tags
    assert tags["resumed"] == "3"
    assert tags["resumed.after"].count("step 20 at ") == 3
    assert_the_same_points(folder / "train.jsonl", store, str(run_id))


def test_a_run_whose_id_never_arrived_is_found(store: Store, folder: Path, said: list[str]) -> None:
    tracker = begin(store, folder)
    run_id = tracker.run_id(60)
    tracker.close("KILLED")
    pointer = RunPointer.read(folder)
    assert pointer is not None
    RunPointer(pointer.uri, pointer.token).write(folder)  # killed just after it was made
    again = begin(store, folder)
    log_steps(again, 1, 3)
    assert again.close() == run_id
    assert said == []
    assert_the_same_points(folder / "train.jsonl", store, str(run_id))


def test_a_run_that_was_made_but_not_described_is(
    store: Store, folder: Path, said: list[str]
) -> None:
    client = open_client(store)
    number = client.create_experiment("detection")
    made = client.create_run(number, tags={TOKEN: "ab"}).info.run_id
    RunPointer(store.uri, "ab").write(folder)
    assert begin(store, folder).close() == made
    assert client.get_run(made).data.params["lr"] == "5e-05"


@pytest.mark.parametrize("uri", ["same", "http://team.example:5000"])
def test_a_run_that_is_gone_is_replaced_and_gets_everything(
    store: Store, folder: Path, said: list[str], uri: str
) -> None:
    position = interrupted(store, folder)
    pointer = RunPointer.read(folder)
    assert pointer is not None
    if uri == "same":
        open_client(store).delete_run(str(pointer.run_id))
        made = ""
    else:
        replace(pointer, run_id="0" * 32, uri=uri).write(folder)
        made = f", where it was made: {uri}"
    again = begin(store, folder)
    log_of(again).resume(position)
    log_steps(again, 21, 40)
    run_id = again.close()
    assert run_id != pointer.run_id
    named = "00000000" if made else str(pointer.run_id)[:8]
    assert said == [
        f"MLflow: run {named} of this training is not in {store.uri}{made}; it is recorded as a"
        " new run"
    ]
    assert_the_same_points(folder / "train.jsonl", store, str(run_id))


def test_what_was_sent_is_not_sent_again(
    store: Store, folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    position = interrupted(store, folder)
    pointer = RunPointer.read(folder)
    assert pointer is not None
    sent: list[Metric] = []
    log_batch = MlflowClient.log_batch

    def send(client: MlflowClient, run_id: str, metrics: Sequence[Metric] = (), **more: Any) -> Any:
        sent.extend(metrics)
        return log_batch(client, run_id, metrics, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", send)
    again = begin(store, folder)
    log_of(again).resume(position)
    log_steps(again, 21, 30)
    again.close("KILLED")
    assert len(sent) == 5 * 5 + 1  # of the steps 26 to 30 alone
    end = (folder / "train.jsonl").stat().st_size
    assert RunPointer.read(folder) == replace(pointer, sent={"train.jsonl": end})


def test_a_mark_that_is_lost_doubles_nothing(store: Store, folder: Path, said: list[str]) -> None:
    interrupted(store, folder)
    pointer = RunPointer.read(folder)
    assert pointer is not None
    replace(pointer, sent={}).write(folder)
    again = begin(store, folder)
    assert again.close() == pointer.run_id
    assert_the_same_points(folder / "train.jsonl", store, str(pointer.run_id))


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_pointer_is_that_of_the_claims_run(
    store: Store, folder: Path, said: list[str], form: str
) -> None:
    position = interrupted(store, folder)
    pointer = RunPointer.read(folder)
    assert pointer is not None
    run_id = str(pointer.run_id)
    assert RunPointer.restore(folder / "another", store.uri, run_id) is None
    path = folder / POINTER
    path.write_bytes(FORMS[form](path.read_bytes()))
    assert RunPointer.read(folder) is None
    assert said.pop().startswith(f"{path}: ")

    assert RunPointer.restore(folder, store.uri, run_id)
    tracker = begin(store, folder)
    assert tracker.jsonl
    tracker.jsonl.resume(position)
    log_steps(tracker, 21, 40)
    assert tracker.close() == run_id
    assert_the_same_points(folder / "train.jsonl", store, run_id)
    assert said == []


def test_a_folder_that_refuses_the_pointer_costs_a_line_each_way(
    store: Store, folder: Path, said: list[str]
) -> None:
    (folder / POINTER).mkdir(parents=True)
    tracker = begin(store, folder)
    log_steps(tracker, 1, 3)
    run_id = tracker.close()
    assert said == [
        f"{folder / POINTER}: a folder or a device, not a file; training goes on in the MLflow run"
        " that its claim names, or else in a new one",
        f"{folder}: cannot be written (Is a directory); if training is interrupted now, it may go"
        " on in another MLflow run",
    ]
    assert_the_same_points(folder / "train.jsonl", store, str(run_id))


def test_only_whole_lines_are_sent_and_bad_ones_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(
        b'{"step": 1, "time": 1.5, "values": {"a": 1.0, "b": "nan"}}\n'
        b'\0\0\0\n{"step": 2}\n[1]\n{"step": 3, "time": 2.5, "values": {"a": "-inf"}}\n'
        b'{"step": 4, "time": 3.5, "values": {"a": 4'
    )
    tail = LogTail(path).ahead()
    assert tail is not None
    assert [(m.key, m.step, m.timestamp) for m in tail.metrics] == [
        ("a", 1, 1500),
        ("b", 1, 1500),
        ("a", 3, 2500),
    ]
    assert tail.ahead() is None
    with path.open("ab") as file:
        file.write(b".0}}\n")
    tail = tail.ahead()
    assert tail is not None
    assert [m.value for m in tail.metrics] == [4.0]
    assert tail.offset == path.stat().st_size
    assert open_tail(path, tail.offset).offset == tail.offset
    # A log that was lost and begun anew is sent from its beginning.
    assert open_tail(path, 10_000).offset == 0


def test_a_step_that_ends_an_epoch_has_each_metric_once(
    store: Store, folder: Path, said: list[str]
) -> None:
    """Its own line and the epoch's have the rate both, and each its pace."""
    log = JsonlLog(folder / "train.jsonl")
    training = training_in(folder)
    save_description(training)
    sync = RunSender(store, training)
    log.log({"train/lr": 0.1, "train/images_per_second": 40.0}, 10)
    sync.update()  # the process dies while it evaluates
    again = begin(store, folder)
    log_of(again).resume({"log_bytes": 0})
    again.log({"train/lr": 0.1, "train/images_per_second": 50.0}, 10)
    again.log({"train/lr": 0.1, "train/images_per_second": 30.0, "val/AP": 0.5}, 10)
    run_id = str(again.close())
    history = open_client(store).get_metric_history
    assert [m.value for m in history(run_id, "train/lr")] == [0.1]
    assert [m.value for m in history(run_id, "train/images_per_second")] == [40.0]
    assert [m.value for m in history(run_id, "val/AP")] == [0.5]
    assert_the_same_points(folder / "train.jsonl", store, run_id)


def test_what_could_not_be_sent_is_not_counted_twice(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "train.jsonl")
    log.event("resumed", step=3)
    log.log({"a": 1.0}, 4)
    start = LogTail(log.path)
    assert start.ahead() == start.ahead()
    tail = start.ahead()
    assert tail is not None
    assert (tail.tags["resumed"], len(tail.metrics)) == ("1", 1)
    later = open_tail(log.path, tail.offset)
    log.event("resumed", step=4)
    log.log({"a": 1.0, "b": 2.0}, 4)
    tail = later.ahead()
    assert tail is not None
    assert (tail.tags["resumed"], [m.key for m in tail.metrics]) == ("2", ["b"])


def test_doubled_lines_of_a_log_are_found(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    line = '{"step": 1, "time": 1.5, "values": {"a": 1.0}}\n'
    path.write_text(line)
    assert doubled_lines(path) == []
    path.write_text(line + line)
    assert doubled_lines(path) == [(1, ("a",))]
    assert points_of_log(path) == {("a", 1, 1500, (1.0).hex()): 1}
