"""Read runs as MLflow has them now, without importing MLflow: from its sqlite file or over REST."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from runkey.errors import RegistryError
from runkey.identity.record import KEY, LoggedRun
from runkey.paths import is_server
from runkey.registry.rest import RestClient, RestError
from runkey.registry.server_library import run_from_json

ReadRun = Callable[[str], LoggedRun | None]
"""Returns a run by its MLflow id; None where there is none, or it was deleted. Raises RegistryError
if the store cannot be read."""

_SQLITE = "sqlite:///"
_BUSY_SECONDS = 20.0
_KEYED = "FROM runs JOIN tags USING (run_uuid) WHERE tags.key = ? AND lifecycle_stage = 'active'"


def run_reader(uri: str) -> ReadRun | None:
    """Return a reader of a store's runs; None for a database that only MLflow itself can read.

    Args:
        uri: `Store.uri`.
    """
    if uri.startswith(_SQLITE):
        return lambda run_id: _read_from_sqlite(uri, run_id)
    if is_server(uri):
        client = RestClient(uri)
        return lambda run_id: _read_from_server(client, run_id)
    return None


def finished_runs(uri: str) -> set[str]:
    """List the MLflow ids of all finished runs that have a key; empty if not a sqlite store.

    Raises:
        RegistryError: the store cannot be read.
    """
    if not uri.startswith(_SQLITE):
        return set()
    query = f"SELECT run_uuid {_KEYED} AND status = 'FINISHED'"
    with _opened(uri) as database:
        return {run_id for (run_id,) in database.execute(query, (KEY,))}


def count_runs(uri: str) -> int | None:
    """Count the active runs that have a key; None if not a sqlite store.

    Raises:
        RegistryError: the store cannot be read.
    """
    if not uri.startswith(_SQLITE):
        return None
    with _opened(uri) as database:
        return int(database.execute(f"SELECT count(*) {_KEYED}", (KEY,)).fetchone()[0])


@contextmanager
def _opened(uri: str) -> Iterator[sqlite3.Connection]:
    """The database, read-only; it is not created if it is not there."""
    path = Path(uri.removeprefix(_SQLITE))
    if not path.is_file():
        raise RegistryError(f"{path}: MLflow's database is not there")
    address = f"{path.resolve().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS)) as database:
            yield database
    # The latter three: a table holds something that MLflow cannot have written.
    except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
        raise RegistryError(f"{path}: MLflow's database cannot be read ({error})") from None


def _read_from_sqlite(uri: str, run_id: str) -> LoggedRun | None:
    names = ("run_id", "experiment_id", "run_name", "status", "start_time", "end_time")
    with _opened(uri) as database:
        row = database.execute(
            "SELECT run_uuid, experiment_id, name, status, start_time, end_time, artifact_uri"
            " FROM runs WHERE run_uuid = ? AND lifecycle_stage = 'active'",
            (run_id,),
        ).fetchone()
        if row is None:
            return None

        def pairs(table: str) -> list[dict[str, Any]]:
            query = f"SELECT key, value FROM {table} WHERE run_uuid = ?"
            rows = database.execute(query, (run_id,))
            return [{"key": key, "value": value} for key, value in rows]

        metrics = database.execute(
            "SELECT key, value, is_nan FROM latest_metrics WHERE run_uuid = ?", (run_id,)
        )
        values = [{"key": key, "value": math.nan if nan else v} for key, v, nan in metrics]
        # In the form of the REST interface.
        return run_from_json(
            {
                "info": dict(zip((*names, "artifact_uri"), row, strict=True)),
                "data": {"params": pairs("params"), "tags": pairs("tags"), "metrics": values},
            }
        )


def _read_from_server(client: RestClient, run_id: str) -> LoggedRun | None:
    try:
        answer = client.get("runs/get", {"run_id": run_id})["run"]
    except RestError as error:
        if error.code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if answer["info"].get("lifecycle_stage") == "deleted":
        return None
    return run_from_json(answer)
