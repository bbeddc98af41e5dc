"""A database that is damaged, foreign, locked or full: one line with the way out, in time."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from runkey.errors import RegistryError, TrackingError
from runkey.identity.record import Details
from runkey.registry.library import LocalLibrary
from runkey.tracking.logged_model import ModelDescription, log_model
from runkey.tracking.store import Store, locate_store
from runkey.tracking.transfer import StoreRuns, delete_run, write_details
from tests.support.mlflow_store import fill, start_run
from tests.support.odd_server import RECORD

RUN = "a" * 32
ANEW, AWAY = "move it away: the next run makes a new one", "not a file; move it away"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    path.write_bytes(b"no database " * 1000)


def scramble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(4096, len(data), 4096):
        data[place : place + 300] = bytes(300)
    path.write_bytes(data)


def of_another_program(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE runs (x)")


def of_another_mlflow(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'abc123'")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "malformed"),
    "overwritten": (overwrite, f"file is not a database.*{ANEW}"),
    "scrambled": (scramble, f"malformed.*{ANEW}"),
    "another program's": (of_another_program, f"no such (column|table).*{ANEW}"),
    "another MLflow's": (of_another_mlflow, "out-of-date database schema"),
    "a folder": (a_folder, AWAY),
}


def ask(store: Store, folder: Path) -> list[str]:
    """Do what export, gc, reproduce, evaluate and index do; return the line that each ends in."""
    lines = []
    for question in (
        lambda: StoreRuns(store, "detection").read(RUN, folder),
        lambda: delete_run(store, RUN),
        lambda: write_details(store, RUN, Details.from_dict(RECORD, "")),
        lambda: log_model(store, RUN, ModelDescription("a", "rk2-1", "", {}), {}, folder),
        lambda: LocalLibrary(store.home, uri=store.uri).rebuild(),
    ):
        try:
            question()
        except (TrackingError, RegistryError) as error:
            lines.append(str(error))
    return lines


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_database_is_one_line(name: str, store: Store, tmp_path: Path) -> None:
    damage, pattern = DAMAGES[name]
    assert store.database
    damage(store.database)
    began = time.monotonic()
    lines = ask(store, tmp_path)
    assert time.monotonic() - began < 60
    assert len(lines) >= 4
    for line in lines:
        assert str(store.database) in line
        assert "\n" not in line
    assert any(re.search(pattern, line) for line in lines), lines


def test_a_training_keeps_its_values_beside_a_database_that_cannot_be_opened(
    store: Store, said: list[str]
) -> None:
    assert store.database
    a_folder(store.database)
    tracker = start_run(store)
    tracker.log({"train/loss": 1.0}, 1)
    began = time.monotonic()
    assert tracker.close() is None
    assert time.monotonic() - began < 20  # MLflow alone tries for 100 seconds
    assert f"MLflow: TrackingError: {store.database}: {AWAY}" in said[0]


def test_a_full_disk_is_one_line(
    small_disk: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, small_disk / "mlflow.db")
    store = locate_store(small_disk)
    tracker = start_run(store)
    run_id = tracker.close()
    assert run_id
    fill(small_disk)
    details = Details.from_dict(RECORD | {"decision": "x" * 50_000}, "")
    with pytest.raises(TrackingError) as caught:
        write_details(store, run_id, details, {"note": "y" * 4000})
    assert str(caught.value).endswith("; make room on the disk")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_locked_database_is_one_line(store: Store) -> None:
    assert store.database
    with closing(sqlite3.connect(store.database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        with pytest.raises(TrackingError, match=r"locked\); another process writes to it; try"):
            delete_run(store, RUN)
        assert time.monotonic() - began < 15  # 5 of them wait for the lock
