"""All runs that have a key, read from MLflow: what the registry's records are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from runkey.errors import TrackingError
from runkey.identity.errors import RecipeError
from runkey.identity.key import ANY_KEY
from runkey.identity.record import KEY, Record
from runkey.tracking.records import logged_run, read_details
from runkey.tracking.store import Store, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PAGE = 1000
"""Runs a question: MLflow keeps all of them in memory, some 100 KB each."""


def recorded_runs(store: Store, say: Callable[[str], None]) -> Iterator[Record]:
    """Every active run that has a key, newest first, with its details.

    Args:
        store: where to look.
        say: told of runs whose details cannot be read; they come without.

    Raises:
        TrackingError: there is no store yet, or it cannot be read.
    """
    if store.database and not store.database.is_file():
        raise TrackingError(f"{store.database}: not found; `make repro` records the first run")
    client = open_client(store)
    from mlflow.exceptions import MlflowException

    try:
        for run in _runs(client):
            logged = logged_run(run)
            try:
                details = read_details(client, logged)
            except (RecipeError, OSError, ValueError) as error:
                say(f"run {logged.run_id}: listed without its details ({error})")
                details = None
            yield Record(run=logged, details=details)
    except MlflowException as error:
        raise TrackingError(f"{store.uri}: {' '.join(str(error).split())[:200]}") from None


def _runs(client: MlflowClient) -> Iterator[Any]:
    """`mlflow.entities.Run`s, in pages."""
    experiments = [
        str(experiment.experiment_id)
        for page in _pages(client.search_experiments, max_results=_PAGE)
        for experiment in page
    ]
    if experiments:  # MLflow takes none for all
        for page in _pages(
            client.search_runs,
            experiment_ids=experiments,
            filter_string=f"tags.{KEY} LIKE '{ANY_KEY}%'",
            max_results=_PAGE,
        ):
            yield from page


def _pages(search: Callable[..., Any], **question: Any) -> Iterator[Any]:
    """Every page that a search gives."""
    page = search(**question)
    yield page
    while page.token:
        page = search(**question, page_token=page.token)
        yield page
