"""A run's snapshot between git repositories: by a remote, or by a bundle in a file."""

from __future__ import annotations

import re
from pathlib import Path

from runkey.errors import RegistryError
from runkey.identity.key import short_key
from runkey.registry.snapshot import REFS, git

_OID = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


def ref_of(key: str, oid: str) -> str:
    """Name of the ref that keeps a snapshot.

    Raises:
        RegistryError: `oid` is no commit's name.
    """
    if not _OID.fullmatch(oid):
        raise RegistryError(f"{short_key(key)}: {oid[:60]!r} names no commit; refused")
    return f"{REFS}/{key}/{oid[:12]}"


def check_remote(root: Path, remote: str) -> str:
    """Address of a git remote.

    Raises:
        RegistryError: there is none of that name.
    """
    try:
        return git(root, "remote", "get-url", "--", remote)
    except RegistryError:
        raise RegistryError(
            f"git has no remote {remote!r}; `git remote add {remote} <address>`, or --git-remote"
        ) from None


def push_snapshot(root: Path, remote: str, key: str, oid: str) -> bool:
    """Send a snapshot to a remote; whether it was not there yet.

    Raises:
        RegistryError: it is not here, or the remote cannot be reached or refuses.
    """
    ref = ref_of(key, oid)
    if git(root, "ls-remote", "--", remote, ref).startswith(oid):
        return False
    git(root, "push", "--quiet", "--no-verify", "--", remote, f"{oid}:{ref}")
    return True


def fetch_snapshot(root: Path, remote: str, key: str, oid: str) -> None:
    """Get a snapshot from a remote, and keep it by its ref.

    Raises:
        RegistryError: the remote does not have it, or has another commit under its name.
    """
    _fetch(root, remote, key, oid, remote)


def bundle_snapshot(root: Path, key: str, oid: str, path: Path) -> None:
    """Write a snapshot with its history to a file.

    Raises:
        RegistryError: it is not here.
    """
    try:
        git(root, "bundle", "create", "--quiet", str(path), ref_of(key, oid))
    except RegistryError:
        raise RegistryError(
            f"{short_key(key)}: the snapshot {oid[:12]} is not in this repository;"
            f" `runkey verify {short_key(key)}` says what else is missing"
        ) from None


def unbundle_snapshot(root: Path, path: Path, key: str, oid: str, staging: Path) -> None:
    """Get a snapshot from a bundle of unknown origin, and keep it by its ref.

    git checks every object (fsck) on the way, and no other ref is taken.

    Args:
        root: the repository.
        path: of the bundle.
        key: the run's.
        oid: the commit that must be in it.
        staging: a folder for a repository of its own; must not exist.

    Raises:
        RegistryError: it is no bundle, holds other refs or damaged objects, or lacks the commit.
    """
    expected = f"{oid} {ref_of(key, oid)}"
    heads = git(root, "bundle", "list-heads", str(path)).splitlines()
    if heads != [expected]:
        shown = ", ".join(heads)[:200] or "nothing"
        raise RegistryError(f"{path.name}: holds {shown}, not just {expected}; refused")
    # A bundle's objects are not checked by git 2.39 as a remote's are: it becomes a remote first.
    git(root, "init", "--quiet", "--bare", "--template=", str(staging))
    _fetch(staging, str(path), key, oid, path.name)
    _fetch(root, str(staging), key, oid, path.name)


def _fetch(root: Path, source: str, key: str, oid: str, where: str) -> None:
    ref = ref_of(key, oid)
    checked = ("-c", "transfer.fsckObjects=true")
    options = ("--quiet", "--no-tags", "--no-write-fetch-head", "--no-recurse-submodules")
    try:
        git(root, *checked, "fetch", *options, "--", source, f"{ref}:{ref}")
    except RegistryError as error:
        why = str(error).removeprefix("git -c: ")
        raise RegistryError(
            f"{short_key(key)}: git does not take the snapshot {oid[:12]} from {where} ({why})"
        ) from None
    if git(root, "rev-parse", "--verify", f"{ref}^{{commit}}") != oid:
        git(root, "update-ref", "-d", ref)
        raise RegistryError(f"{short_key(key)}: {ref} of {where} is not the commit {oid[:12]}")
