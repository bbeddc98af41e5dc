"""Where the command was called."""

from __future__ import annotations

from pathlib import Path

from runkey import paths
from runkey.errors import RunkeyError


def workspace() -> Path:
    """The repository that the current folder lies in.

    Raises:
        RunkeyError: it lies in none.
    """
    try:
        return paths.workspace()
    except FileNotFoundError as error:
        raise RunkeyError(f"{error}; change to a folder of the repository") from None
