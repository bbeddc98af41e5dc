"""Looking up runs: the interface of a store's runs, those of a local store, and lookup by key.

A local store is read from its cache (`runkey.identity.record_cache`), a server is asked over REST
(`runkey.registry.server_library`); both are a `Library`.
"""

from __future__ import annotations

import json
import logging
import re
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from sqlite3 import Connection
from typing import BinaryIO, Protocol

from runkey import paths
from runkey.errors import RecipeError, RegistryError
from runkey.identity.key import ANY_KEY, ANY_SCHEMA, SCHEMA, SCHEMAS, SHORT
from runkey.identity.record import DETAILS, Details, LoggedRun, Record, age
from runkey.identity.record_cache import (
    DamagedCacheError,
    Rebuilt,
    open_records,
    read_records,
    rebuild,
)
from runkey.registry.mlflow_runs import SQLITE, all_runs
from runkey.registry.query import Field, Query, Value, choose, fixed_field

logger = logging.getLogger(__name__)

_KNOWN = 10
_ADDRESS = re.compile(rf"^(?:({ANY_SCHEMA})-)?([0-9a-f]{{4,64}})(?::([0-9a-f]{{4,32}}))?$")


class Library(Protocol):
    """The runs of one store."""

    @property
    def place(self) -> str:
        """For messages: a file, or a server's address."""

    def matching(self, prefix: str) -> list[Record]:
        """Return the runs whose key begins with `prefix` (with `rk2-`), oldest first.

        A server's come without details.

        Raises:
            RegistryError: the store cannot be read.
        """

    def find(self, query: Query) -> list[Record]:
        """Return the runs that a query selects, in its order; see `matching`."""

    def with_details(self, record: Record) -> Record:
        """Return the record with its details, if the run wrote any."""

    def open_file(self, record: Record, path: str) -> AbstractContextManager[BinaryIO]:
        """Open an artifact of the run for reading.

        Raises:
            RegistryError: it is not there; the text names the file and the run.
        """


def find_run(library: Library, address: str) -> Record:
    """Find the run that a user names, with its details.

    Args:
        library: where to look.
        address: a key or any unique prefix of one, with `rk2-` or without; another than the first
            run of a key is named by `KEY:RUN`, where RUN is a prefix of its MLflow id.

    Returns:
        Of several runs of one key the oldest whole one; else the newest.

    Raises:
        RegistryError: not a key, no such run, or an ambiguous prefix.
    """
    match = _ADDRESS.fullmatch(address.strip().lower())
    if not match:
        raise RegistryError(
            f"{address}: not a key; a key is {SCHEMA}- and hex digits, at least 4 of them"
            " (`runkey list` shows them)"
        )
    schema, digits, run_id = match.groups(default="")
    found = [
        r for s in ([schema] if schema else SCHEMAS) for r in library.matching(f"{s}-{digits}")
    ]
    found = [r for r in found if r.run.run_id.startswith(run_id)]
    keys = sorted({record.key for record in found})
    if not keys:
        raise RegistryError(
            f"{address}: no run of that key in {library.place}; `runkey list` shows what is there"
        )
    if len(keys) > 1:
        length = SHORT + len(SCHEMA) + 1
        while len({key[:length] for key in keys}) < len(keys):
            length += 4
        shown = ", ".join(key[:length] for key in keys[:4]) + (" ..." if len(keys) > 4 else "")
        raise RegistryError(f"{address}: {len(keys)} keys begin so: {shown}; give more of it")
    return library.with_details(canonical(found))


def canonical(runs: list[Record]) -> Record:
    """Return the run that stands for a key: the oldest finished original, else the newest run.

    `runs` are all of the key, at least one, oldest first.
    """
    finished = [record for record in runs if record.run.status == "FINISHED"]
    own = [record for record in finished if not record.reproduction_of]
    return (own or finished or runs[-1:])[0]


def known_runs(library: Library, names: Iterable[str]) -> list[LoggedRun]:
    """Return the newest runs, to look up names of metrics, parameters and tags in.

    Empty if the meaning of all `names` is fixed.
    """
    if all(fixed_field(name) for name in names):
        return []
    return [record.run for record in library.find(Query(limit=_KNOWN))]


def inside(record: Record, path: str) -> PurePosixPath:
    """Return an artifact's path, which may come from a foreign archive.

    Raises:
        RegistryError: it leads out of the run's folder.
    """
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts:
        raise RegistryError(f"{record.label}: {path!r} is no path inside a run; it is not read")
    return pure


def parse_details(data: bytes, where: str) -> Details:
    """Return the details in a record.json.

    Raises:
        RegistryError: it is damaged, or of another version; the text begins with `where`.
    """
    try:
        return Details.from_dict(json.loads(data), where)
    except ValueError:
        raise RegistryError(f"{where}: not JSON") from None
    except RecipeError as error:
        raise RegistryError(str(error)) from None


class LocalLibrary:
    """The runs of a store on this machine, read from its cache.

    A damaged cache is rebuilt from MLflow's database, if that is a sqlite file which is there.
    """

    def __init__(
        self, home: Path, on_damage: Callable[[str], None] = logger.warning, uri: str = ""
    ) -> None:
        """Read nothing yet.

        Args:
            home: `Store.home`.
            on_damage: called with a line on each record that cannot be read and is left out.
            uri: `Store.uri`; the default is mlflow.db beside `home`.
        """
        self.home = home
        self._uri = uri or f"{SQLITE}{home.parent / 'mlflow.db'}"
        self.path = paths.records(home, self._uri)
        self._on_damage = on_damage

    @property
    def place(self) -> str:
        """The file of the cache."""
        return str(self.path)

    def matching(self, prefix: str) -> list[Record]:
        """See `Library`."""
        return self._ask(
            lambda database: sorted(
                self._read(database, "key >= ? AND key < ?", prefix, f"{prefix}~"), key=age
            )
        )

    def find(self, query: Query) -> list[Record]:
        """See `Library`."""

        def question(database: Connection) -> list[Record]:
            chosen = choose(_select(database, query.prefix, query.fields), query)
            return [record for run in chosen for record in self._read(database, "run = ?", run)]

        return self._ask(question)

    def _ask(self, question: Callable[[Connection], list[Record]]) -> list[Record]:
        try:
            return self._answer(question)
        except DamagedCacheError as damage:
            database = Path(self._uri.removeprefix(SQLITE))
            if self._uri.startswith(SQLITE) and database.is_file():
                try:
                    self.rebuild()
                except (RegistryError, OSError):
                    raise damage from None
            elif not damage.is_partial:
                raise
            elif not paths.is_server(self._uri):
                self._on_damage(str(damage))
        return self._answer(question, partial=True)

    def _answer(
        self, question: Callable[[Connection], list[Record]], *, partial: bool = False
    ) -> list[Record]:
        with open_records(self.path, partial=partial) as database:
            return question(database) if database else []

    def rebuild(self, source: Library | None = None) -> Rebuilt:
        """Write the cache again from a server on the same store, or from MLflow's sqlite file.

        Raises:
            RegistryError: MLflow's database is not there, or cannot be read.
            OSError: the cache cannot be written.
        """
        if source:
            return rebuild(self.path, _complete(source.matching(ANY_KEY), source.with_details))
        runs = (Record(run=run, details=None) for run in all_runs(self._uri))
        return rebuild(self.path, _complete(runs, self._with_artifact))

    def _with_artifact(self, record: Record) -> Record:
        """Add the details that the run's artifacts hold, if it wrote any."""
        try:
            data = self.path_of(record, DETAILS).read_bytes()
        except FileNotFoundError:
            return record
        where = f"{DETAILS} of run {record.run.run_id}"
        return replace(record, details=parse_details(data, where))

    def _read(self, database: Connection, condition: str, *values: str) -> list[Record]:
        whole = []
        for record in read_records(database, condition, values):
            if isinstance(record, Record):
                whole.append(record)
            else:
                self._on_damage(f"{self.path}: {record}")
        return whole

    def with_details(self, record: Record) -> Record:
        """Return the record itself: a local one comes with its details."""
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
        """Return where an artifact is, or would be; see `artifacts` and `inside`."""
        return self.artifacts(record) / inside(record, path)

    def artifacts(self, record: Record) -> Path:
        """Return the folder of a run's artifacts.

        Records hold absolute paths, which are wrong after the checkout was moved or copied: the
        folder beside this store comes first.

        Raises:
            RegistryError: they are not files of this machine.
        """
        uri = urllib.parse.urlsplit(record.run.artifact_uri)
        if uri.scheme not in ("", "file"):
            raise RegistryError(
                f"{record.label}: its artifacts are at {record.run.artifact_uri}, which is read"
                " through a tracking server; set MLFLOW_TRACKING_URI to one"
            )
        recorded = Path(urllib.request.url2pathname(uri.path))
        beside = self.home.parent / "mlartifacts" / Path(*recorded.parts[-2:])
        return beside if beside.is_dir() else recorded


def _complete(
    records: Iterable[Record], add_details: Callable[[Record], Record]
) -> Iterator[Record]:
    """Yield the records with their details; a warning names those that cannot be read."""
    for record in records:
        try:
            yield add_details(record)
        except (RegistryError, OSError) as error:
            logger.warning(f"run {record.run.run_id}: listed without its details ({error})")
            yield record


def _select(
    database: Connection, prefix: str, fields: Sequence[Field]
) -> list[tuple[str, list[Value]]]:
    """Return run id and values of the fields of every run whose key begins with the prefix."""
    columns = [
        f"json_extract({field.kind}, ?)"
        if field.kind != "run"
        else field.name.replace("seconds", "(ended - started) / 1000")
        for field in fields
    ]
    names = [f'$."{field.name}"' for field in fields if field.kind != "run"]
    rows = database.execute(
        f"SELECT run, {', '.join(columns)} FROM runs WHERE key >= ? AND key < ?",
        (*names, prefix, f"{prefix}~"),
    )
    return [(run, values) for run, *values in rows]
