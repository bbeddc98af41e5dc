"""Atomic file writes: a reader sees the old file or the new one, never half of it."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: Path, folder: Path | None = None, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of `path`, on the disk, when the block ends well.

    It is beside `path`, or in `folder`. Its name cannot be guessed and no link is followed, since
    the folder may be one that others write to, such as /tmp. `mode` is subject to the umask.

    Raises:
        OSError: the file cannot be written; an older file is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}"
    temporary = (folder or path.parent) / name
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        with os.fdopen(os.open(temporary, flags, mode), "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, data: str | bytes, mode: int = 0o666) -> None:
    """Write a file as `replacing` does, which see.

    Several processes may write the same path; the last one wins. Missing parent folders are made.
    """
    with replacing(path, mode=mode) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinities are refused (ValueError)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")


def json_safe(value: Any) -> Any:
    """Return the same value with floats that JSON cannot hold (nan, inf) as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a new name survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
