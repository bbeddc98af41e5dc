"""The library and the claims of a store, by its address."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runkey.registry.claims.claim_files import FileClaims
from runkey.registry.claims.claim_server import ServerClaims
from runkey.registry.claims.claims import Claims
from runkey.registry.reading.local_library import LocalLibrary, tell
from runkey.registry.reading.query import SearchableLibrary
from runkey.registry.reading.server_library import ServerLibrary
from runkey.registry.rest import RestClient

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
