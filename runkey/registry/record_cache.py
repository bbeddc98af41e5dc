"""Write the records' files again from what MLflow has."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from runkey import paths
from runkey.errors import RecipeError, RegistryError
from runkey.identity.record import Record, read_record, write_record
from runkey.registry.query import Field, Value

# What the records' files hold, in one sqlite file beside them: ten thousand are asked at once.


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


Answer = tuple[list[tuple[str, list[Value]]], list[str]]
"""File name and values of each record; and what is wrong with files that hold none."""


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

    def rows(self, stamps: Mapping[str, Stamp], prefix: str, fields: Sequence[Field]) -> Answer:
        """What the records hold now.

        Args:
            stamps: of every record's file, by its name.
            prefix: beginning of the keys that are meant.
            fields: the values that are asked for.

        Raises:
            RegistryError: sqlite fails even in memory.
        """
        last: sqlite3.Error | None = None
        for make in (self._open_file, self._open_anew, self._open_memory):
            if make == self._open_anew and _code(last) in _NOT_OURS:
                continue
            try:
                with closing(make()) as database:
                    return self._answer(database, stamps, prefix, fields)
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

    def _answer(
        self,
        database: sqlite3.Connection,
        stamps: Mapping[str, Stamp],
        prefix: str,
        fields: Sequence[Field],
    ) -> Answer:
        """What the files hold, compared and read in one transaction.

        Another process may have listed the folder at another time, and brings the cache to what it
        saw: between two transactions rows would come and go.
        """
        if database.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
            self._make_table(database)
        database.execute("BEGIN")
        gone, changed = _differences(database, stamps)
        if gone or changed:
            database.execute("COMMIT")
            # Read before the lock is taken: at first it is all of them, and takes seconds.
            read = {file: self._read(file) for file in changed}
            database.execute("BEGIN IMMEDIATE")
            gone, changed = _differences(database, stamps)
            read |= {file: self._read(file) for file in changed if file not in read}
            held = {file: record for file in changed if (record := read[file]) is not None}
            _replace(database, [*gone, *changed], [_rows(f, stamps[f], r) for f, r in held.items()])
        problems = database.execute("SELECT problem FROM runs WHERE problem IS NOT NULL").fetchall()
        answer = _select(database, prefix, fields), [problem for (problem,) in problems]
        database.execute("COMMIT")
        return answer

    def _make_table(self, database: sqlite3.Connection) -> None:
        database.execute("BEGIN IMMEDIATE")
        if database.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
            for name, table in zip(_NAMES, _TABLES, strict=True):
                database.execute(f"DROP TABLE IF EXISTS {name}")
                database.execute(table)
            database.execute(f"PRAGMA user_version = {_VERSION}")
        database.execute("COMMIT")


def _differences(
    database: sqlite3.Connection, stamps: Mapping[str, Stamp]
) -> tuple[list[str], list[str]]:
    """Files that are gone, and files that are new or changed."""
    rows = database.execute("SELECT file, mtime_ns, size FROM runs")
    held = {file: (mtime, size) for file, mtime, size in rows}
    changed = [file for file, stamp in stamps.items() if held.get(file) != stamp]
    return [file for file in held if file not in stamps], changed


def _replace(
    database: sqlite3.Connection, old: list[str], new: list[list[tuple[Value, ...]]]
) -> None:
    for place, table in enumerate(_NAMES):
        database.executemany(f"DELETE FROM {table} WHERE file = ?", [(file,) for file in old])
        if rows := [row[place] for row in new if row[place]]:
            marks = ", ".join("?" * len(rows[0]))
            database.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)


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


@dataclass
class Rebuilt:
    """Counts of records' files."""

    runs: int = 0
    """In MLflow."""
    written: int = 0
    """That were missing or held something else."""
    removed: int = 0
    """Whose run MLflow does not have any more, and files that are no records."""

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


def rebuild(home: Path, records: Iterable[Record]) -> Rebuilt:
    """Make the records' files what MLflow has; files that change meanwhile are left as they are.

    Args:
        home: `Store.home`.
        records: of all its runs; nothing is removed before the last one has come.

    Raises:
        RegistryError: the folder cannot be written.
    """
    folder = home / paths.RECORDS
    began = time.time_ns()
    counts = Rebuilt()
    kept = set()
    try:
        for record in records:
            counts.runs += 1
            kept.add(record.file_name)
            if not _is_newer(folder / record.file_name, began):
                counts.written += _write_if_other(folder, record)
        # A run that began after its page was read has a newer file, and is not in `kept`.
        for path in sorted(folder.glob("*.json")):
            if path.name not in kept and not _is_newer(path, began):
                path.unlink(missing_ok=True)
                counts.removed += 1
    except OSError as error:
        raise RegistryError(f"{error.filename or folder}: {error.strerror}") from None
    return counts


def _is_newer(path: Path, began_ns: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns >= began_ns
    return False


def _write_if_other(folder: Path, record: Record) -> bool:
    """Whether the file had to be written."""
    # RecipeError: torn, or of another schema.
    with contextlib.suppress(FileNotFoundError, RecipeError):
        if _text(read_record(folder / record.file_name)) == _text(record):
            return False
    write_record(folder, record)
    return True


def _text(record: Record) -> str:
    return json.dumps(record.as_dict(), sort_keys=True)  # NaN equals NaN as text
