"""Hashes of files and of values, in the one canonical form that keys are made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from runkey.files import open_plain

_CHUNK = 1 << 20


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes; OSError if it is no plain file."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_stream(
    source: IO[bytes], copy: IO[bytes] | None = None, advance: Callable[[int], None] | None = None
) -> tuple[int, str]:
    """Read a stream to its end; return its size in bytes and hex sha256.

    `copy` receives the same bytes; `advance` is called with the bytes of each chunk, for progress.
    """
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        if copy:
            copy.write(chunk)
        if advance:
            advance(len(chunk))
    return size, digest.hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; NaN and Infinity are refused (ValueError)."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def sha256_json(value: Any) -> str:
    """Hex sha256 of `canonical_json(value)` in UTF-8."""
    return sha256_bytes(canonical_json(value).encode())
