"""Find what may be deleted from a store: never a finished run, nor the only copy of anything.

That is: runs that failed or whose process is gone, with a snapshot that no other run needs, unless
a training could resume them; folders of trainings whose key a finished run has, and checkpoints of
such a key on a server; claims that a newer generation has replaced; worktrees, environments and
half-written files that no process uses; copies of weights; decoded images.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Literal

import psutil

from runkey import paths
from runkey.errors import RegistryError, RunkeyError
from runkey.files import read_json
from runkey.identity import initial_weights
from runkey.identity.initial_weights import OLD_WEIGHTS, WEIGHTS
from runkey.identity.key import short_key, split_training, training_folders
from runkey.identity.record import Record, RunPointer
from runkey.identity.record_cache import remove_record
from runkey.registry import models
from runkey.registry.checkpoints import FOLDER, all_shared
from runkey.registry.claims import Claim, Claims, newest, state_now
from runkey.registry.library import Library, LocalLibrary
from runkey.registry.snapshot import git, has_git, remove_worktree, snapshot_refs
from runkey.training.lock import LOCK, holder_of

_QUIET_SECONDS = 3600.0
"""How long a folder without a lock must be unchanged."""
_OUTPUTS = (
    *(paths.PREPARED, paths.MEMORY, paths.MODEL, paths.LOGS, paths.EVALUATION),
    *(paths.METRICS, paths.PLOTS),
)
_TEMPORARY = re.compile(r"\..+\.(\d{1,9})-[0-9a-f]{8}")
"""Names of files that are being written, see `runkey.files.replacing`: the process is in them."""
_HALF_WRITTEN_SECONDS = 86400.0
"""Longer than any file takes to be written."""

# fmt: off
Kind = Literal[
    "run", "checkpoint", "shared", "claim", "worktree", "environment", "leftover", "weights",
    "images", "model", "experiment", "run-cache", "snapshot",
]
# fmt: on
"""The last four are for `runkey.registry.delete`, which also deletes finished runs."""
_REPEAT_SECONDS = 86400.0
"""After this time an interrupted `runkey reproduce` has to start again."""
_ENDED = ("FAILED", "KILLED")


@dataclass(frozen=True)
class Item:
    """Something that may be deleted."""

    kind: Kind
    name: str
    why: str
    size: int
    """Bytes that deleting it frees."""
    age_seconds: float
    """Since it ended or last changed."""
    remove: Callable[[], None] = field(repr=False, compare=False)
    """Deletes it; may raise RunkeyError or OSError."""

    def try_to_remove(self) -> str | None:
        """Delete it; return why it could not be deleted."""
        try:
            self.remove()
        except OSError as error:
            return f"{error.filename or self.name}: {error.strerror or error}"
        except RunkeyError as error:
            return str(error)
        return None


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Where to look."""

    root: Path
    """The main checkout."""
    home: Path
    """`Store.home`."""
    library: Library
    """Of the store; a server's runs are read, but never offered for deletion."""
    claims: Claims
    delete_run: Callable[[str], None]
    """Deletes a run from MLflow by its id."""
    now: float = field(default_factory=time.time)
    """Seconds since 1970."""

    @cached_property
    def is_local(self) -> bool:
        """True if runs and claims are files of this machine."""
        return isinstance(self.library, LocalLibrary)

    @property
    def cache(self) -> Path:
        """The cache of the store's runs."""
        return paths.records(self.home, "" if self.is_local else self.library.place)

    @cached_property
    def records(self) -> list[Record]:
        """All runs of a local store."""
        return self.library.matching("") if self.is_local else []

    @cached_property
    def trainings(self) -> dict[Path, str | None]:
        """Folders of trainings, each with why no training will resume from it; None: one may."""
        return {folder: _why_obsolete(self, folder) for folder in training_folders(self.home)}

    def is_trained_now(self, key: str) -> bool:
        """Return True if the key is, or may be, trained now: an owner may not be visible here."""
        claim = newest(self.claims, key)
        return claim is not None and state_now(claim) in ("running", "silent")

    def age(self, since_ms: float) -> float:
        """Return the seconds since a time in milliseconds since 1970."""
        return max(self.now - since_ms / 1000, 0.0)


def collect(scope: Scope, older_than_days: float = 0.0) -> list[Item]:
    """List what may be deleted and ended or last changed more than `older_than_days` ago."""
    least = older_than_days * 86400
    runs = [item for item in _runs(scope) if item.age_seconds >= least]
    going = {item.name.rpartition(":")[2] for item in runs}
    others = chain(
        _checkpoints(scope),
        _shared_checkpoints(scope),
        _claims(scope, going),
        _worktrees(scope),
        _environments(scope),
        _leftovers(scope),
        _initial_weights(scope),
        _decoded_images(scope),
    )
    return [*runs, *(item for item in others if item.age_seconds >= least)]


def _runs(scope: Scope) -> Iterator[Item]:
    kept = [folder for folder, why in scope.trainings.items() if why is None]
    # A training that can resume from its folder does so in its run.
    keys = {folder.name for folder in kept}
    runs = {pointer.run_id for folder in kept if (pointer := RunPointer.read(folder))}
    claims = scope.claims.all() if scope.is_local else []
    for record in scope.records:
        run = record.run
        why = run.status if run.status in _ENDED else _death(record, claims)
        if why is None or record.key in keys or run.run_id in runs:
            continue
        folder = artifacts_folder(scope, record)
        size, age = size_of(folder) if folder else 0, scope.age(run.ended_ms or run.started_ms)
        remove = partial(_remove_run, scope, record, folder)
        yield Item("run", f"{record.label}:{run.run_id}", why.lower(), size, age, remove)


def _death(record: Record, claims: list[Claim]) -> str | None:
    """Why a run that is RUNNING in MLflow does not run; None: it may run.

    Only the run's own claim shows it. A run without one, such as a reproduction, is left alone.
    """
    if record.run.status != "RUNNING":
        return None
    # The newest: a training that was resumed by another process has the same run.
    own = next((c for c in reversed(claims) if c.run_id == record.run.run_id), None)
    state = state_now(own) if own else None
    if state == "dead":
        return f"running, but its process {own.who if own else ''} is gone"
    return "running, but its claim says that it failed" if state == "failed" else None


def artifacts_folder(scope: Scope, record: Record) -> Path | None:
    """Return the run's folder in our folder of artifacts; None: it is not there, or not ours."""
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
        remove_path(folder)
    # The record comes last: as long as it is there, the run is offered again.
    _remove_refs(scope, record)
    remove_record(scope.cache, record.run.run_id)


def _remove_refs(scope: Scope, record: Record) -> None:
    """Delete the refs of the run's snapshot, unless another run of the key has the same."""
    oid = _snapshot(record)
    here = [other for other in scope.library.matching(record.key) if other.run != record.run]
    if oid is None or not has_git(scope.root) or oid in map(_snapshot, here):
        return
    if scope.is_trained_now(record.key) or current_key(scope.root) == record.key:
        return  # the snapshot may be of a run that just starts, or of one in another store
    for ref, kept in snapshot_refs(scope.root, record.key).items():
        if kept == oid:
            git(scope.root, "update-ref", "-d", ref, oid)


def _snapshot(record: Record) -> str | None:
    return record.details.snapshot if record.details else record.run.tags.get("snapshot")


def current_key(root: Path) -> str | None:
    """Return the key of the result in the working tree."""
    try:
        return str(read_json(root / paths.RUN_JSON)["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checkpoints(scope: Scope) -> Iterator[Item]:
    for folder, why in scope.trainings.items():
        if why:
            key, _ = split_training(folder)
            name = f"{short_key(key)}{folder.name.removeprefix(key)}/"
            yield _item(scope, "checkpoint", folder, name, why)


def _shared_checkpoints(scope: Scope) -> Iterator[Item]:
    """Checkpoints on a server that no training will go on from: a run of their key is finished."""
    if isinstance(scope.library, LocalLibrary):
        return
    for record, place in all_shared(scope.library):
        others = map(scope.library.with_details, scope.library.matching(record.key))
        whole = next((other for other in others if other.is_whole), None)
        if whole and not scope.is_trained_now(record.key):
            name = f"{record.label}:{record.run.run_id[:8]}/{FOLDER}/"
            why = f"run {whole.run.run_id[:8]} of its key is finished"
            age = scope.age(record.run.ended_ms or record.run.started_ms)
            yield Item("shared", name, why, place.size(), age, place.clear)


def _why_obsolete(scope: Scope, folder: Path) -> str | None:
    key, repeats = split_training(folder)
    runs = map(scope.library.with_details, scope.library.matching(key))
    whole = [record for record in runs if record.is_whole]
    if repeats:  # a repeat has no claim: it has ended if nothing changes any more
        quiet = scope.now - _changed(folder)
        whole = [r for r in whole if (r.reproduction_of or "").startswith(repeats)]
        if quiet >= _REPEAT_SECONDS:
            return "a repeat was interrupted long ago; it can start again"
        busy = quiet < _QUIET_SECONDS
    else:
        busy = scope.is_trained_now(key)
    # A training without a claim (runtime.mlflow: false) still locks its folder.
    if not whole or busy or holder_of(folder) is not None:
        return None
    return f"run {whole[0].run.run_id[:8]} of its key is finished"


def _claims(scope: Scope, going: set[str]) -> Iterator[Item]:
    """Generations that a newer one has replaced and that are needed for nothing."""
    claims = scope.claims.all() if scope.is_local else []
    last = {claim.key: claim.generation for claim in claims}
    running = {record.run.run_id for record in scope.records if record.run.status == "RUNNING"}
    for claim in claims:
        state = state_now(claim)
        if claim.generation == last[claim.key] or state in ("running", "silent"):
            continue
        if claim.run_id in running - going:
            continue  # only this claim shows that the run is dead
        name = f"{short_key(claim.key)}.g{claim.generation}"
        why = f"{state}; generation {last[claim.key]} has replaced it"
        remove = partial(scope.claims.remove, claim)
        yield Item("claim", name, why, 0, scope.age(claim.since_ms), remove)


def _item(scope: Scope, kind: Kind, path: Path, name: str, why: str) -> Item:
    """A file or folder that may be deleted."""
    remove = partial(remove_worktree, scope.root) if kind == "worktree" else remove_path
    age = scope.age(_changed(path) * 1000)
    return Item(kind, name, why, size_of(path), age, partial(remove, path))


def remove_path(path: Path) -> None:
    """Delete a file, or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onexc=_raise_with_path)
    else:
        path.unlink(missing_ok=True)


def _raise_with_path(_: object, path: str, error: BaseException) -> None:
    """Raise an error of rmtree, which names only the last part of the path."""
    if isinstance(error, OSError):
        raise OSError(error.errno, error.strerror, path) from None
    raise error


def _worktrees(scope: Scope) -> Iterator[Item]:
    """The worktrees of `runkey reproduce` and `runkey trial` that no process uses."""
    for path in sorted(chain(*(scope.home.glob(f"{one}/*/") for one in ("reproduce", "trials")))):
        quiet = (path / LOCK).is_file() or scope.now - _changed(path) >= _QUIET_SECONDS
        # A stage runs on for a while after the command itself, which locks it, was killed.
        if path.is_symlink() or not quiet or holder_of(path) is not None or has_processes(path):
            continue
        yield _item(
            scope, "worktree", path, f"{path.parent.name}/{path.name}", "no process works in it"
        )


def _environments(scope: Scope) -> Iterator[Item]:
    """What `runkey trial` installed for commits with another lock and no process uses.

    The lock's time is that of the last trial, see `runkey.sweep.trial.python_of`.
    """
    for path in sorted(scope.home.glob("environments/*/")):
        lock = path / LOCK
        used = lock.stat().st_mtime if lock.is_file() else _changed(path)
        if path.is_symlink() or scope.now - used < _QUIET_SECONDS or has_processes(path):
            continue
        remove, name = partial(remove_path, path), f"environments/{path.name}"
        why = "no process uses it; a trial installs it again"
        yield Item("environment", name, why, size_of(path), scope.age(used * 1000), remove)


def _leftovers(scope: Scope) -> Iterator[Item]:
    """Files that were being written when their process died."""
    places = [
        *scope.home.glob("runs/.*"),
        *scope.home.glob("claims/.*"),
        *scope.home.glob(".*-*"),  # of publish, fetch, export and import
        *scope.home.glob(f"{initial_weights.COPIES}/*/.runkey-*"),
        *scope.home.glob(f"{models.COPIES}/*/.runkey-*"),
        # Of downloads, and of MLflow's database, which need not be in the checkout.
        *scope.root.glob(".runkey-*"),
        *scope.home.parent.glob(".runkey-*"),
        *scope.root.glob(".run.json.[0-9]*"),
    ]
    decoded = scope.home / paths.DECODED
    for folder in (scope.root, scope.home, decoded, *map(scope.root.joinpath, _OUTPUTS)):
        places += [path for path in folder.glob(".*-*") if _TEMPORARY.fullmatch(path.name)]
    for path in sorted(set(places)):
        named = _TEMPORARY.fullmatch(path.name)
        least = _HALF_WRITTEN_SECONDS
        if named and not psutil.pid_exists(int(named[1])):
            least = _QUIET_SECONDS  # the process may be one of another machine
        elif (path / LOCK).is_file() and holder_of(path) is None:
            least = 0.0
        if scope.now - _changed(path) >= least:
            why = "half written, by a process that is gone"
            yield _item(scope, "leftover", path, str(path), why)


def _initial_weights(scope: Scope) -> Iterator[Item]:
    """Copies of weights that trainings began with, or that were loaded to be used.

    They are listed if the run that they are of still has them.
    """
    folders = (initial_weights.COPIES, models.COPIES)
    for path in sorted(one for folder in folders for one in scope.home.glob(f"{folder}/*/")):
        sources = (r for r in scope.records if _has_weights(scope.library, r, path.name))
        source = next(sources, None)
        if source and not path.is_symlink() and scope.now - _changed(path) >= _QUIET_SECONDS:
            why = f"a copy; {source.label} has them"
            yield _item(scope, "weights", path, f"{path.parent.name}/{path.name}", why)


def _decoded_images(scope: Scope) -> Iterator[Item]:
    """What loaders decoded, see `runkey.data.cache`; the time of a file is that of its last use."""
    for path in sorted(scope.home.glob(f"{paths.DECODED}/*.npy")):
        if scope.now - _changed(path) >= _QUIET_SECONDS:
            name, why = f"{paths.DECODED}/{path.name}", "a loader makes them again"
            yield _item(scope, "images", path, name, why)


def _has_weights(library: Library, record: Record, digest: str) -> bool:
    if record.run.status != "FINISHED" or record.details is None:
        return False
    for path in (f"{paths.MODEL}/{name}" for name in (WEIGHTS, OLD_WEIGHTS)):
        stored = record.details.files.get(path)
        if stored and stored.sha256.startswith(digest):
            with suppress(RegistryError, OSError), library.open_file(record, path) as file:
                return file.seek(0, os.SEEK_END) == stored.size
    return False


def has_processes(path: Path) -> bool:
    """Return True if a process of this machine was started from, or works in, a folder."""
    top = path.resolve()
    return any(
        place and Path(place).is_relative_to(top)
        for process in psutil.process_iter(["cwd", "cmdline"])
        for place in (process.info["cwd"], *(process.info["cmdline"] or ())[:1])
    )


def _changed(path: Path) -> float:
    """Time of the last change of a file, or of anything in a folder, in seconds since 1970."""
    return max((status.st_mtime for status in _walk(path)), default=0.0)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder, without hard-linked ones."""
    return sum(status.st_size for status in _walk(path) if status.st_nlink < 2)


def _walk(path: Path) -> Iterator[os.stat_result]:
    """The status of a file, or of a folder and everything in it; links are not followed."""
    places = [path]
    if not path.is_symlink():
        places += [Path(top, name) for top, *names in os.walk(path) for name in chain(*names)]
    for place in places:
        with suppress(FileNotFoundError):  # deleted meanwhile
            yield place.lstat()
