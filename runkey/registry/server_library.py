"""The runs of a tracking server, asked over REST; and the library and claims of a store."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urlencode

from runkey.errors import RegistryError
from runkey.identity.record import DETAILS, KEY, LoggedRun, Record, age
from runkey.identity.record_cache import update_record
from runkey.paths import is_server
from runkey.registry.claims import Claims, FileClaims, ServerClaims
from runkey.registry.library import Library, LocalLibrary, inside, parse_details
from runkey.registry.mlflow_runs import run_from_json
from runkey.registry.query import Condition, Query, choose, fulfils, with_values
from runkey.registry.rest import RestClient, RestError, UnreachedError

logger = logging.getLogger(__name__)

# --- addresses of MLflow's pages

# Without it a new browser shows the menu of generative AI.
_KIND = {"workflowType": "machine_learning"}


def list_page(client: RestClient, server: str, experiment: str, view: str) -> str:
    """Return the page that lists an experiment's runs, in a shared view of its columns.

    Without such an experiment it is the start page; without such a view the columns are MLflow's.

    Raises:
        RegistryError: the server does not answer, or refuses.
    """
    try:
        found = client.get("experiments/get-by-name", {"experiment_name": experiment})["experiment"]
    except RestError as error:
        if error.code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return server
    tags = {tag["key"] for tag in found.get("tags", ())}
    shared = {"viewStateShareKey": view} if f"mlflow.sharedViewState.{view}" in tags else {}
    return f"{server}/#/experiments/{found['experiment_id']}/runs?{urlencode(shared | _KIND)}"


def run_page(server: str, run: LoggedRun) -> str:
    """Return the page of one run."""
    return f"{server}/#/experiments/{run.experiment_id}/runs/{run.run_id}?{urlencode(_KIND)}"


def comparison_page(server: str, runs: Sequence[LoggedRun]) -> str:
    """Return the page that compares runs."""
    ids = json.dumps([run.run_id for run in runs])
    experiments = json.dumps(sorted({run.experiment_id for run in runs}))
    query = urlencode({"runs": ids, "experiments": experiments} | _KIND)
    return f"{server}/#/compare-runs?{query}"


# --- a `Query` in the language of MLflow's search, as far as that goes

_ATTRIBUTES = {
    "run": "attributes.run_id",
    "name": "attributes.run_name",
    "status": "attributes.status",
    "started": "attributes.start_time",
    "ended": "attributes.end_time",
}


def filters(query: Query) -> list[tuple[str, bool]]:
    """Return filters whose answers together hold every run of the query.

    With each comes True if its answer holds no other run.
    """
    choices = [_terms(condition) for condition in query.conditions]
    exact = all(is_exact for _, is_exact in choices)
    key = f"tags.{KEY} LIKE '{query.prefix}%'"
    combinations = product(*(terms for terms, _ in choices))
    return [(" AND ".join([key, *filter(None, terms)]), exact) for terms in combinations]


def order_by(query: Query) -> tuple[str, ...] | None:
    """Return the order; None if the server cannot sort so (it sorts parameters as text)."""
    direction = "DESC" if query.descending else "ASC"
    if query.sort.kind == "metrics" and "`" not in query.sort.name:
        return (f"metrics.`{query.sort.name}` {direction}",)
    if query.sort.kind == "run" and query.sort.name in _ATTRIBUTES:
        return (f"{_ATTRIBUTES[query.sort.name]} {direction}",)
    return None


def _terms(condition: Condition) -> tuple[list[str], bool]:
    """Return terms, one of which holds for every run of the condition; and if only for such."""
    kind, name = condition.field.kind, condition.field.name
    if "`" in name or any(mark in condition.value for mark in "'\"\\`"):
        return [""], False
    if kind == "metrics":
        return _number_term(f"metrics.`{name}`", condition)
    if kind == "run" and name in ("started", "ended"):
        return _number_term(_ATTRIBUTES[name], condition)
    if kind == "run" and name not in _ATTRIBUTES:
        return [""], False
    column = _ATTRIBUTES[name] if kind == "run" else f"{kind}.`{name}`"
    if condition.operator == "~":
        # % and _ are wildcards there.
        literal = not any(mark in condition.value for mark in "%_")
        return [f"{column} ILIKE '%{condition.value}%'"], literal
    if condition.operator != "=":
        return [""], False
    texts, value = {condition.value}, condition.number
    if value is not None:  # as a run may record it
        texts |= {json.dumps(value), json.dumps(int(value) if value.is_integer() else value)}
    return [f"{column} = '{text}'" for text in sorted(texts)], True


def _number_term(column: str, condition: Condition) -> tuple[list[str], bool]:
    value = condition.number
    if value is None or not math.isfinite(value) or condition.operator == "~":
        return [""], False
    text = repr(int(value) if value.is_integer() else value)
    return [f"{column} {condition.operator} {text}"], True


# --- the runs of a server

_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "HTTP_404", "NOT_FOUND")
_PAGE = 1000
"""Runs per answer; MLflow allows 50,000, but a thousand are 15 MB already."""
_SECONDS = 120.0
"""Timeout of an answer: on sqlite MLflow sorts 10,000 runs by a metric in 10 s."""


class ServerLibrary:
    """The runs of a tracking server; those whose details were read stay in a cache."""

    def __init__(self, address: str, home: Path, *, offline: bool = False) -> None:
        """Send nothing yet; `offline`: answer from the cache if the server does not answer."""
        self.client = RestClient(address, _SECONDS)
        self._cache, self._offline = LocalLibrary(home, uri=address), offline

    @property
    def place(self) -> str:
        """The server's address, without a password."""
        return self.client.address

    def matching(self, prefix: str) -> list[Record]:
        """See `Library`."""
        try:
            return sorted(self.search(f"tags.{KEY} LIKE '{prefix}%'"), key=age)
        except UnreachedError as error:
            return self._cached(error).matching(prefix)

    def find(self, query: Query) -> list[Record]:
        """See `Library`.

        The server filters, sorts and limits as far as its language can express it; for the rest,
        all runs that it cannot rule out are fetched.
        """
        order = order_by(query)
        found: list[Record] = []
        try:
            for filter_string, exact in filters(query):
                page = query.limit if exact and order else None
                answer = with_values(self.search(filter_string, order or (), page), query)
                kept = (record for record, values in answer if fulfils(values, query))
                found += islice(kept, query.limit) if order else kept
        except UnreachedError as error:
            return self._cached(error).find(query)
        return choose(with_values(found, query), query)

    def _cached(self, error: UnreachedError) -> LocalLibrary:
        if not (self._offline and self._cache.path.is_file()):
            raise error
        logger.warning(f"{error}; shown is what {self._cache.place} has")
        return self._cache

    def with_details(self, record: Record) -> Record:
        """See `Library`."""
        if record.details is not None:
            return record
        try:
            data = self.client.artifact_bytes(record.run.run_id, DETAILS)
        except RegistryError as error:
            away = self._offline and isinstance(error, UnreachedError)
            if away or (isinstance(error, RestError) and error.code in _ABSENT):
                return record
            raise
        where = f"{record.label}: {DETAILS} of run {record.run.run_id}"
        whole = replace(record, details=parse_details(data, where))
        with suppress(OSError):  # a cache that cannot be written is no reason to stop
            update_record(self._cache.path, whole.run, whole.details)
        return whole

    def open_file(self, record: Record, path: str) -> AbstractContextManager[BinaryIO]:
        """See `Library`."""
        inner = str(inside(record, path))
        try:
            answer = self.client.artifact(record.run.run_id, inner)
        except RestError as error:
            raise RegistryError(
                f"{record.label}: {path}: not to be had (run {record.run.run_id}; {error})"
            ) from None
        return cast("AbstractContextManager[BinaryIO]", answer)

    def search(
        self, filter_string: str, order: tuple[str, ...] = (), page: int | None = None
    ) -> Iterator[Record]:
        """Yield records of active runs without details, fetched in pages as they are consumed.

        Args:
            filter_string: in MLflow's language.
            order: in MLflow's language.
            page: runs per answer, if fewer than usual are needed.
        """
        experiments = self.client.pages(
            "experiments/search",
            {"max_results": 1000, "view_type": "ACTIVE_ONLY"},
            "experiments",
            post=True,
        )
        question = {
            # All of them: another process may have made one just now.
            "experiment_ids": [str(one["experiment_id"]) for one in experiments],
            "filter": filter_string,
            "run_view_type": "ACTIVE_ONLY",
            "max_results": min(page or _PAGE, _PAGE),
            "order_by": list(order),
        }
        if question["experiment_ids"]:
            for run in self.client.pages("runs/search", question, "runs", post=True):
                yield Record(run=run_from_json(run), details=None)


def open_library(
    uri: str,
    home: Path,
    on_damage: Callable[[str], None] = logger.warning,
    *,
    offline: bool = False,
) -> Library:
    """Return the runs of a store; for `on_damage` and `offline` see the two libraries."""
    if is_server(uri):
        return ServerLibrary(uri, home, offline=offline)
    return LocalLibrary(home, on_damage, uri)


def open_claims(uri: str, home: Path) -> Claims:
    """Return the claims of a store; a server keeps them itself."""
    return ServerClaims(RestClient(uri)) if is_server(uri) else FileClaims(home / "claims")
