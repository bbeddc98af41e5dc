"""What may go from a store: never a finished run, nor anything that is its only copy.

    for item in collect(scope):
        print(item.kind, item.name, item.why, item.size)
        item.remove()

- runs that failed, were killed, or whose process is gone; with them their artifacts, and their
  snapshot if no other run needs it.  Not as long as a checkpoint could go on from them;
- folders of trainings (checkpoints, log) whose key a finished run has;
- claims of dead or ended owners that a newer generation has replaced;
- worktrees of `runkey reproduce` that nobody works in, and files half written by dead processes.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from runkey import paths
from runkey.errors import RegistryError
from runkey.identity.key import ANY_SCHEMA, SCHEMA, short_key
from runkey.identity.pointer import read_pointer
from runkey.identity.record import Record
from runkey.registry.claims.claims import Claim, Claims, newest, state_now
from runkey.registry.collect_files import Found, leftovers, size_of, worktrees
from runkey.registry.git import git, has_git
from runkey.registry.library import Library
from runkey.registry.reading.local_library import LocalLibrary
from runkey.registry.snapshot import snapshot_refs
from runkey.training.checkpoint.lock import holder_of

Kind = Literal["run", "checkpoint", "claim", "worktree", "leftover"]
_TRAINING = re.compile(rf"({ANY_SCHEMA}-[0-9a-f]{{64}})(?:-repeats-([0-9a-f]{{8}}))?")
"""Name of a training's folder, see `paths.training_folder`."""
_QUIET_SECONDS = 3600.0
_KEY_CHARACTERS = len(f"{SCHEMA}-") + 64
_REPEAT_SECONDS = 86400.0
"""After so long an interrupted `runkey reproduce` may begin anew."""
_ENDED = ("FAILED", "KILLED")


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something that may go."""

    kind: Kind
    name: str
    why: str
    size: int
    """Bytes that it frees."""
    age_seconds: float
    """Since it ended or changed last."""
    remove: Callable[[], None] = field(repr=False, compare=False)
    """Removes it.  Raises: RunkeyError, OSError."""


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Where to look."""

    root: Path
    """The main checkout."""
    home: Path
    """`Store.home`."""
    library: Library
    """Of the store; on a server its runs are only asked about, never offered."""
    claims: Claims
    delete_run: Callable[[str], None]
    """Deletes a run from MLflow by its id."""
    now: float = field(default_factory=time.time)
    """Seconds since 1970."""

    @cached_property
    def is_local(self) -> bool:
        """Whether runs and claims are files of this machine."""
        return isinstance(self.library, LocalLibrary)

    @cached_property
    def records(self) -> list[Record]:
        """All runs of a local store."""
        return self.library.matching("") if self.is_local else []

    def runs_of(self, key: str) -> list[Record]:
        """All runs of a key, with details."""
        if self.is_local:
            return [record for record in self.records if record.key == key]
        return [self.library.with_details(record) for record in self.library.matching(key)]

    def is_trained_now(self, key: str) -> bool:
        """Whether somebody trains the key, or may: the owner of a claim may be out of sight."""
        claim = newest(self.claims, key)
        return claim is not None and state_now(claim) in ("running", "silent")

    def age(self, since_ms: int | None) -> float:
        """Seconds since a time in milliseconds since 1970."""
        return max(self.now - (since_ms or 0) / 1000, 0.0)


def collect(scope: Scope, older_than_days: float = 0.0) -> list[Item]:
    """What may go, the oldest first within its kind; nothing is removed.

    Args:
        scope: where to look.
        older_than_days: only what ended or changed so long ago.

    Raises:
        RegistryError: runs or claims cannot be read.
    """
    least = older_than_days * 86400
    runs = [item for item in _runs(scope) if item.age_seconds >= least]
    going = {item.name.rpartition(":")[2] for item in runs}
    others = [*_checkpoints(scope), *_claims(scope, going), *_found(scope)]
    return [*runs, *(item for item in others if item.age_seconds >= least)]


def _runs(scope: Scope) -> Iterator[Item]:
    kept = [f for f in _training_folders(scope.home) if _why_obsolete(scope, f) is None]
    # A training that can go on from its folder does so in its run.
    keys = {folder.name for folder in kept}
    runs = {pointer.run_id for folder in kept if (pointer := read_pointer(folder))}
    claims = scope.claims.all() if scope.is_local else []
    for record in scope.records:
        run = record.run
        why = run.status if run.status in _ENDED else _death(record, claims)
        if why is None or record.key in keys or run.run_id in runs:
            continue
        folder = _artifacts(scope, record)
        yield Item(
            kind="run",
            name=f"{record.label}:{run.run_id}",
            why=why.lower(),
            size=size_of(folder) if folder else 0,
            age_seconds=scope.age(run.ended_ms or run.started_ms),
            remove=partial(_remove_run, scope, record, folder),
        )


def _death(record: Record, claims: list[Claim]) -> str | None:
    """Why a run that MLflow has as RUNNING is not; None: it may be.

    Only the run's own claim tells.  A run without one, such as a reproduction, is left alone.
    """
    if record.run.status != "RUNNING":
        return None
    # The newest of them: a training that goes on after its process died has the same run.
    own = next((c for c in reversed(claims) if c.run_id == record.run.run_id), None)
    state = state_now(own) if own else None
    if state == "dead":
        return f"running, but its process {own.who if own else ''} is gone"
    return "running, but its claim says that it failed" if state == "failed" else None


def _artifacts(scope: Scope, record: Record) -> Path | None:
    """The run's folder in our own folder of artifacts; None: elsewhere, and not ours to delete."""
    assert isinstance(scope.library, LocalLibrary)
    try:
        folder = scope.library.artifacts(record).parent
    except RegistryError:
        return None
    ours = (scope.home.parent / "mlartifacts").resolve()
    inside = folder.name == record.run.run_id and folder.resolve().is_relative_to(ours)
    return folder if inside and folder.is_dir() else None


def _remove_run(scope: Scope, record: Record, folder: Path | None) -> None:
    scope.delete_run(record.run.run_id)
    if folder:
        shutil.rmtree(folder)
    # The record last of the run's own: as long as it is there, the run is offered again.
    _remove_refs(scope, record)
    (scope.home / paths.RECORDS / record.file_name).unlink(missing_ok=True)


def _remove_refs(scope: Scope, record: Record) -> None:
    """Let go of the run's snapshot, unless another run of the key has the same."""
    oid = _snapshot(record)
    here = [other for other in scope.library.matching(record.key) if other.run != record.run]
    if oid is None or not has_git(scope.root) or oid in map(_snapshot, here):
        return
    if scope.is_trained_now(record.key) or _current_key(scope.root) == record.key:
        return  # a snapshot is taken before its run is known; another store may have the run
    for ref, kept in snapshot_refs(scope.root, record.key).items():
        if kept == oid:
            git(scope.root, "update-ref", "-d", ref, oid)


def _snapshot(record: Record) -> str | None:
    return record.details.snapshot if record.details else record.run.tags.get("snapshot")


def _current_key(root: Path) -> str | None:
    """Key of the result in the working tree."""
    try:
        return str(json.loads((root / paths.RUN_JSON).read_text(encoding="utf-8"))["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _training_folders(home: Path) -> list[Path]:
    return sorted(
        p for p in home.glob(f"{ANY_SCHEMA}-*") if p.is_dir() and _TRAINING.fullmatch(p.name)
    )


def _checkpoints(scope: Scope) -> Iterator[Item]:
    for folder in _training_folders(scope.home):
        if why := _why_obsolete(scope, folder):
            name = f"{short_key(folder.name)}{folder.name[_KEY_CHARACTERS:]}/"
            yield _item(
                scope, "checkpoint", Found(folder, why), name, partial(shutil.rmtree, folder)
            )


def _why_obsolete(scope: Scope, folder: Path) -> str | None:
    """Why nothing will go on from a training's folder; None: it may."""
    match = _TRAINING.fullmatch(folder.name)
    assert match
    key, repeats = match.groups()
    whole = [record for record in scope.runs_of(key) if record.is_whole]
    if repeats:  # it has no claim: only that nothing changes shows that nobody trains
        quiet = scope.now - Found(folder, "").changed
        whole = [r for r in whole if (r.reproduction_of or "").startswith(repeats)]
        if quiet >= _REPEAT_SECONDS:
            return "a repeat was interrupted long ago; it can begin anew"
        busy = quiet < _QUIET_SECONDS
    else:
        busy = scope.is_trained_now(key)
    # Without a claim (runtime.mlflow: false) a training still holds its folder.
    if not whole or busy or holder_of(folder) is not None:
        return None
    return f"run {whole[0].run.run_id[:8]} of its key is finished"


def _claims(scope: Scope, going: set[str]) -> Iterator[Item]:
    """Generations that a newer one has replaced and that tell nothing any more."""
    if not scope.is_local:
        return
    claims = scope.claims.all()
    last = {claim.key: claim.generation for claim in claims}
    running = {record.run.run_id for record in scope.records if record.run.status == "RUNNING"}
    for claim in claims:
        state = state_now(claim)
        if claim.generation == last[claim.key] or state in ("running", "silent"):
            continue
        if claim.run_id in running - going:
            continue  # by this claim alone it is known that the run is dead
        yield Item(
            kind="claim",
            name=f"{short_key(claim.key)}.g{claim.generation}",
            why=f"{state}; generation {last[claim.key]} has replaced it",
            size=0,
            age_seconds=scope.age(claim.since_ms),
            remove=partial(scope.claims.remove, claim),
        )


def _found(scope: Scope) -> Iterator[Item]:
    for found in worktrees(scope.home / "reproduce", scope.now):
        name = f"reproduce/{found.path.name}"
        yield _item(scope, "worktree", found, name, partial(_remove_tree, scope.root, found.path))
    for found in leftovers(scope.home, scope.root, scope.now):
        yield _item(scope, "leftover", found, str(found.path), found.remove)


def _item(scope: Scope, kind: Kind, found: Found, name: str, remove: Callable[[], None]) -> Item:
    age = max(scope.now - found.changed, 0.0)
    size = size_of(found.path)
    return Item(kind=kind, name=name, why=found.why, size=size, age_seconds=age, remove=remove)


def _remove_tree(root: Path, path: Path) -> None:
    try:
        git(root, "worktree", "remove", "--force", str(path))
    except RegistryError:  # git does not know it any more
        shutil.rmtree(path)
        if has_git(root):
            git(root, "worktree", "prune")
