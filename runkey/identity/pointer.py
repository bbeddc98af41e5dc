"""Which MLflow run a training is recorded in: a file in the training's folder.

A training that goes on after an interruption finds its run by it.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

POINTER = "run_id"
"""Name of the file."""
TOKEN = "training"
"""Tag of the run that holds the token."""


@dataclass(frozen=True, slots=True)
class RunPointer:
    """A training's run, and how much of the log it has."""

    uri: str
    """Of the store that the run was made in."""
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    """Chosen before the run is made: by it a run is found whose id never arrived here, since the
    process or the connection was lost in between."""
    run_id: str | None = None
    """None: not made yet, as far as is known."""
    sent: dict[str, int] = field(default_factory=dict)
    """By the name of a log how many bytes of it, all whole lines, are in MLflow for certain."""


def read_pointer(folder: Path) -> RunPointer | None:
    """The pointer in a training's folder; None: there is none, or it cannot be read."""
    try:
        return RunPointer(**json.loads((folder / POINTER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_pointer(folder: Path, pointer: RunPointer) -> None:
    """Write the pointer whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    write_durably(folder / POINTER, json.dumps(asdict(pointer), sort_keys=True) + "\n")


def write_durably(path: Path, text: str) -> None:
    """Write a file whole or not at all; it is on the disk afterwards.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
