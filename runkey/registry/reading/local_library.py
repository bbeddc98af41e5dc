"""The runs of a store on this machine: one small file each, in `<home>/runs`.

A file's name begins with the key, so a key is looked up in the folder's names alone.  What asks
about all runs is answered from `runkey.registry.reading.record_cache`.
"""

from __future__ import annotations

import os
import re
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from runkey import paths
from runkey.errors import RegistryError
from runkey.identity.errors import RecipeError
from runkey.identity.key import ANY_SCHEMA
from runkey.identity.record import Record, read_record
from runkey.registry.reading.query import Query, choose
from runkey.registry.reading.record_cache import RecordCache, Stamp

CACHE = "runs.sqlite"
_NAME = re.compile(rf"{ANY_SCHEMA}-[0-9a-f]{{64}}-[\w-]+\.json")


def tell(line: str) -> None:
    """A line on stderr: what was left out of an answer."""
    sys.stderr.write(f"{line}\n")


class LocalLibrary:
    """Implements `SearchableLibrary` on the records' files."""

    def __init__(self, home: Path, say: Callable[[str], None] = tell) -> None:
        """Nothing is read yet.

        Args:
            home: `Store.home`.
            say: told of files that are no records, in one line each.
        """
        self.home = home
        self.folder = home / paths.RECORDS
        self._say = say

    @property
    def place(self) -> str:
        """The folder of the records."""
        return str(self.folder)

    def matching(self, prefix: str) -> list[Record]:
        """See `Library`."""
        records = [self._read(name) for name in self.names(prefix)]
        return sorted(filter(None, records), key=age)

    def with_details(self, record: Record) -> Record:
        """The record itself: a local one comes with its details."""
        return record

    def open_file(self, record: Record, path: str) -> AbstractContextManager[BinaryIO]:
        """See `Library`."""
        try:
            return self.path_of(record, path).open("rb")
        except OSError as error:
            why = error.strerror or error
            raise RegistryError(
                f"{record.label}: {path}: {why} (run {record.run.run_id})"
            ) from None

    def path_of(self, record: Record, path: str) -> Path:
        """Where an artifact lies, or would.

        Raises:
            RegistryError: the path leads out of the run's folder, or the run's artifacts are not
                files of this machine.
        """
        return self.artifacts(record) / inside(record, path)

    def artifacts(self, record: Record) -> Path:
        """The folder of a run's artifacts.

        Records hold absolute paths, which are wrong after the checkout was moved and another's
        after it was copied: the folder beside this store comes first.

        Raises:
            RegistryError: they are not files of this machine.
        """
        uri = urllib.parse.urlsplit(record.run.artifact_uri)
        if uri.scheme not in ("", "file"):
            raise RegistryError(
                f"{record.label}: its artifacts lie at {record.run.artifact_uri}, which is read"
                " through a tracking server; set MLFLOW_TRACKING_URI to one"
            )
        said = Path(urllib.request.url2pathname(uri.path))
        beside = self.home.parent / "mlartifacts" / Path(*said.parts[-2:])
        return beside if beside.is_dir() else said

    def find(self, query: Query) -> list[Record]:
        """See `SearchableLibrary`."""
        cache = RecordCache(self.home / CACHE, self._record)
        rows, problems = cache.rows(self._stamps(), query.prefix, query.fields)
        for problem in problems:
            self._say(f"{problem}; left out")
        return [record for name in choose(rows, query) if (record := self._read(name))]

    def names(self, prefix: str = "") -> list[str]:
        """File names of the records whose key begins so; strange files are told of."""
        return [entry.name for entry in self._entries(prefix)]

    def _entries(self, prefix: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.folder) as entries:
                # Names that begin with a dot are records that are being written.
                found = [e for e in entries if e.name.startswith(prefix) and e.name[0] != "."]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RegistryError(f"{self.folder}: {error.strerror}") from None
        strange = [entry for entry in found if not _NAME.fullmatch(entry.name)]
        for entry in strange:
            self._say(f"{self.folder / entry.name}: not a run's record; left out")
        return [entry for entry in found if entry not in strange] if strange else found

    def _stamps(self) -> dict[str, Stamp]:
        """Time and size of each record's file."""
        stamps = {}
        for entry in self._entries(""):
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue  # removed since the folder was listed
            stamps[entry.name] = (status.st_mtime_ns, status.st_size)
        return stamps

    def _read(self, name: str) -> Record | None:
        """The record in a file; None, and a line about it, if it holds none."""
        record = self._record(name)
        if isinstance(record, str):
            self._say(f"{record}; left out")
            return None
        return record

    def _record(self, name: str) -> Record | str | None:
        """The record in a file, or what is wrong with it; None if it is gone."""
        try:
            record = read_record(self.folder / name)
        except FileNotFoundError:
            return None
        except (RecipeError, OSError) as error:
            return str(error)
        if record.file_name != name:
            return f"{self.folder / name}: holds the run {record.file_name}"
        return record


def age(record: Record) -> tuple[int, str]:
    """Sorts records oldest first, in one order everywhere."""
    return record.run.started_ms, record.run.run_id


def inside(record: Record, path: str) -> PurePosixPath:
    """An artifact's path, which may come from another's archive.

    Raises:
        RegistryError: it leads out of the folder that it is taken from.
    """
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts:
        raise RegistryError(f"{record.label}: {path!r} is no path inside a run; it is not read")
    return pure
