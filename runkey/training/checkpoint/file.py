"""The file of a checkpoint, and of weights: facts, tensors, and a hash over both.

    RUNKEY CHECKPOINT 1 <sha256 of all that follows the first line>
    {"step": 120, ...}                          facts: one line of JSON, read without the rest
    <what torch.save wrote>

A file has its name only when it is whole and on disk: it is written under another name, synced, and
renamed.  The hash is for what happens later, or beneath: a bad disk, a copy that was cut short.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

TEMPORARY = ".tmp"
"""Ending of the name that a file has while it is written."""

_MAGIC = b"RUNKEY CHECKPOINT 1 "
_FIRST_LINE = len(_MAGIC) + 64 + 1


class DamagedError(Exception):
    """A file is not whole, or not what was looked for; the text says why."""


class _Hashing:
    """Writes to a file what it hashes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write all of `data`."""
        self.hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Hand on what is buffered."""
        self._file.flush()


def write_temporary(path: Path, facts: Mapping[str, Any], tensors: Any) -> str:
    """Write a file under its temporary name, `path` and TEMPORARY, and sync it.

    Args:
        path: the name that it is to get.
        facts: what JSON holds.
        tensors: nested dicts and lists of tensors, numbers and strings.

    Returns:
        The hash.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(b" " * _FIRST_LINE)
            hashing = _Hashing(file)
            hashing.write(json.dumps(facts).encode() + b"\n")
            _save(tensors, hashing)
            file.seek(0)
            digest = hashing.hash.hexdigest()
            file.write(_MAGIC + digest.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):  # the one above is the one to be told
            temporary.unlink()
        raise
    return digest


def _save(tensors: Any, file: _Hashing) -> None:
    """torch.save, which tells an OSError of the file as a RuntimeError of its own."""
    try:
        torch.save(tensors, file)  # type: ignore[arg-type]
    except RuntimeError:
        if file.error is not None:
            raise file.error from None
        raise


def give_name(path: Path) -> None:
    """Give a temporary file its name, in place of an older file of that name, and sync the folder.

    Raises:
        OSError: the folder refuses.
    """
    temporary_name(path).replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a file, unchecked: the hash is not computed.

    Raises:
        DamagedError: they cannot be read.
    """
    try:
        with path.open("rb") as file:
            _read_first_line(file)
            return _parse(file.readline())
    except OSError as error:
        raise DamagedError(error.strerror or str(error)) from error


def read_file(path: Path) -> tuple[dict[str, Any], Any, str]:
    """Facts, tensors (on the host) and hash of a file, which is what was written.

    Raises:
        DamagedError: it is not.
    """
    try:
        with path.open("rb") as file:
            expected = _read_first_line(file)
            line, rest = file.readline(), file.read()
    except OSError as error:
        raise DamagedError(error.strerror or str(error)) from error
    digest = hashlib.sha256(line)
    digest.update(rest)
    if digest.hexdigest() != expected:
        raise DamagedError("its hash does not fit: it was cut short or changed")
    try:
        tensors = torch.load(io.BytesIO(rest), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise DamagedError("it holds something else than tensors, numbers and text") from error
    return _parse(line), tensors, expected


def temporary_name(path: Path) -> Path:
    """What a file is called while it is written."""
    return path.with_name(path.name + TEMPORARY)


def _read_first_line(file: BinaryIO) -> str:
    """The hash that a file says it has."""
    line = file.read(_FIRST_LINE)
    if not line.startswith(_MAGIC):
        raise DamagedError("it is no checkpoint")
    return line[len(_MAGIC) :].decode("ascii", errors="replace").rstrip("\n")


def _parse(line: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(line)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise DamagedError("its facts are no JSON object")
    return facts
