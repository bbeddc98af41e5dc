"""Streams are hashed, copied and counted in one pass."""

from __future__ import annotations

import io
from pathlib import Path

from runkey.hashing import hash_stream, sha256_bytes, sha256_file


def test_a_stream_is_hashed_copied_and_counted(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    copy, counted = io.BytesIO(), list[int]()
    size, digest = hash_stream(io.BytesIO(content), copy, counted.append)
    assert (size, digest) == (len(content), sha256_bytes(content))
    assert copy.getvalue() == content
    assert sum(counted) == size
    assert len(counted) > 1
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == digest
    assert hash_stream(io.BytesIO()) == (0, sha256_bytes(b""))
