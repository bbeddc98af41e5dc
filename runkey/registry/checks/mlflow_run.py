"""One run as MLflow has it now, read without MLflow: from its sqlite file, or over REST."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from runkey.errors import RegistryError
from runkey.identity.record import KEY, LoggedRun
from runkey.registry.reading.mlflow_json import run_from_json
from runkey.registry.rest import RestClient, RestError

ReadRun = Callable[[str], LoggedRun | None]
"""Gives a run by its MLflow id; None where there is none, or it was deleted.  RegistryError: the
store cannot be read."""

_SQLITE = "sqlite:///"
_BUSY_SECONDS = 20.0


def run_reader(uri: str) -> ReadRun | None:
    """What reads runs of a store; None for a database that only MLflow itself can read.

    Args:
        uri: `Store.uri`.
    """
    if uri.startswith(_SQLITE):
        database = Path(uri.removeprefix(_SQLITE))
        return lambda run_id: _from_sqlite(database, run_id)
    if uri.startswith(("http://", "https://")):
        client = RestClient(uri)
        return lambda run_id: _from_server(client, run_id)
    return None


def finished_runs(uri: str) -> set[str]:
    """MLflow ids of all finished runs that have a key, of a sqlite store; of another none.

    Raises:
        RegistryError: the store cannot be read.
    """
    if not uri.startswith(_SQLITE):
        return set()
    query = (
        "SELECT run_uuid FROM runs JOIN tags USING (run_uuid) WHERE tags.key = ?"
        " AND status = 'FINISHED' AND lifecycle_stage = 'active'"
    )
    with _opened(Path(uri.removeprefix(_SQLITE))) as database:
        return {run_id for (run_id,) in database.execute(query, (KEY,))}


def count_runs(uri: str) -> int | None:
    """How many active runs have a key; None: it is no sqlite store, and only MLflow could say.

    Raises:
        RegistryError: the store cannot be read.
    """
    if not uri.startswith(_SQLITE):
        return None
    query = (
        "SELECT count(*) FROM runs JOIN tags USING (run_uuid) WHERE tags.key = ?"
        " AND lifecycle_stage = 'active'"
    )
    with _opened(Path(uri.removeprefix(_SQLITE))) as database:
        return int(database.execute(query, (KEY,)).fetchone()[0])


def _from_sqlite(path: Path, run_id: str) -> LoggedRun | None:
    with _opened(path) as database:
        answer = _ask(database, run_id)
        return run_from_json(answer) if answer else None


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The database, to be read; it is not made if it is not there."""
    if not path.is_file():
        raise RegistryError(f"{path}: MLflow's database is not there")
    address = f"{path.resolve().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS)) as database:
            yield database
    # The latter three: what stands in a table cannot be MLflow's.
    except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
        raise RegistryError(f"{path}: MLflow's database cannot be read ({error})") from None


def _ask(database: sqlite3.Connection, run_id: str) -> dict[str, Any] | None:
    """The run as the REST interface would give it."""
    names = ("run_id", "experiment_id", "run_name", "status", "start_time", "end_time")
    row = database.execute(
        "SELECT run_uuid, experiment_id, name, status, start_time, end_time, artifact_uri"
        " FROM runs WHERE run_uuid = ? AND lifecycle_stage = 'active'",
        (run_id,),
    ).fetchone()
    if row is None:
        return None

    def pairs(table: str) -> list[dict[str, Any]]:
        query = f"SELECT key, value FROM {table} WHERE run_uuid = ?"
        return [{"key": key, "value": value} for key, value in database.execute(query, (run_id,))]

    metrics = database.execute(
        "SELECT key, value, is_nan FROM latest_metrics WHERE run_uuid = ?", (run_id,)
    )
    values = [{"key": key, "value": math.nan if nan else v} for key, v, nan in metrics]
    return {
        "info": dict(zip((*names, "artifact_uri"), row, strict=True)),
        "data": {"params": pairs("params"), "tags": pairs("tags"), "metrics": values},
    }


def _from_server(client: RestClient, run_id: str) -> LoggedRun | None:
    try:
        answer = client.get("runs/get", {"run_id": run_id})["run"]
    except RestError as error:
        if error.code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if answer["info"].get("lifecycle_stage") == "deleted":
        return None
    return run_from_json(answer)
