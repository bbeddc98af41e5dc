"""Where the command was called, and the store and runs that belong there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runkey import paths
from runkey.errors import RunkeyError

if TYPE_CHECKING:
    from runkey.registry.claims.claims import Claims
    from runkey.registry.reading.query import SearchableLibrary
    from runkey.tracking.store import Store


def workspace() -> Path:
    """The repository that the current folder lies in.

    Raises:
        RunkeyError: it lies in none.
    """
    try:
        return paths.workspace()
    except FileNotFoundError as error:
        raise RunkeyError(f"{error}; change to a folder of the repository") from None


def checkout() -> Path:
    """The main checkout: what `DVC_ROOT` names, else the repository of the current folder.

    Raises:
        RunkeyError: the current folder lies in no repository.
    """
    try:
        return paths.store_root()
    except FileNotFoundError as error:
        raise RunkeyError(f"{error}; change to a folder of the repository") from None


def store() -> Store:
    """The store that the current folder, `DVC_ROOT` or `MLFLOW_TRACKING_URI` names.

    Raises:
        RunkeyError: the current folder lies in no repository.
    """
    from runkey.tracking.store import locate_store

    return locate_store(checkout())


def library() -> SearchableLibrary:
    """The runs of that store.

    Raises:
        RunkeyError: see `store`.
    """
    from runkey.registry.open import open_library

    place = store()
    return open_library(place.uri, place.home)


def claims() -> Claims:
    """Who trains what in that store.

    Raises:
        RunkeyError: see `store`.
    """
    from runkey.registry.open import open_claims

    place = store()
    return open_claims(place.uri, place.home)
