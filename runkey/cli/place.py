"""Where the command was called, and the store and runs that belong there."""

from __future__ import annotations

import os
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

    Outside a repository the address alone will do: a server's, or a database's with its full path.

    Raises:
        RunkeyError: the current folder lies in no repository, and no such address is set.
    """
    from runkey.tracking.store import locate_store

    try:
        return locate_store(paths.store_root())
    except FileNotFoundError as error:
        address = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
        if address.startswith(("http://", "https://", "sqlite:////")):
            return locate_store(Path.cwd())
        raise RunkeyError(
            f"{error}; change to a folder of the repository, or set MLFLOW_TRACKING_URI to a"
            " server's address or sqlite:////full/path/mlflow.db"
        ) from None


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
