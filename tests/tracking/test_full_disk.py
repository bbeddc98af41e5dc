"""Disks that are full or read-only, for real: what people are told, and what is kept."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from runkey.identity.record import POINTER, RunPointer
from runkey.tracking.replay import ENDED
from runkey.tracking.store import Store
from tests.support.mlflow_store import fill, until
from tests.support.points import assert_the_same_points, points_of_run
from tests.support.trainer import begin, log_of, log_steps


def test_a_database_on_a_full_disk_gets_everything_later(
    small_disk: Path, empty_database: Path, tmp_path: Path, said: list[str]
) -> None:
    shutil.copy(empty_database, small_disk / "mlflow.db")
    store = Store(f"sqlite:///{small_disk / 'mlflow.db'}", small_disk / "mlartifacts", tmp_path)
    tracker = begin(store, tmp_path / "key")
    run_id = str(tracker.run_id(60))
    filler = fill(small_disk)
    log_steps(tracker, 1, 400)
    until(lambda: said)
    assert len(said) == 1
    # Without room for its journal, sqlite may take the database for read-only.
    reason = said[0].removesuffix("; the work goes on, values are kept and sent later")
    assert reason in (
        "MLflow: OperationalError: database or disk is full",
        "MLflow: OperationalError: attempt to write a readonly database",
        "MLflow: OperationalError: disk I/O error",
    )
    before = points_of_run(store, run_id).total()
    filler.unlink()
    until(lambda: said[1:])
    assert said[1:] == ["MLflow: recording again"]
    assert tracker.close() == run_id
    assert assert_the_same_points(tmp_path / "key" / "train.jsonl", store, run_id).total() > before
    assert len(said) == 2


def test_a_training_folder_on_a_full_disk_costs_nothing_but_its_marks(
    small_disk: Path, store: Store, tmp_path: Path, said: list[str]
) -> None:
    folder, shown = small_disk / "key", tmp_path / "logs" / "train.jsonl"
    tracker = begin(store, folder, root=tmp_path)
    log_steps(tracker, 1, 10)
    run_id = str(tracker.run_id(60))
    filler = fill(small_disk)
    log_steps(tracker, 11, 100)
    assert f"{folder}/train.jsonl: cannot be written (No space left on device)" in "".join(said)
    filler.unlink()
    log_steps(tracker, 101, 110)
    tracker.finish_logs()
    assert tracker.close() == run_id
    assert any("written again; nothing is missing" in line for line in said)
    assert_the_same_points(shown, store, run_id)
    assert len({line.split(":")[0] + line[-20:] for line in said}) == len(said)  # none twice


def test_lines_that_the_disk_never_took_are_in_mlflow(
    small_disk: Path, store: Store, said: list[str]
) -> None:
    folder = small_disk / "key"
    tracker = begin(store, folder)
    log_steps(tracker, 1, 10)
    run_id = str(tracker.run_id(60))
    fill(small_disk)
    log_steps(tracker, 11, 100)
    assert log_of(tracker).lost_lines > 50
    assert tracker.close() == run_id
    lost = next(line for line in said if "lacks" in line)
    assert lost.endswith(" to 100)")
    steps = {step for name, step, _, _ in points_of_run(store, run_id) if name == "train/v1"}
    assert steps == set(range(1, 101))


def test_a_read_only_folder_costs_lines_and_no_values(
    small_disk: Path, store: Store, tmp_path: Path, said: list[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    folder, shown = small_disk / "key", tmp_path / "logs" / "train.jsonl"
    tracker = begin(store, folder, root=tmp_path)
    log_steps(tracker, 1, 20)
    tracker.finish_logs()
    run_id = str(tracker.close())
    assert said[0].endswith(f"cannot be written (Read-only file system); the log is {shown} alone")
    assert said[1].startswith(f"{folder}: cannot be written (Read-only file system)")
    assert_the_same_points(shown, store, run_id)
    assert RunPointer.read(folder) is None
    assert not (folder / POINTER).exists()
    assert not (folder / ENDED).exists()
