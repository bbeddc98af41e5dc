"""The code of a snapshot beside the code part of a key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runkey.errors import RunkeyError
from runkey.identity.closure import code_rule, hash_code
from runkey.registry.git import git, git_bytes


def changed_files(root: Path, oid: str, code: Mapping[str, Any]) -> dict[str, str]:
    """Files of a key's code that a commit lacks, or has otherwise.

    Args:
        root: the workspace in the repository that holds the commit.
        oid: the commit.
        code: the code part of a recipe; its paths are relative to the workspace.

    Returns:
        What is wrong by path, in words; empty when all agree.

    Raises:
        RegistryError: git cannot read the commit.
    """
    hashes, rule = code["files"], code_rule(code)
    blobs = _blobs(root, oid)
    wrong = {path: "is not in it" for path in hashes if path not in blobs}
    wanted = [path for path in hashes if path in blobs]
    contents = _contents(root, [blobs[path] for path in wanted])
    for path in wanted:
        if same_code(path, contents.get(blobs[path]), hashes[path], rule):
            continue
        # A check-out may pass it through filters; git does that for single files only.
        given = git_bytes(root, "cat-file", "--filters", f"--path={path}", blobs[path])
        if not same_code(path, given, hashes[path], rule):
            wrong[path] = "is another one in it"
    return wrong


def same_code(path: str, data: bytes | None, digest: str, rule: str) -> bool:
    """Return True if a file of code has the hash that a key holds; None is no file."""
    try:
        return data is not None and hash_code(path, data, rule) == digest
    except RunkeyError:  # no Python
        return False


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
