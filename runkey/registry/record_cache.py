"""What the records' files hold, in one sqlite file beside them: ten thousand are asked at once.

The files are the truth.  Before each question the cache is compared with their names, times and
sizes, and what changed is read again.  It may be deleted at any time; where it cannot be written it
is made anew in memory.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from runkey.errors import RegistryError
from runkey.identity.record import Record
from runkey.registry.query import Field, Value

_VERSION = 1
_BUSY_SECONDS = 10.0
# Long texts lie apart: they are read only where a question is about them.
_TABLES = (
    """CREATE TABLE runs (
        file TEXT PRIMARY KEY, mtime_ns INTEGER, size INTEGER, problem TEXT,
        key TEXT, run TEXT, name TEXT, status TEXT, started REAL, ended REAL
    ) WITHOUT ROWID""",
    "CREATE TABLE params (file TEXT PRIMARY KEY, json TEXT)",
    "CREATE TABLE metrics (file TEXT PRIMARY KEY, json TEXT)",
    "CREATE TABLE tags (file TEXT PRIMARY KEY, json TEXT)",
)
_NAMES = ("runs", "params", "metrics", "tags")

Stamp = tuple[int, int]
"""Time of change in nanoseconds, and size in bytes."""
Read = Callable[[str], Record | str | None]
"""Gives the record in a file of that name, or what is wrong with it; None if it is gone."""


class RecordCache:
    """The values of all records in a folder."""

    def __init__(self, path: Path, read: Read) -> None:
        """Nothing is opened yet.

        Args:
            path: of the sqlite file.
            read: reads one record.
        """
        self._path = path
        self._read = read

    def rows(
        self, stamps: Mapping[str, Stamp], prefix: str, fields: Sequence[Field]
    ) -> tuple[list[tuple[str, list[Value]]], list[str]]:
        """What the records hold now.

        Args:
            stamps: of every record's file, by its name.
            prefix: beginning of the keys that are meant.
            fields: the values that are asked for.

        Returns:
            File name and values of each record; and what is wrong with files that hold none.
        """
        last: sqlite3.Error | None = None
        for make in (self._open_file, self._open_anew, self._open_memory):
            if make == self._open_anew and _code(last) in _NOT_OURS:
                continue
            try:
                with closing(make()) as database:
                    problems = self._bring_up_to_date(database, stamps)
                    return _select(database, prefix, fields), problems
            except sqlite3.Error as error:
                # Damaged (made anew), or not to be written (made in memory): it is only a cache.
                last = error
        raise RegistryError(f"{self._path}: {last}; delete it, it is made again")

    def _open_file(self) -> sqlite3.Connection:
        # Through a URI, which does not make the file: in a read-only folder reading still works.
        mode = "rwc" if os.access(self._path.parent, os.W_OK) else "ro"
        address = f"{self._path.absolute().as_uri()}?mode={mode}"
        return sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)

    def _open_anew(self) -> sqlite3.Connection:
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise sqlite3.OperationalError(str(error)) from None
        return self._open_file()

    def _open_memory(self) -> sqlite3.Connection:
        return sqlite3.connect(":memory:", isolation_level=None)

    def _bring_up_to_date(
        self, database: sqlite3.Connection, stamps: Mapping[str, Stamp]
    ) -> list[str]:
        if database.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
            self._make_table(database)
        held = {
            file: (mtime, size)
            for file, mtime, size in database.execute("SELECT file, mtime_ns, size FROM runs")
        }
        gone = held.keys() - stamps.keys()
        changed = [file for file, stamp in stamps.items() if held.get(file) != stamp]
        if gone or changed:
            read = ((file, self._read(file)) for file in changed)
            rows = [_rows(file, stamps[file], what) for file, what in read if what is not None]
            database.execute("BEGIN IMMEDIATE")
            for table, name in enumerate(_NAMES):
                old = ((file,) for file in (*gone, *changed))
                database.executemany(f"DELETE FROM {name} WHERE file = ?", old)
                new = [row[table] for row in rows if row[table]]
                if new:
                    marks = ", ".join("?" * len(new[0]))
                    database.executemany(f"INSERT INTO {name} VALUES ({marks})", new)
            database.execute("COMMIT")
        problems = database.execute("SELECT problem FROM runs WHERE problem IS NOT NULL")
        return [problem for (problem,) in problems]

    def _make_table(self, database: sqlite3.Connection) -> None:
        database.execute("BEGIN IMMEDIATE")
        if database.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
            for name, table in zip(_NAMES, _TABLES, strict=True):
                database.execute(f"DROP TABLE IF EXISTS {name}")
                database.execute(table)
            database.execute(f"PRAGMA user_version = {_VERSION}")
        database.execute("COMMIT")


def _select(
    database: sqlite3.Connection, prefix: str, fields: Sequence[Field]
) -> list[tuple[str, list[Value]]]:
    columns = [_column(field) for field in fields]
    names = [f'$."{field.name}"' for field in fields if field.kind != "run"]
    tables = sorted({field.kind for field in fields if field.kind != "run"})
    question = f"SELECT runs.file, {', '.join(columns)} FROM runs"
    question += "".join(f" JOIN {table} USING (file)" for table in tables)
    question += " WHERE runs.file >= ? AND runs.file < ? AND problem IS NULL"
    rows = database.execute(question, (*names, prefix, f"{prefix}~"))
    return [(file, values) for file, *values in rows]


def _column(field: Field) -> str:
    if field.kind != "run":
        return f"json_extract({field.kind}.json, ?)"
    return "(ended - started) / 1000" if field.name == "seconds" else field.name


def _code(error: sqlite3.Error | None) -> int | None:
    """Sqlite's primary error code."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


_NOT_OURS = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
)
"""Faults that are not the file's: it is left as it is."""


def _rows(file: str, stamp: Stamp, read: Record | str) -> list[tuple[Value, ...]]:
    """A row for each table; empty ones for a file that holds no record."""
    if isinstance(read, str):
        return [(file, *stamp, read, *[None] * 6), (), (), ()]
    run = read.run
    # JSON has no NaN; as text it is read as a number all the same.
    metrics = {n: v if math.isfinite(v) else str(v) for n, v in run.metrics.items()}
    times = (float(run.started_ms), None if run.ended_ms is None else float(run.ended_ms))
    own = (file, *stamp, None, run.key, run.run_id, run.name, run.status, *times)
    return [own, *((file, json.dumps(values)) for values in (run.params, metrics, run.tags))]
