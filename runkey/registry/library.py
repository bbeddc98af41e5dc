"""The runs of a store: a local one's, read from its cache; a server's, asked over REST.

Both classes answer the same questions.  The cache is `runkey.identity.record_cache`; of a server's
runs it holds those whose details were read.  `run_reader` reads runs as MLflow has them now, also
without importing MLflow.
"""

from __future__ import annotations

import logging
import math
import re
import sqlite3
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from sqlite3 import Connection
from typing import Any, BinaryIO, cast

from runkey import paths
from runkey.errors import RecipeError, RegistryError, RunkeyError
from runkey.files import FormatError, open_plain, read_plain
from runkey.identity import record_cache
from runkey.identity.key import ANY_KEY, ANY_SCHEMA, SCHEMA, SCHEMAS, SHORT
from runkey.identity.record import DETAILS, KEY, Details, LoggedRun, Record, age
from runkey.progress import each
from runkey.registry.answers import checked
from runkey.registry.query import RUN, Query, choose, filters, order_by, select, value_of
from runkey.registry.rest import RestClient, RestError, UnreachedError

logger = logging.getLogger(__name__)


class NotStoredError(RegistryError):
    """A run has no such artifact, for certain: its store answered."""


class LocalLibrary:
    """The runs of a store on this machine, read from its cache.

    A damaged cache is rebuilt from MLflow's database, if that is a sqlite file which is there.
    """

    def __init__(
        self, home: Path, on_damage: Callable[[str], None] = logger.warning, uri: str = ""
    ) -> None:
        """Read nothing yet; `on_damage` gets a line on each record that cannot be read.

        `home` and `uri` are those of the `Store`; the default is mlflow.db beside `home`.
        """
        self.home = home
        self.uri = uri or f"{paths.SQLITE}{home.parent / 'mlflow.db'}"
        self.path = paths.records(home, self.uri)
        self.place = str(self.path)
        self._on_damage = on_damage

    def matching(self, prefix: str) -> list[Record]:
        """Return the runs whose key begins with `prefix` (with `rk2-`), oldest first.

        A server's come without details. RegistryError if the store cannot be read.
        """
        where = ("key >= ? AND key < ?", prefix, f"{prefix}~")
        return self._ask(lambda database: sorted(self._read(database, *where), key=age))

    def find(self, query: Query) -> list[Record]:
        """Return the runs that a query selects, in its order; see `matching`."""

        def question(database: Connection) -> list[Record]:
            rows, damaged = select(database, query)
            for run in damaged:
                list(self._read(database, "run = ?", run))  # says what is wrong with it
            chosen = choose(rows, query, lambda row, field: row[field])
            return [one for row in chosen for one in self._read(database, "run = ?", str(row[RUN]))]

        return self._ask(question)

    def with_details(self, record: Record) -> Record:
        """Return the record with its details, if the run wrote any: a local one has them."""
        return record

    def open_file(self, record: Record, path: str) -> AbstractContextManager[BinaryIO]:
        """Open an artifact for reading; RegistryError, with file and run, if it cannot be read.

        `NotStoredError` where there is none.
        """
        try:
            return open_plain(self.path_of(record, path))
        except OSError as error:
            why = error.strerror or error
            kind = NotStoredError if isinstance(error, FileNotFoundError) else RegistryError
            raise kind(f"{record.label}: {path}: {why} (run {record.run.run_id})") from None

    def path_of(self, record: Record, path: str) -> Path:
        """Return where an artifact is, or would be; see `artifacts` and `inside`."""
        return self.artifacts(record) / inside(record, path)

    def artifacts(self, record: Record) -> Path:
        """Return the folder of a run's artifacts; RegistryError if it is not on this machine.

        Records hold absolute paths, which are wrong after the checkout was moved or copied: the
        folder beside this store comes first.
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

    def rebuild(self, source: ServerLibrary | None = None) -> record_cache.Rebuilt:
        """Write the cache again from a server on the same store, or from MLflow's sqlite file.

        RegistryError if MLflow's database cannot be read, OSError if the cache cannot be written.
        """
        if source:
            return record_cache.rebuild(
                self.path, _complete(source.matching(ANY_KEY), source.with_details)
            )
        runs = (Record(run=run, details=None) for run in _all_runs(self.uri))
        return record_cache.rebuild(self.path, _complete(runs, self._with_artifact))

    def _with_artifact(self, record: Record) -> Record:
        with suppress(FileNotFoundError):
            return _add_details(record, read_plain(self.path_of(record, DETAILS)))
        return record

    def _ask(self, question: Callable[[Connection], list[Record]]) -> list[Record]:
        def answer(*, whole: bool = True) -> list[Record]:
            with record_cache.open_records(self.path, partial=not whole) as database:
                return question(database) if database else []

        try:
            return answer()
        except record_cache.DamagedCacheError as damage:
            database = Path(self.uri.removeprefix(paths.SQLITE))
            if self.uri.startswith(paths.SQLITE) and database.is_file():
                try:
                    self.rebuild()
                except (RegistryError, OSError):
                    raise damage from None
            elif not damage.is_partial:
                raise
            elif not paths.is_server(self.uri):
                self._on_damage(str(damage))
        return answer(whole=False)

    def _read(self, database: Connection, condition: str, *values: str) -> Iterator[Record]:
        for record in record_cache.read_records(database, condition, values):
            if isinstance(record, Record):
                yield record
            else:
                self._on_damage(f"{self.path}: {record}")


def _complete(
    records: Iterable[Record], with_details: Callable[[Record], Record]
) -> Iterator[Record]:
    """Yield the records with their details; a warning names those that cannot be read."""
    for record in records:
        try:
            yield with_details(record)
        except (RunkeyError, OSError) as error:
            logger.warning(f"run {record.run.run_id}: listed without its details ({error})")
            yield record


def _add_details(record: Record, data: bytes, label: str = "") -> Record:
    """Return the record with the details in its record.json; errors name its `label`, if any."""
    where = f"{label}{DETAILS} of run {record.run.run_id}"
    try:
        return replace(record, details=Details.parse(data, where))
    except RecipeError as error:
        raise RegistryError(str(error)) from None


_PAGE = 1000
"""Runs per answer; MLflow allows 50,000, but a thousand are 15 MB already."""


class ServerLibrary:
    """The runs of a tracking server; for its methods see `LocalLibrary`."""

    def __init__(self, address: str, home: Path, *, offline: bool = False) -> None:
        """Send nothing yet; `offline`: answer from the cache if the server does not answer."""
        self.client = RestClient(address)
        self.uri = self.place = self.client.address
        self._cache, self._offline = LocalLibrary(home, uri=address), offline
        self.path = self._cache.path

    def matching(self, prefix: str) -> list[Record]:
        """See `LocalLibrary`."""
        try:
            found = self._search(f"tags.{KEY} LIKE '{prefix}%'")
            return sorted((record for record in found if record.key.startswith(prefix)), key=age)
        except UnreachedError as error:
            return self._cached(error).matching(prefix)

    def find(self, query: Query) -> list[Record]:
        """See `LocalLibrary`.

        The server filters, sorts and limits as far as its language can express it; for the rest,
        all runs that it cannot rule out are fetched.
        """
        order = order_by(query)
        found: list[Record] = []
        try:
            for filter_string, exact in filters(query):
                page = query.limit if exact and order else None
                answer = self._search(filter_string, order or (), page)
                kept = (record for record in answer if query.holds(partial(value_of, record)))
                found += islice(kept, query.limit) if order else kept
        except UnreachedError as error:
            return self._cached(error).find(query)
        return choose(found, query, value_of)

    def _cached(self, error: UnreachedError) -> LocalLibrary:
        if not (self._offline and self._cache.path.is_file()):
            raise error
        logger.warning(f"{error}; shown is what {self._cache.place} has")
        return self._cache

    def with_details(self, record: Record) -> Record:
        """See `LocalLibrary`; a record.json that was fetched stays in the cache."""
        if record.details is not None:
            return record
        try:
            data = self.client.artifact_bytes(record.run.run_id, DETAILS)
        except RegistryError as error:
            away = self._offline and isinstance(error, UnreachedError)
            if away or self._is_absent(error, record, DETAILS):
                return record
            raise _behind(error, record, DETAILS) from None
        whole = _add_details(record, data, f"{record.label}: ")
        with suppress(OSError):  # a cache that cannot be written is no reason to stop
            record_cache.update_record(self._cache.path, whole.run, whole.details)
        return whole

    def open_file(self, record: Record, path: str) -> AbstractContextManager[BinaryIO]:
        """See `LocalLibrary`."""
        inner = str(inside(record, path))
        try:
            stored = record.details.files.get(path) if record.details else None
            file = self.client.artifact(record.run.run_id, inner, stored.size if stored else None)
            return cast("AbstractContextManager[BinaryIO]", file)
        except RestError as error:
            if self._is_absent(error, record, inner):
                raise NotStoredError(
                    f"{record.label}: {path}: not to be had (run {record.run.run_id}; {error})"
                ) from None
            raise _behind(error, record, path) from None
        except UnreachedError as error:
            raise _behind(error, record, path) from None

    def _is_absent(self, error: RegistryError, record: Record, path: str) -> bool:
        """Return True if an error means for certain that a run has no such artifact.

        Of a file that S3 has not, MLflow says HTTP 500, as of a store that is down; it lists the
        files of a store that is up.
        """
        if not isinstance(error, RestError) or error.is_absent or error.status < 500:
            return isinstance(error, RestError) and error.is_absent
        folder = str(PurePosixPath(path).parent).removeprefix(".")
        query = {"run_id": record.run.run_id} | ({"path": folder} if folder else {})
        try:
            answer = self.client.get("artifacts/list", query)
            files = checked(list[dict[str, Any]], answer.get("files", []))
        except (RegistryError, FormatError):
            return False
        return not any(one.get("path") == path for one in files)

    def _search(
        self, filter_string: str, order: tuple[str, ...] = (), page: int | None = None
    ) -> Iterator[Record]:
        """Yield active runs without details, in pages of `page` runs as they are consumed."""
        question = {
            # All of them: another process may have made one just now.
            "experiment_ids": [one.experiment_id for one in self.client.experiments()],
            "filter": filter_string,
            "run_view_type": "ACTIVE_ONLY",
            "max_results": min(page or _PAGE, _PAGE),
            "order_by": list(order),
        }
        if question["experiment_ids"]:
            for run in self.client.runs(question):
                yield Record(run=run, details=None)


def _behind[E: RegistryError](error: E, record: Record, path: str) -> E:
    """Return the error of an artifact's request, with its store if the server itself answered."""
    store = f"is the store behind it up? It keeps {record.run.artifact_uri}"
    text = f"{record.label}: {path}: {error}; {store}"
    if isinstance(error, UnreachedError):  # MLflow itself waits long for S3
        return type(error)(text)
    if not isinstance(error, RestError) or error.status < 500:
        return error
    return type(error)(text, error.code, error.status)


Library = LocalLibrary | ServerLibrary
"""The runs of one store; for messages, its `place` is a file, or a server without its password."""


def open_library(
    uri: str,
    home: Path,
    on_damage: Callable[[str], None] = logger.warning,
    *,
    offline: bool = False,
) -> Library:
    """Return the runs of a store; for `on_damage` and `offline` see the two libraries."""
    if paths.is_server(uri):
        return ServerLibrary(uri, home, offline=offline)
    return LocalLibrary(home, on_damage, uri)


_ADDRESS = re.compile(rf"^(?:({ANY_SCHEMA})-)?([0-9a-f]{{4,64}})(?::([0-9a-f]{{4,32}}))?$")


def split_address(address: str) -> tuple[str, str, str]:
    """Split `KEY` or `KEY:RUN` into schema (may be empty), digits and run; RegistryError if not."""
    match = _ADDRESS.fullmatch(address.strip().lower())
    if not match:
        raise RegistryError(
            f"{address}: not a key; a key is {SCHEMA}- and hex digits, at least 4 of them"
            " (`runkey list` shows them)"
        )
    schema, digits, run_id = match.groups(default="")
    return schema, digits, run_id


def find_run(library: Library, address: str) -> Record:
    """Find the run that a user names, with its details.

    The address is a key or any unique prefix of one, with `rk2-` or without.  It names the oldest
    whole run of the key, else the newest one; `KEY:RUN`, where RUN is a prefix of an MLflow id,
    names another.  RegistryError if it is no key, there is no such run, or several keys begin so.
    """
    schema, digits, run_id = split_address(address)
    found = [
        r for s in ([schema] if schema else SCHEMAS) for r in library.matching(f"{s}-{digits}")
    ]
    found = [r for r in found if r.run.run_id.startswith(run_id)]
    keys = sorted({record.key for record in found})
    if not keys:
        raise no_such_run(library, address)
    if len(keys) > 1:
        length = SHORT + len(SCHEMA) + 1
        while len({key[:length] for key in keys}) < len(keys):
            length += 4
        shown = ", ".join(key[:length] for key in keys[:4]) + (" ..." if len(keys) > 4 else "")
        raise RegistryError(f"{address}: {len(keys)} keys begin so: {shown}; give more of it")
    return library.with_details(canonical(found))


def no_such_run(library: Library, address: str) -> RegistryError:
    """Return the error of an address that names no run."""
    there = "; `runkey list` shows what is there"
    if isinstance(library, LocalLibrary) and not library.find(Query(limit=1)):
        there = ", which holds no runs; `runkey index` reads lost ones from MLflow again"
    return RegistryError(f"{address}: no run of that key in {library.place}{there}")


def canonical(runs: list[Record]) -> Record:
    """Return which of a key's runs (oldest first) stands for it: the oldest finished original one.

    Without one it is a finished reproduction, else the newest run.
    """
    finished = [record for record in runs if record.run.status == "FINISHED"]
    own = [record for record in finished if not record.reproduction_of]
    return (own or finished or runs[-1:])[0]


def inside(record: Record, path: str) -> PurePosixPath:
    """Return an artifact's path; RegistryError if it leads out of the run's folder."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts:
        raise RegistryError(f"{record.label}: {path!r} is no path inside a run; it is not read")
    return pure


# --- runs as MLflow has them now

ReadRun = Callable[[str], LoggedRun | None]
"""Returns a run by its MLflow id; None where there is none, or it was deleted. Raises RegistryError
if the store cannot be read."""

_BUSY_SECONDS = 15.0
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
    if paths.is_server(uri):
        return RestClient(uri).run
    if not uri.startswith(paths.SQLITE):
        return None

    def read(run_id: str) -> LoggedRun | None:
        with opened(uri) as database:
            return _read_from_sqlite(database, run_id)

    return read


def finished_runs(uri: str) -> set[str]:
    """List the MLflow ids of all finished runs that have a key; empty if not a sqlite store."""
    if not uri.startswith(paths.SQLITE):
        return set()
    with opened(uri) as database:
        return {run for (run,) in database.execute(f"{_KEYED} AND status = 'FINISHED'", (KEY,))}


def _all_runs(uri: str) -> Iterator[LoggedRun]:
    """Yield all runs of a sqlite store that have a key, and show progress."""
    with opened(uri) as database:
        for (run_id,) in each("index", database.execute(_KEYED, (KEY,)).fetchall(), "runs"):
            if run := _read_from_sqlite(database, run_id):
                yield run


@contextmanager
def opened(uri: str) -> Iterator[Connection]:
    """Open the database read-only; it is not created if it is not there."""
    path = Path(uri.removeprefix(paths.SQLITE))
    if path.exists() and not path.is_file():
        raise RegistryError(f"{path}: not a file; move it away: the next run makes a database")
    if not path.exists():
        raise RegistryError(f"{path}: not found; `make repro` records the first run")
    address = f"{path.resolve().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS)) as database:
            database.row_factory = sqlite3.Row
            yield database
    # The latter three: a table holds something that MLflow cannot have written.
    except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
        way_out = record_cache.sqlite_way_out(str(error))
        raise RegistryError(
            f"{path}: MLflow's database cannot be read ({error}){way_out}"
        ) from None


def _read_from_sqlite(database: Connection, run_id: str) -> LoggedRun | None:
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
