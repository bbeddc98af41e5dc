"""The runs of a team's tracking server, asked over REST."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from typing import Any, BinaryIO, cast

from runkey.errors import RegistryError
from runkey.identity.errors import RecipeError
from runkey.identity.record import DETAILS, KEY, Details, Record
from runkey.registry.reading.local_library import age, inside
from runkey.registry.reading.mlflow_json import run_from_json
from runkey.registry.reading.mlflow_query import filters, order_by
from runkey.registry.reading.query import Query, choose, fulfils, wanted
from runkey.registry.rest import RestClient, RestError

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
