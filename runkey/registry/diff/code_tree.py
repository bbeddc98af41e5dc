"""The code of a snapshot beside the code part of a key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from runkey.hashing import sha256_bytes
from runkey.registry.git import git, git_bytes


def changed_files(root: Path, oid: str, hashes: Mapping[str, str]) -> dict[str, str]:
    """Files of a key's code that a commit lacks, or has otherwise.

    Args:
        root: the workspace in the repository that holds the commit.
        oid: the commit.
        hashes: hex sha256 by path relative to the workspace; CRLF counts as LF.

    Returns:
        What is wrong by path, in words; empty when all agree.

    Raises:
        RegistryError: git cannot read the commit.
    """
    blobs = _blobs(root, oid)
    wrong = {path: "is not in it" for path in hashes if path not in blobs}
    wanted = [path for path in hashes if path in blobs]
    contents = _contents(root, [blobs[path] for path in wanted])
    for path in wanted:
        if _hash(contents.get(blobs[path])) == hashes[path]:
            continue
        # A check-out may pass it through filters; git does that for single files only.
        given = git_bytes(root, "cat-file", "--filters", f"--path={path}", blobs[path])
        if _hash(given) != hashes[path]:
            wrong[path] = "is another one in it"
    return wrong


def _hash(content: bytes | None) -> str | None:
    return None if content is None else sha256_bytes(content.replace(b"\r\n", b"\n"))


def _blobs(root: Path, oid: str) -> dict[str, str]:
    """Name of the blob by path relative to the workspace."""
    prefix = git(root, "rev-parse", "--show-prefix")
    rows = git(root, "ls-tree", "-r", "-z", "--full-tree", oid).split("\0")
    found = {}
    for row in rows:
        head, _, path = row.partition("\t")
        if path.startswith(prefix) and head.split(" ")[1:2] == ["blob"]:
            found[path.removeprefix(prefix)] = head.split(" ")[2]
    return found


def _contents(root: Path, oids: list[str]) -> dict[str, bytes]:
    """Bytes by name of some blobs, from one git process; those that are missing are left out."""
    asked = list(dict.fromkeys(oids))
    answer = git_bytes(root, "cat-file", "--batch", text="".join(f"{oid}\n" for oid in asked))
    found, start = {}, 0
    for oid in asked:
        end = answer.index(b"\n", start)
        head = answer[start:end].split(b" ")
        start = end + 1
        if head[-1] != b"missing":
            size = int(head[2])
            found[oid] = answer[start : start + size]
            start += size + 1
    return found
