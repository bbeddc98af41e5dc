"""The library and the claims of a store, by its address."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlencode

from runkey.errors import RecipeError, RegistryError
from runkey.identity.record import DETAILS, KEY, Details, LoggedRun, Record
from runkey.registry.claims import Claims, FileClaims, ServerClaims
from runkey.registry.local_library import LocalLibrary, age, inside, run_from_json, tell
from runkey.registry.query import Condition, Query, SearchableLibrary, choose, fulfils, wanted
from runkey.registry.rest import RestClient, RestError

# Addresses of MLflow's pages.


# A browser that comes for the first time would show the menu of generative AI.
_KIND = {"workflowType": "machine_learning"}


def list_page(client: RestClient, server: str, experiment: str, view: str) -> str:
    """The page that lists an experiment's runs, in a shared view of its columns.

    Args:
        client: of the server.
        server: its address.
        experiment: name of the experiment; if there is none, the start page is what remains.
        view: name of the view, which is left out where the experiment has none of that name.

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
    """The page of one run."""
    return f"{server}/#/experiments/{run.experiment_id}/runs/{run.run_id}?{urlencode(_KIND)}"


def comparison_page(server: str, runs: Sequence[LoggedRun]) -> str:
    """The page that compares runs."""
    ids = json.dumps([run.run_id for run in runs])
    experiments = json.dumps(sorted({run.experiment_id for run in runs}))
    query = urlencode({"runs": ids, "experiments": experiments} | _KIND)
    return f"{server}/#/compare-runs?{query}"


# A `Query` in the language of MLflow's search, as far as that goes.


_ATTRIBUTES = {
    "run": "attributes.run_id",
    "name": "attributes.run_name",
    "status": "attributes.status",
    "started": "attributes.start_time",
    "ended": "attributes.end_time",
}
_SORTED_THERE = ("run", "name", "status", "started", "ended")


def filters(query: Query) -> list[tuple[str, bool]]:
    """Filters whose answers together hold every run that is meant.

    Returns:
        Each with whether it lets through only what is meant.
    """
    choices = [_terms(condition) for condition in query.conditions]
    exact = all(is_exact for _, is_exact in choices)
    key = f"tags.{KEY} LIKE '{query.prefix}%'"
    combinations = product(*(terms for terms, _ in choices))
    return [(" AND ".join([key, *filter(None, terms)]), exact) for terms in combinations]


def order_by(query: Query) -> tuple[str, ...] | None:
    """The order; None if the server cannot sort so (parameters would be sorted as text)."""
    direction = "DESC" if query.descending else "ASC"
    if query.sort.kind == "metrics" and "`" not in query.sort.name:
        return (f"metrics.`{query.sort.name}` {direction}",)
    if query.sort.kind == "run" and query.sort.name in _SORTED_THERE:
        return (f"{_ATTRIBUTES[query.sort.name]} {direction}",)
    return None


def _terms(condition: Condition) -> tuple[list[str], bool]:
    """Terms, one of which every run fulfils that fulfils the condition; whether only such do."""
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
        # % and _ stand for other characters there.
        literal = not any(mark in condition.value for mark in "%_")
        return [f"{column} ILIKE '%{condition.value}%'"], literal
    if condition.operator == "=" and condition.number is None:
        return [f"{column} = '{condition.value}'"], True
    if condition.operator == "=":
        return [f"{column} = '{text}'" for text in _spellings(condition)], True
    return [""], False


def _number_term(column: str, condition: Condition) -> tuple[list[str], bool]:
    value = condition.number
    if value is None or not math.isfinite(value) or condition.operator == "~":
        return [""], False
    text = repr(int(value) if value.is_integer() else value)
    return [f"{column} {condition.operator} {text}"], True


def _spellings(condition: Condition) -> list[str]:
    """The texts that runs record a number as, and the one that was typed."""
    value = condition.number
    assert value is not None
    texts = {condition.value, json.dumps(value)}
    if value.is_integer():
        texts.add(json.dumps(int(value)))
    return sorted(texts)


# The runs of a team's tracking server, asked over REST.


_PAGE = 1000
"""Runs an answer; MLflow allows 50,000, but a thousand are 15 MB already."""
_SECONDS = 120.0
"""How long an answer may take: on sqlite MLflow sorts 10,000 runs by a metric in 10 s."""


class ServerLibrary:
    """Implements `SearchableLibrary` on a tracking server."""

    def __init__(self, address: str) -> None:
        """Nothing is asked yet.  Args: address: of the server."""
        self.client = RestClient(address, _SECONDS)

    @property
    def place(self) -> str:
        """The server's address, without a password."""
        return self.client.address

    def matching(self, prefix: str) -> list[Record]:
        """See `Library`."""
        return sorted(self.search(f"tags.{KEY} LIKE '{prefix}%'"), key=age)

    def find(self, query: Query) -> list[Record]:
        """See `SearchableLibrary`.

        The server filters, sorts and cuts where its language can say it; the rest is done here, for
        which all runs that it cannot rule out are fetched.
        """
        order = order_by(query)
        found: list[Record] = []
        for filter_string, exact in filters(query):
            page = query.limit if exact and order else None
            answer = wanted(self.search(filter_string, order or (), page), query)
            kept = (record for record, values in answer if fulfils(values, query))
            found += islice(kept, query.limit) if order else kept
        return choose(wanted(found, query), query)

    def with_details(self, record: Record) -> Record:
        """See `Library`."""
        if record.details is not None:
            return record
        try:
            content = self.client.artifact_bytes(record.run.run_id, DETAILS)
        except RestError as error:
            if error.code in _ABSENT:
                return record
            raise
        where = f"{record.label}: {DETAILS} of run {record.run.run_id}"
        try:
            return replace(record, details=Details.from_dict(json.loads(content), where))
        except ValueError:
            raise RegistryError(f"{where}: not JSON") from None
        except RecipeError as error:
            raise RegistryError(str(error)) from None

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
        """Records of active runs without details, asked for in pages as they are taken.

        Args:
            filter_string: in MLflow's language.
            order: in MLflow's language.
            page: runs an answer, if fewer than usual are wanted.

        Raises:
            RegistryError: the server refuses or cannot be reached.
        """
        question: dict[str, Any] = {
            "experiment_ids": self.experiments(),
            "filter": filter_string,
            "run_view_type": "ACTIVE_ONLY",
            "max_results": min(page or _PAGE, _PAGE),
            "order_by": list(order),
        }
        while question["experiment_ids"]:
            answer = self.client.post("runs/search", question, repeat=True)
            for run in answer.get("runs", []):
                yield Record(run=run_from_json(run), details=None)
            if not answer.get("next_page_token"):
                return
            question["page_token"] = answer["next_page_token"]

    def experiments(self) -> list[str]:
        """Ids of all active experiments, asked anew: another process may have made one."""
        found: list[str] = []
        question: dict[str, Any] = {"max_results": 1000, "view_type": "ACTIVE_ONLY"}
        while True:
            answer = self.client.post("experiments/search", question, repeat=True)
            found += [str(e["experiment_id"]) for e in answer.get("experiments", [])]
            if not answer.get("next_page_token"):
                return found
            question["page_token"] = answer["next_page_token"]


_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "HTTP_404", "NOT_FOUND")


_SERVER = ("http://", "https://")


def open_library(uri: str, home: Path, say: Callable[[str], None] = tell) -> SearchableLibrary:
    """Where the runs of a store are looked up; nothing is read or asked yet.

    Args:
        uri: `Store.uri`.
        home: `Store.home`; a server's runs are asked for and need none.
        say: told what is left out of an answer, in one line each.
    """
    return ServerLibrary(uri) if uri.startswith(_SERVER) else LocalLibrary(home, say)


def open_claims(uri: str, home: Path) -> Claims:
    """Where it is settled who trains a key of a store; nothing is read or asked yet.

    Args:
        uri: `Store.uri`.
        home: `Store.home`; a server keeps its claims itself and needs none.
    """
    if uri.startswith(_SERVER):
        return ServerClaims(RestClient(uri))
    return FileClaims(home / "claims")
