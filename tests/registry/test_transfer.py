"""A run copied between two real MLflow stores is the same run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

from runkey.errors import TrackingError
from runkey.identity.record import ARTIFACTS, CONTENT, DETAILS, ORIGIN
from runkey.tracking.store import Store, experiment_id, open_client
from runkey.tracking.transfer import StoreRuns
from tests.support.mlflow_store import RECORD

KEY = "rk2-" + "e" * 64


def other_store(folder: Path, database: Path) -> Store:
    folder.mkdir()
    shutil.copy(database, folder / "mlflow.db")
    return Store(f"sqlite:///{folder / 'mlflow.db'}", folder / "mlartifacts", folder / ".runkey")


def large_run(store: Store) -> str:
    """More of everything than MLflow takes in one request."""
    client = open_client(store)
    run = client.create_run(
        experiment_id(client, store, "one"),
        run_name="lr=5e-05",
        start_time=1_700_000_000_000,
        tags={"key": KEY, "mlflow.user": "somebody", "note": "ü"},
    )
    run_id = str(run.info.run_id)
    values = [1.0, float("nan"), float("inf"), -float("inf"), 1e-300]
    for start in range(0, 2500, 500):
        client.log_batch(
            run_id,
            metrics=[
                Metric("loss", values[step % 5], 1_700_000_000_000 + step, step)
                for step in range(start, start + 500)
            ],
        )
    client.log_batch(run_id, params=[Param(f"p{n}", str(n)) for n in range(90)])
    client.log_batch(run_id, params=[Param("key", KEY), *(Param(f"q{n}", "") for n in range(60))])
    data = Dataset("images", "0" * 32, "local", "data.dvc", None, '{"images": 3}')
    client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])
    client.log_text(run_id, "{}", "model/deep/er/key.json")
    client.log_text(run_id, RECORD.as_json(), DETAILS)
    client.set_terminated(run_id, "FINISHED", end_time=1_700_000_060_000)
    return run_id


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def without_ids(content: dict[str, Any]) -> dict[str, Any]:
    tags = {name: value for name, value in content["tags"].items() if name != ORIGIN}
    return content | {"run_id": "", "tags": tags}


def test_a_copy_of_a_copy_is_the_run(store: Store, tmp_path: Path, empty_database: Path) -> None:
    origin = large_run(store)
    first_store = StoreRuns(store, "back")
    second = StoreRuns(other_store(tmp_path / "second", empty_database), "two")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    first = first_store.read(origin, folders[0])
    assert len(first["metrics"]["loss"]) == 2500
    assert len(first["params"]) == 151
    copy = second.write(folders[0])
    assert copy.run_id != origin
    assert (copy.status, copy.name, copy.key) == ("FINISHED", "lr=5e-05", KEY)
    again = second.read(copy.run_id, folders[1])
    assert again["tags"][ORIGIN] == origin
    assert without_ids(again) == without_ids(first)
    assert files(folders[1] / ARTIFACTS) == files(folders[0] / ARTIFACTS)
    # Its copy names the first run as well, and is the same.
    back = first_store.write(folders[1])
    assert back.tags[ORIGIN] == origin
    assert json.loads((folders[0] / CONTENT).read_text()) == first


def test_a_run_that_is_not_there(store: Store, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="run 0000 could not be read"):
        StoreRuns(store, "one").read("0000", tmp_path)


def test_a_database_that_is_away_is_not_made_anew(store: Store, tmp_path: Path) -> None:
    assert store.database
    store.database.unlink()
    with pytest.raises(TrackingError, match="not found; put it back"):
        StoreRuns(store, "one").read("0" * 32, tmp_path / "run")
    assert not store.database.exists()
