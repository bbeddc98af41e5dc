"""One trial: train a snapshot with some parameters changed, in a worktree of its own.

    runkey trial COMMIT -S lr=3e-4

It may be started anywhere and any number of times: a finished key is found, one that another
process trains is waited for, and an interrupted one goes on from its checkpoint. What ends with a
`StoppedError` (exit code 75) may work on another machine or later; any other error would come back.
"""

from __future__ import annotations

import fcntl
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ruamel.yaml import YAML

from runkey.errors import RegistryError, RunkeyError, StoppedError
from runkey.files import copy_atomically, read_text, write_atomically
from runkey.hashing import sha256_file
from runkey.identity.dvc_yaml import read_yaml_text
from runkey.identity.key import make_recipe, short_key
from runkey.identity.record import Record
from runkey.params import Params, load_params
from runkey.params.load import set_values
from runkey.paths import LOCK, PARAMS, REQUIREMENTS
from runkey.registry.checkout import clean_environment, fetch_data, run_dvc, share_cache
from runkey.registry.claims import newest, open_claims, state_now
from runkey.registry.dvc_cache import DvcCache
from runkey.registry.gc import has_processes
from runkey.registry.library import Library
from runkey.registry.once import wait_for_other
from runkey.registry.rest import RestClient, UnreachedError
from runkey.registry.share import Checkout, Team, publish
from runkey.registry.snapshot import (
    REFS,
    add_worktree,
    checked_out,
    git,
    has_commit,
    remove_worktree,
)
from runkey.tracking.store import Store
from runkey.training.lock import holder_of, locked
from runkey.units import format_bytes

logger = logging.getLogger(__name__)

AP = "eval/AP"
"""The metric of a run that was trained and evaluated."""
SNAPSHOTS = f"{REFS}/sweeps"
"""Refs by which a sweep sends its snapshot to other machines."""
_SPARE_BYTES = 1_000_000_000
"""For weights, checkpoints and logs, beside the data."""
_POLL_SECONDS = 1.0
_VARIABLES = {"RUNKEY_SUMMARY": "no"}


@dataclass(frozen=True)
class Place:
    """Where a trial runs."""

    store: Store
    here: Checkout
    """The main checkout, whose files nothing changes."""
    team: Team | None
    """Where the run is published; None: nowhere."""

    @property
    def root(self) -> Path:
        """Of the main checkout."""
        return self.here.root

    @property
    def library(self) -> Library:
        """The runs of the store."""
        return self.here.library

    def folder(self, key: str) -> Path:
        """Return the folder of a trial, which goes when it has succeeded."""
        return self.store.home / "trials" / key


def finished(library: Library, key: str) -> Record | None:
    """Return the run of a key that is trained, evaluated and recorded whole."""
    found = [r for r in library.matching(key) if r.run.status == "FINISHED" and AP in r.run.metrics]
    found = [r for r in found if not r.reproduction_of]
    return next((r for r in map(library.with_details, found) if r.is_whole), None)


def run_trial(
    place: Place, commit: str, changes: Mapping[str, Any], output: TextIO, *, wait: bool = True
) -> Record:
    """Return the finished run of a snapshot with these values, trained here if need be.

    Args:
        place: where.
        commit: the snapshot; it is fetched from `origin` if it is not here.
        changes: values by dotted name.
        output: for what the pipeline prints.
        wait: wait while another process trains the key.

    Raises:
        StoppedError: not here or not now: the key is trained elsewhere and `wait` is False, the
            server or a remote does not answer, the disk is too small, or memory does not suffice.
        RunkeyError: it would fail anywhere: wrong parameters or data, a server that refuses.
    """
    try:
        oid = find_commit(place.root, commit)
        key, params = key_of(place.root, oid, changes)
        folder = place.folder(key)
        logger.info(f"key {short_key(key)}: snapshot {oid[:12]}")
        if not params.runtime.mlflow:
            raise RegistryError("runtime.mlflow: a trial has to be recorded; set it to true")
        if not (record := finished(place.library, key)):
            check_places(place, params)
            claims = open_claims(place.store.uri, place.store.home)
            wait_for_other(place.library, claims, key, wait=wait)
            with _held(folder, wait=wait):
                record = finished(place.library, key)
                record = record or _train(place, key, changes, oid, folder, output)
        _publish(place, record)
    except UnreachedError as error:
        raise StoppedError(str(error)) from None
    return record


def find_commit(root: Path, commit: str) -> str:
    """Return the id of a commit that a user or a sweep names, which is fetched if need be."""
    for fetched in (False, True):
        if fetched:
            # A sweep's ref, else a branch, a tag or, where the remote allows it, any commit.
            options = ("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "origin")
            for source in (f"{SNAPSHOTS}/{commit}:{SNAPSHOTS}/{commit}", commit):
                with suppress(RegistryError):
                    git(root, *options, source)
                    break
        with suppress(RegistryError):
            oid = git(root, "rev-parse", "--quiet", "--verify", f"{commit}^{{commit}}")
            if has_commit(root, oid):
                return oid
    try:
        git(root, "ls-remote", "--quiet", "--exit-code", "origin", "HEAD")
    except RegistryError as error:
        raise StoppedError(f"commit {commit}: not here, and not to be fetched ({error})") from None
    raise RegistryError(f"commit {commit}: neither here nor at the git remote origin; push it")


def push_commit(place: Place, commit: str) -> None:
    """Send a snapshot to `origin`, where trials in other clones fetch it."""
    git(place.root, "push", "--quiet", "--no-verify", "origin", f"{commit}:{SNAPSHOTS}/{commit}")


def key_of(root: Path, oid: str, changes: Mapping[str, Any]) -> tuple[str, Params]:
    """Return the key of a commit with changed values, and parameters that say where it runs.

    A commit of another version of runkey has other defaults, so its own code makes its key; the
    parameters are then those of the checkout `root`.
    """
    listed = git(root, "ls-tree", "-r", "-z", "--name-only", "--full-tree", oid).split("\0")
    with checked_out(root, oid, filter(None, listed)) as tree:
        share_cache(root, tree)
        set_params(tree, changes)
        if _is_this_version(tree):
            params = load_params(tree / PARAMS)
            return make_recipe("train", tree, params, root).key, params
        done = subprocess.run(
            [sys.executable, "-m", "runkey", "key"],
            cwd=tree,
            env=clean_environment(root, {}),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = (done.stderr.strip() or "no message").splitlines()[-1]
            raise RunkeyError(f"commit {oid[:12]}: {said.removeprefix('error: ')}")
        return done.stdout.strip(), load_params(root / PARAMS)


def set_params(root: Path, changes: Mapping[str, Any]) -> None:
    """Change values in a workspace's params.yaml, and nothing else in it."""
    yaml, file, text = YAML(), root / PARAMS, io.StringIO()
    tree = yaml.load(read_text(file))
    set_values(tree, changes)
    yaml.dump(tree, text)
    write_atomically(file, text.getvalue())


def _is_this_version(tree: Path) -> bool:
    """Return True if a tree's code of parameters and keys is the one that runs here."""
    here = Path(__file__).parents[1]
    files = [f for room in ("params", "identity") for f in (here / room).glob("*.py")]
    others = [tree / "runkey" / file.relative_to(here) for file in files]
    return all(
        other.is_file() and other.read_bytes() == file.read_bytes()
        for file, other in zip(files, others, strict=True)
    )


# Refused before anything is trained.


def check_places(place: Place, params: Params) -> None:
    """Raise unless the server lets this process write, the remotes answer, and the disk has room.

    StoppedError if that may be otherwise on another machine or later.
    """
    if place.store.is_server:
        RestClient(place.store.uri).check_writes(params.runtime.experiment)
    if place.team:
        try:
            git(place.root, "ls-remote", "--quiet", place.team.git, "HEAD")
        except RegistryError as error:
            raise StoppedError(f"{error}; the run could not be published") from None
    home = place.store.home
    home.mkdir(parents=True, exist_ok=True)
    needed, free = _data_bytes(place.root) + _SPARE_BYTES, shutil.disk_usage(home).free
    if free < needed:
        raise StoppedError(
            f"{home}: {format_bytes(free)} are free, and a trial takes {format_bytes(needed)}; make"
            " room, or name another store by MLFLOW_TRACKING_URI"
        )


def _data_bytes(root: Path) -> int:
    """Return the size of the data that .dvc files of the checkout track and DVC's cache lacks."""
    cache = DvcCache(root)
    outs = [
        out
        for file in root.glob("*.dvc")
        if file.is_file()
        for out in (read_yaml_text(file) or {}).get("outs", ())
    ]
    missing = (out for out in outs if not cache.object_path(str(out["md5"])).exists())
    return sum(int(out.get("size", 0)) for out in missing)


# Training.


@contextmanager
def _held(folder: Path, *, wait: bool) -> Iterator[None]:
    """Keep other trials of this machine out of the folder."""
    while (holder := holder_of(folder)) is not None:
        if not wait:
            raise StoppedError(f"{folder}: process {holder} works in it")
        time.sleep(_POLL_SECONDS)
    with locked(folder):
        yield


def _train(
    place: Place, key: str, changes: Mapping[str, Any], oid: str, folder: Path, output: TextIO
) -> Record:
    """Run the pipeline in the trial's worktree, remove that, and return the run."""
    top = folder / "tree"
    root, done = _worktree(place.root, oid, top, folder / "checked-out"), None
    set_params(root, changes)
    share_cache(place.root, root, links=True)
    env = clean_environment(place.root, _VARIABLES, python_of(place.root, root, place.store.home))
    with _Relay(output) as relay:
        try:
            try:
                fetch_data(root, env, relay.file)
            except RegistryError as error:
                raise StoppedError(f"{error}; the data are not to be had here") from None
            run_dvc(["repro"], root, env, relay.file)
        except RegistryError as error:
            done = error
    if done:
        _raise(place, key, relay, done, top)
    record = finished(place.library, key)
    if record is None:
        raise RegistryError(
            f"{short_key(key)}: dvc repro went through in {top}, and no finished run is in"
            f" {place.library.place}"
        )
    with suppress(OSError):
        remove_worktree(place.root, top)
        shutil.rmtree(folder)
    return record


def _worktree(main: Path, oid: str, top: Path, mark: Path) -> Path:
    """Return the workspace of a worktree at `top`, made anew unless it was checked out whole."""
    if mark.exists() and read_text(mark) == oid:
        logger.info(f"goes on in {top}, where it was interrupted")
        while has_processes(top):  # a stage outlives a trial that was killed
            time.sleep(_POLL_SECONDS)
        return top / git(main, "rev-parse", "--show-prefix")
    mark.unlink(missing_ok=True)
    if top.exists():
        remove_worktree(main, top)
    root = add_worktree(main, oid, top, "`git fetch` brings it")
    write_atomically(mark, oid)
    return root


def _raise(place: Place, key: str, relay: _Relay, error: RegistryError, top: Path) -> None:
    """Raise what ended the pipeline, as an error that says whether another try may help."""
    text = f"{relay.error or error}; its worktree is left in {top}"
    claim = newest(open_claims(place.store.uri, place.store.home), key)
    is_elsewhere = claim and claim.state == "running" and state_now(claim) != "dead"
    # A signal ended the stage: somebody stopped it, or memory ran out.
    if is_elsewhere or relay.code == StoppedError.exit_code or not 0 <= relay.code < 128:
        raise StoppedError(text)
    raise RunkeyError(text)


class _Relay:
    """Passes on what the pipeline prints, and keeps the stage's error and exit code."""

    _EXITED = re.compile(r"exited with (-?\d+)")

    def __init__(self, output: TextIO) -> None:
        self.code, self.error = 1, ""
        self._output = output
        reading, self.file = os.pipe()
        self._source = os.fdopen(reading, encoding="utf-8", errors="replace")
        self._thread = threading.Thread(target=self._pass_on, name="relay", daemon=True)

    def __enter__(self) -> _Relay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)
        self._thread.join(5)  # a process that outlives its stage may keep the pipe open

    def _pass_on(self) -> None:
        for line in self._source:
            with suppress(OSError, ValueError):  # the reader has gone
                self._output.write(line)
                self._output.flush()
            if line.startswith("error: "):
                self.error = line.removeprefix("error: ").strip()
            if found := self._EXITED.search(line):
                self.code = int(found[1])


def python_of(main: Path, root: Path, home: Path) -> str:
    """Return the Python of a worktree's lock: this one if the checkout has the same lock.

    Else an environment that all commits with these requirements share.
    """
    lists = (LOCK, REQUIREMENTS)
    if all((main / one).read_bytes() == (root / one).read_bytes() for one in lists):
        return sys.executable
    folder = home / "environments" / sha256_file(root / REQUIREMENTS)[:12]
    (folder / "environment").mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for one in (*lists, "environment/setup.sh"):
            copy_atomically(root / one, folder / one)
        command = ["sh", "environment/setup.sh", "packages", REQUIREMENTS.name]
        if subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, check=False).returncode:
            raise StoppedError(f"{folder}: the environment of the commit's lock cannot be set up")
    return str(folder / "packages/bin/python")


def _publish(place: Place, record: Record) -> None:
    """Publish a finished run to the team; StoppedError if that fails, since the run is kept."""
    details = record.details
    if not (place.team and details):
        return
    is_here = details.snapshot is None or has_commit(place.root, details.snapshot)
    if not (is_here and DvcCache(place.root).entry_of(details.pointer_md5 or "")):
        logger.info(f"{record.label}: published by {details.host}, where it was trained")
        return
    try:
        done = publish(record, place.here, place.team)
    except RegistryError as error:
        raise StoppedError(f"{record.label}: trained, and not published: {error}") from None
    logger.info(f"{record.label}: published ({done.state})")
