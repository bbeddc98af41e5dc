"""The cache of a local store's runs: one sqlite file, `<home>/runs.sqlite`, read without MLflow.

MLflow's store is the source of truth.  Whoever changes a run there writes it here as well, always
through `write_record` or `update_record`; the reading commands read nothing else, so they start
fast and answer while the store is away.  `runkey index` fills the cache again from MLflow.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import Any

from runkey.errors import RecipeError, RegistryError
from runkey.identity.record import Details, LoggedRun, Record

logger = logging.getLogger(__name__)

_VERSION = 2
_BUSY_SECONDS = 20.0
_BATCH = 500
# `runkey.registry.query` asks for the columns from `run` to `ended` by these names.  The long texts
# come last: sqlite reads a row up to the last column that is asked for.
_TABLE = """CREATE TABLE runs (
    run TEXT PRIMARY KEY, key TEXT, name TEXT, status TEXT, started REAL, ended REAL,
    experiment TEXT, artifact_uri TEXT, written_ns INTEGER,
    metrics TEXT, tags TEXT, params TEXT, details TEXT
)"""
_INDEX = "CREATE INDEX runs_by_key ON runs (key)"
_RECORD = (
    "run, experiment, name, status, started, ended, artifact_uri, params, metrics, tags, details"
)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def write_record(path: Path, record: Record) -> None:
    """Write a run over what the cache has of it; several processes may write at once.

    Args:
        path: of the cache, `<home>/runs.sqlite`; made if it is missing or damaged.
        record: the run.

    Raises:
        OSError: the file cannot be written.
    """
    _change(path, lambda database: _insert(database, record))


def update_record(path: Path, run: LoggedRun, details: Details | None = None) -> None:
    """Write what MLflow has of a run now; without `details` the cached ones stay.

    Raises:
        OSError: see `write_record`.
    """
    record = Record(run=run, details=details)
    _change(path, lambda database: _insert(database, record, keep_details=details is None))


def remove_record(path: Path, run_id: str) -> None:
    """Remove a run from the cache.

    Raises:
        OSError: see `write_record`.
    """
    _change(path, lambda database: _delete(database, [run_id]))


@contextmanager
def open_records(path: Path) -> Iterator[sqlite3.Connection | None]:
    """Open the cache to read one state of it; yield None if nothing was recorded yet.

    Raises:
        RegistryError: it cannot be read; the text says what writes it again.
    """
    way_out = "`runkey index` writes it again from MLflow"
    try:
        if not path.exists():
            # The folder of one file a run that runkey 0.1 kept.
            if path.with_suffix("").is_dir():
                raise RegistryError(f"{path}: not found, older records are; {way_out}")
            yield None
            return
        address = f"{path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS)) as database:
            database.execute("BEGIN")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _VERSION):
                raise RegistryError(f"{path}: of another version of runkey; {way_out}")
            yield database if version else None  # 0: another process makes it just now
    except sqlite3.Error as error:
        raise RegistryError(f"{path}: {error}; {way_out}") from None


def read_records(
    database: sqlite3.Connection, condition: str, values: tuple[str, ...]
) -> Iterator[Record | str]:
    """Yield the records that fulfil an SQL condition; of a damaged one what is wrong with it."""
    for row in database.execute(f"SELECT {_RECORD} FROM runs WHERE {condition}", values):
        try:
            yield _record(*row)
        except (RecipeError, ValueError, TypeError, AttributeError) as error:
            yield f"run {row[0]}: its record is damaged ({error}); `runkey index` writes it again"


@dataclass
class Rebuilt:
    """Counts of records."""

    runs: int = 0
    """In MLflow."""
    written: int = 0
    """That were missing or held something else."""
    removed: int = 0
    """Whose run MLflow does not have any more."""

    def as_dict(self) -> dict[str, int]:
        """Return them for JSON."""
        return asdict(self)


def rebuild(path: Path, records: Iterable[Record]) -> Rebuilt:
    """Make the cache what MLflow has; records that change meanwhile are left as they are.

    Args:
        path: of the cache.
        records: of all runs; nothing is removed before the last one has come.

    Raises:
        OSError: see `write_record`.
    """
    began_ns = time.time_ns()
    counts = Rebuilt()
    kept: set[str] = set()

    def write(database: sqlite3.Connection) -> None:
        for record in some:
            found = _row_of(database, record.run.run_id)
            if found and (found.pop("written_ns") >= began_ns or found == _row(record)):
                continue
            _insert(database, record)
            counts.written += 1

    def remove(database: sqlite3.Connection) -> None:
        # A run that began after its page of MLflow was read is newer, and not in `kept`.
        old = database.execute("SELECT run FROM runs WHERE written_ns < ?", (began_ns,))
        gone = [run for (run,) in old if run not in kept]
        _delete(database, gone)
        counts.removed = len(gone)

    for some in batched(records, _BATCH):
        counts.runs += len(some)
        kept |= {record.run.run_id for record in some}
        _change(path, write)
    _change(path, remove)
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)  # what runkey 0.1 kept
    return counts


def _change(path: Path, change: Callable[[sqlite3.Connection], None]) -> None:
    """Change the cache in one transaction; a damaged one is made anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        try:
            _commit(path, change)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF not in _DAMAGED:
                raise
            logger.warning(f"{path}: damaged and made anew; `runkey index` adds the earlier runs")
            path.unlink(missing_ok=True)
            _commit(path, change)
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error}") from None


def _commit(path: Path, change: Callable[[sqlite3.Connection], None]) -> None:
    with closing(sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        if database.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
            tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            for (table,) in tables.fetchall():
                database.execute(f'DROP TABLE "{table}"')
            database.execute(_TABLE)
            database.execute(_INDEX)
            database.execute(f"PRAGMA user_version = {_VERSION}")
        change(database)
        database.execute("COMMIT")


def _insert(database: sqlite3.Connection, record: Record, *, keep_details: bool = False) -> None:
    row = {**_row(record), "written_ns": time.time_ns()}
    if keep_details and (found := _row_of(database, record.run.run_id)):
        row["details"] = found["details"]
    names = ", ".join(row)
    marks = ", ".join("?" * len(row))
    database.execute(f"INSERT OR REPLACE INTO runs ({names}) VALUES ({marks})", [*row.values()])


def _delete(database: sqlite3.Connection, run_ids: list[str]) -> None:
    database.executemany("DELETE FROM runs WHERE run = ?", [(run,) for run in run_ids])


def _row_of(database: sqlite3.Connection, run_id: str) -> dict[str, Any] | None:
    found = database.execute("SELECT * FROM runs WHERE run = ?", (run_id,))
    names = [column[0] for column in found.description]
    row = found.fetchone()
    return dict(zip(names, row, strict=True)) if row else None


def _row(record: Record) -> dict[str, Any]:
    run, details = record.run, record.details
    # JSON has no NaN; as text it is read as a number all the same.
    metrics = {n: v if math.isfinite(v) else str(v) for n, v in run.metrics.items()}
    return {
        "run": run.run_id,
        "key": run.key,
        "name": run.name,
        "status": run.status,
        "started": float(run.started_ms),
        "ended": None if run.ended_ms is None else float(run.ended_ms),
        "experiment": run.experiment_id,
        "artifact_uri": run.artifact_uri,
        "metrics": json.dumps(metrics),
        "tags": json.dumps(run.tags),
        "params": json.dumps(run.params),
        "details": details.as_json() if details else None,
    }


def _record(
    run: str,
    experiment: str,
    name: str,
    status: Any,
    started: float,
    ended: float | None,
    artifact_uri: str,
    params: str,
    metrics: str,
    tags: str,
    details: str | None,
) -> Record:
    logged = LoggedRun(
        run_id=run,
        experiment_id=experiment,
        name=name,
        status=status,
        started_ms=int(started),
        ended_ms=None if ended is None else int(ended),
        artifact_uri=artifact_uri,
        params=json.loads(params),
        metrics={name: float(value) for name, value in json.loads(metrics).items()},
        tags=json.loads(tags),
    )
    where = f"run {run}"
    return Record(
        run=logged, details=Details.from_dict(json.loads(details), where) if details else None
    )
