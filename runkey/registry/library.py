"""Where runs are looked up, and which run a user means by a key.

A local store is read from its records' files, a server is asked over REST; both are a `Library`.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol

from runkey.errors import RegistryError
from runkey.identity.key import ANY_SCHEMA, SCHEMA, SCHEMAS
from runkey.identity.record import Record

_ADDRESS = re.compile(rf"^(?:({ANY_SCHEMA})-)?([0-9a-f]{{4,64}})(?::([0-9a-f]{{4,32}}))?$")


class Library(Protocol):
    """The runs of one store."""

    @property
    def place(self) -> str:
        """For messages: a folder, or a server's address."""

    def matching(self, prefix: str) -> list[Record]:
        """Records of all runs whose key begins with `prefix` (with `rk2-`), oldest first.

        A server's come without details.

        Raises:
            RegistryError: the store cannot be read.
        """

    def with_details(self, record: Record) -> Record:
        """The record with its details, if the run wrote any."""

    def open_file(self, record: Record, path: str) -> AbstractContextManager[BinaryIO]:
        """An artifact of the run, to be read.

        Raises:
            RegistryError: it is not there; the text names the file and the run.
        """


def find_run(library: Library, address: str) -> Record:
    """The run that a user means, with its details.

    Args:
        library: where to look.
        address: a key or any unique beginning of one, with `rk2-` or without; a run of that key
            that is not the first one is named by `KEY:RUN`, RUN the beginning of its MLflow id.

    Returns:
        Of several runs of one key the oldest that is whole; else the newest.

    Raises:
        RegistryError: no key, no such run, or several keys begin so.
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
        shown = ", ".join(_until_unique(keys)[:4]) + (" ..." if len(keys) > 4 else "")
        raise RegistryError(f"{address}: {len(keys)} keys begin so: {shown}; give more of it")
    return library.with_details(canonical(found))


def canonical(runs: list[Record]) -> Record:
    """The run that stands for a key: the oldest whole one that repeats no other, else the newest.

    Args:
        runs: at least one, all of one key, oldest first.
    """
    finished = [record for record in runs if record.run.status == "FINISHED"]
    own = [record for record in finished if not record.reproduction_of]
    return (own or finished or runs[-1:])[0]


def _until_unique(keys: list[str], least: int = 12) -> list[str]:
    """The keys cut to the shortest common length at which they differ."""
    length = least + len(SCHEMA) + 1
    while len({key[:length] for key in keys}) < len(keys):
        length += 4
    return [key[:length] for key in keys]
