"""The cache of a store's runs: one sqlite file, `paths.records`, that is read without MLflow.

MLflow's store is the source of truth.  Code that changes a run there also writes it here, by
`update_record`.  The reading commands read only this file, so they start fast and work while the
store is away.  `runkey index` writes the file again from MLflow.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runkey.errors import RecipeError, RegistryError
from runkey.files import expect, json_safe, parse_json
from runkey.identity.record import Details, LoggedRun, Record

_VERSION, _PARTIAL = 2, 1002
"""Version of the file; of one that was made in place of a damaged one, so that runs are missing."""
_BUSY_SECONDS = 20.0
# `runkey.registry.query` asks for the columns from `run` to `ended` by these names.  The long
# texts come last: sqlite reads a row up to the last column that is asked for.
_TABLE = """CREATE TABLE runs (
    run TEXT PRIMARY KEY, key TEXT, name TEXT, status TEXT, started REAL, ended REAL,
    experiment TEXT, artifact_uri TEXT, written_ns INTEGER,
    metrics TEXT, tags TEXT, params TEXT, details TEXT
)"""
_INDEX = "CREATE INDEX runs_by_key ON runs (key)"
_WRITE = """INSERT OR REPLACE INTO runs VALUES (
    :run, :key, :name, :status, :started, :ended, :experiment, :artifact_uri, :written_ns,
    :metrics, :tags, :params, coalesce(:details, (SELECT details FROM runs WHERE run = :run))
)"""
_DELETE = "DELETE FROM runs WHERE run = ?"
_LAST_MS = 253_402_000_000_000
"""Milliseconds since 1970, in the year 9999."""
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class DamagedCacheError(RegistryError):
    """The cache has to be written again from MLflow."""

    is_partial = False
    """True if it can be read, but runs are missing."""


def update_record(path: Path, run: LoggedRun, details: Details | None = None) -> None:
    """Write what MLflow has of a run; without `details` the cached stay. OSError if it cannot."""
    row = _row(Record(run=run, details=details))
    _change(path, lambda database: database.execute(_WRITE, row))


def remove_record(path: Path, run_id: str) -> None:
    """Remove a run from the cache."""
    _change(path, lambda database: database.execute(_DELETE, (run_id,)))


@contextmanager
def open_records(path: Path, *, partial: bool = False) -> Iterator[sqlite3.Connection | None]:
    """Open the cache to read one state of it; yield None if nothing was recorded yet.

    Raises:
        DamagedCacheError: it has to be written again; or, unless `partial`, runs are missing.
        RegistryError: it cannot be read.
    """
    way_out = "`runkey index` writes it again from MLflow"
    try:
        if not path.exists():
            # The folder of one file a run that runkey 0.1 kept.
            if path.with_suffix("").is_dir():
                raise DamagedCacheError(f"{path}: not found, older records are; {way_out}")
            yield None
            return
        if not path.is_file():  # sqlite waits for ever where a pipe is
            raise RegistryError(_not_a_file(path))
        address = f"{path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS)) as database:
            database.row_factory = sqlite3.Row
            database.text_factory = _text
            database.execute("BEGIN")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version == _PARTIAL and not partial:
                error = DamagedCacheError(f"{path}: runs are missing; {way_out}")
                error.is_partial = True
                raise error
            if version not in (0, _VERSION, _PARTIAL):
                raise DamagedCacheError(f"{path}: of another version of runkey; {way_out}")
            yield database if version else None  # 0: another process makes it just now
    except sqlite3.Error as error:
        kind = DamagedCacheError if _is_damage(error) else RegistryError
        raise kind(f"{path}: {error}; {way_out}") from None


def _text(data: bytes) -> str | bytes:
    """Decode a text; what is not UTF-8 stays bytes, or the cell would end a query for all runs."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def read_records(
    database: sqlite3.Connection, condition: str, values: tuple[str, ...]
) -> Iterator[Record | str]:
    """Yield the records that fulfil an SQL condition; of a damaged one what is wrong with it."""
    for row in database.execute(f"SELECT * FROM runs WHERE {condition}", values):
        try:
            yield _record(row)
        except (RecipeError, ValueError, TypeError, AttributeError, OverflowError) as error:
            run = row["run"]
            yield f"run {run}: its record is damaged ({error}); `runkey index` writes it again"


@dataclass
class Rebuilt:
    """Counts of records."""

    runs: int = 0
    """In MLflow."""
    written: int = 0
    """That were missing or held something else."""
    removed: int = 0
    """Whose run MLflow does not have any more."""


def rebuild(path: Path, records: Iterable[Record]) -> Rebuilt:
    """Make the cache what MLflow has; records that change meanwhile are left as they are.

    Nothing is changed before the last record has come.
    """
    began_ns = time.time_ns()
    rows = {row["run"]: row for row in map(_row, records)}
    counts = Rebuilt(runs=len(rows))

    def change(database: sqlite3.Connection) -> None:
        for run, row in rows.items():
            found = database.execute("SELECT * FROM runs WHERE run = ?", (run,)).fetchone()
            cached = dict(found) if found else {"written_ns": 0}
            written_ns = cached["written_ns"]
            # Written after now: before the clock was set back.
            is_old = written_ns < began_ns or written_ns > time.time_ns()
            if is_old and cached != row | {"written_ns": written_ns}:
                database.execute(_DELETE, (run,))
                database.execute(_WRITE, row)
                counts.written += 1
        # A run that began after the runs of MLflow were read is newer, and not in `rows`.
        old = database.execute(
            "SELECT run FROM runs WHERE written_ns < ? OR written_ns > ?",
            (began_ns, time.time_ns()),
        ).fetchall()
        gone = [(run,) for (run,) in old if run not in rows]
        database.executemany(_DELETE, gone)
        counts.removed = len(gone)
        database.execute(f"PRAGMA user_version = {_VERSION}")

    _change(path, change)
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)  # what runkey 0.1 kept
    return counts


def sqlite_way_out(text: str) -> str:
    """Say what helps against an error of MLflow's sqlite file, after `; `; empty if unknown."""
    ways = {
        "malformed|not a database|no such table|no such column": "put a copy of the file back, or"
        " move it away: the next run makes a new one",
        "readonly|unable to open": "make the file and its folder writable",
        "locked": "another process writes to it; try again",
        "full|disk I/O|No space left": "make room on the disk",
    }
    return next((f"; {way}" for error, way in ways.items() if re.search(error, text)), "")


def _not_a_file(path: Path) -> str:
    return f"{path}: not a file; move it away, and `runkey index` writes it again from MLflow"


def _is_damage(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def _change(path: Path, change: Callable[[sqlite3.Connection], object]) -> None:
    """Change the cache in one transaction; a damaged one is made anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise OSError(_not_a_file(path))
    try:
        try:
            _commit(path, change, _VERSION)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            path.unlink(missing_ok=True)
            _commit(path, change, _PARTIAL)
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error}") from None


def _commit(path: Path, change: Callable[[sqlite3.Connection], object], new_version: int) -> None:
    if not path.exists():
        path.touch()  # sqlite would leave out the group's right to write, whatever the umask
    with closing(sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)) as database:
        database.row_factory = sqlite3.Row
        database.execute("BEGIN IMMEDIATE")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version not in (_VERSION, _PARTIAL):
            tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            for (table,) in tables.fetchall():
                database.execute(f'DROP TABLE "{table}"')
            database.execute(_TABLE)
            database.execute(_INDEX)
            # What another version of runkey had recorded is missing now.
            database.execute(f"PRAGMA user_version = {_PARTIAL if version else new_version}")
        change(database)
        database.execute("COMMIT")


def _row(record: Record) -> dict[str, Any]:
    run, details = record.run, record.details
    return {
        "run": run.run_id,
        "key": run.key,
        "name": run.name,
        "status": run.status,
        "started": run.started_ms,
        "ended": run.ended_ms,
        "experiment": run.experiment_id,
        "artifact_uri": run.artifact_uri,
        "written_ns": time.time_ns(),
        # As text NaN is read as a number all the same.
        "metrics": json.dumps(json_safe(run.metrics)),
        "tags": json.dumps(run.tags),
        "params": json.dumps(run.params),
        "details": details.as_json() if details else None,
    }


def _record(row: sqlite3.Row) -> Record:
    metrics = {name: float(value) for name, value in parse_json(row["metrics"]).items()}
    stored = {
        "run_id": row["run"],
        "experiment_id": row["experiment"],
        "name": row["name"],
        "status": row["status"],
        "started_ms": int(row["started"]),
        "ended_ms": None if row["ended"] is None else int(row["ended"]),
        "artifact_uri": row["artifact_uri"],
        "params": parse_json(row["params"]),
        "metrics": metrics,
        "tags": parse_json(row["tags"]),
    }
    run: LoggedRun = expect(LoggedRun, stored)
    if not (0 <= run.started_ms < _LAST_MS and 0 <= (run.ended_ms or 0) < _LAST_MS):
        raise ValueError("a time before 1970 or after the year 9999")
    text, where = row["details"], f"run {run.run_id}"
    return Record(run=run, details=Details.parse(text, where) if text else None)
