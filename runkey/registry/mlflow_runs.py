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
from runkey.progress import each
from runkey.registry.rest import AbsentError, RestClient

ReadRun = Callable[[str], LoggedRun | None]
"""Returns a run by its MLflow id; None where there is none, or it was deleted. Raises RegistryError
if the store cannot be read."""

SQLITE = "sqlite:///"
_BUSY_SECONDS = 20.0
_RUN = (
    "SELECT run_uuid AS run_id, experiment_id, name AS run_name, status, start_time, end_time,"
    " artifact_uri FROM runs WHERE run_uuid = ? AND lifecycle_stage = 'active'"
)
_KEYED = (
    "SELECT run_uuid FROM runs JOIN tags USING (run_uuid)"
    " WHERE tags.key = ? AND lifecycle_stage = 'active'"
)


def run_reader(uri: str) -> ReadRun | None:
    """Return a reader of a store's runs; None for a database that only MLflow itself can read."""
    if is_server(uri):
        client = RestClient(uri)
        return lambda run_id: _read_from_server(client, run_id)
    if not uri.startswith(SQLITE):
        return None

    def read(run_id: str) -> LoggedRun | None:
        with _opened(uri) as database:
            return _read_from_sqlite(database, run_id)

    return read


def finished_runs(uri: str) -> set[str]:
    """List the MLflow ids of all finished runs that have a key; empty if not a sqlite store."""
    if not uri.startswith(SQLITE):
        return set()
    with _opened(uri) as database:
        return {run for (run,) in database.execute(f"{_KEYED} AND status = 'FINISHED'", (KEY,))}


def all_runs(uri: str) -> Iterator[LoggedRun]:
    """Yield all runs of a sqlite store that have a key, and show progress."""
    with _opened(uri) as database:
        for (run_id,) in each("index", database.execute(_KEYED, (KEY,)).fetchall(), "runs"):
            if run := _read_from_sqlite(database, run_id):
                yield run


@contextmanager
def _opened(uri: str) -> Iterator[sqlite3.Connection]:
    """Open the database read-only; it is not created if it is not there."""
    path = Path(uri.removeprefix(SQLITE))
    if not path.is_file():
        raise RegistryError(f"{path}: not found; `make repro` records the first run")
    address = f"{path.resolve().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS)) as database:
            database.row_factory = sqlite3.Row
            yield database
    # The latter three: a table holds something that MLflow cannot have written.
    except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
        raise RegistryError(f"{path}: MLflow's database cannot be read ({error})") from None


def _read_from_sqlite(database: sqlite3.Connection, run_id: str) -> LoggedRun | None:
    info = database.execute(_RUN, (run_id,)).fetchone()
    if info is None:
        return None
    params, tags = (
        dict(database.execute(f"SELECT key, value FROM {table} WHERE run_uuid = ?", (run_id,)))
        for table in ("params", "tags")
    )
    query = "SELECT key, value, is_nan FROM latest_metrics WHERE run_uuid = ?"
    metrics = {n: math.nan if nan else v for n, v, nan in database.execute(query, (run_id,))}
    return LoggedRun.from_mlflow(dict(info), params, metrics, tags)


def _read_from_server(client: RestClient, run_id: str) -> LoggedRun | None:
    try:
        answer = client.get("runs/get", {"run_id": run_id})["run"]
    except AbsentError:
        return None
    return None if answer["info"].get("lifecycle_stage") == "deleted" else run_from_json(answer)


def run_from_json(answer: dict[str, Any]) -> LoggedRun:
    """Return a run in an answer of the REST interface, which leaves empty texts out."""
    params, metrics, tags = (
        {one["key"]: one.get("value", "") for one in answer.get("data", {}).get(kind, ())}
        for kind in ("params", "metrics", "tags")
    )
    return LoggedRun.from_mlflow(answer["info"], params, metrics, tags)
