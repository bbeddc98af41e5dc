"""A run handed on: to the team's remotes and server, and from them.

    publish   objects and entries to the DVC remote, snapshot to the git remote, MLflow run last
    fetch     the other way round: everything is checked in a folder apart, MLflow run last

So whoever finds the run finds all of it, and an interruption leaves at most what nobody points at.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Literal

from runkey.errors import RegistryError
from runkey.identity.record import Record
from runkey.progress import QUIET, Steps, each
from runkey.registry.archive import Index, pack, unpack
from runkey.registry.dvc_cache import DvcCache
from runkey.registry.library import Library
from runkey.registry.package import (
    BUNDLE,
    OBJECTS,
    RUN,
    Package,
    Runs,
    check,
    collect_dvc,
    known,
    object_path,
    origin_of,
    read_run,
    staging,
    whole,
)
from runkey.registry.share_dvc import (
    FILE,
    DvcPart,
    DvcRemote,
    check_objects,
    check_outputs,
    install,
    lacking,
)
from runkey.registry.share_snapshot import (
    bundle_snapshot,
    check_remote,
    fetch_snapshot,
    push_snapshot,
    ref_of,
    unbundle_snapshot,
)
from runkey.registry.snapshot import has_git

# A run as a file, for machines that never meet: `export` and `import`.


CARRY_PARTS = 3
"""Of what export and import do: the run, the objects, the file; or the other way round."""


@dataclass(frozen=True)
class Carried:
    """What an archive held, or holds."""

    key: str
    run_id: str
    """In this machine's store."""
    files: int
    size: int
    """Bytes, unpacked."""
    is_new: bool = True
    """Whether the run was not there before."""


def export_run(
    record: Record,
    root: Path,
    home: Path,
    runs: Runs,
    target: Path,
    *,
    with_data: bool = False,
    steps: Steps = QUIET,
) -> Carried:
    """Write a run to an archive.

    Args:
        record: a run of this machine's store.
        root: this checkout.
        home: `Store.home`.
        runs: MLflow's part of the store.
        target: file to write; replaced if it is there.
        with_data: the raw data too.
        steps: told which of the `PARTS` it is at.

    Raises:
        RegistryError: the run is not whole, something of it is missing, or the file cannot be
            written.
        TrackingError: MLflow refuses.
    """
    details = whole(record)
    cache = DvcCache(root)
    part = collect_dvc(record, cache, with_data=with_data)
    with staging(home, "export") as folder:
        steps.advance(0, "run from MLflow")
        read_run(runs, record, folder)
        check(folder, record.key, record.label)
        steps.advance(1, "objects of DVC")
        (folder / FILE).write_text(part.as_json(), encoding="utf-8")
        for md5 in each("copy objects", list(part.objects), "objects"):
            place = object_path(folder, md5)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(cache.object_path(md5), place)
        check_objects(part, lambda md5: object_path(folder, md5))
        if details.snapshot:
            bundle_snapshot(root, record.key, details.snapshot, (folder / BUNDLE).resolve())
        steps.advance(1, target.name)
        index = pack(folder, record.key, target)
    return Carried(record.key, record.run.run_id, len(index.members), index.size)


def import_run(
    file: Path, root: Path, home: Path, runs: Runs, local: Library, *, steps: Steps = QUIET
) -> Carried:
    """Take a run from an archive, which may come from anybody.

    Everything is unpacked and checked in a folder apart; then objects, entries, the snapshot and,
    last, the MLflow run are put in place.

    Args:
        file: the archive.
        root: this checkout.
        home: `Store.home`.
        runs: MLflow's part of this machine's store.
        local: this machine's runs.
        steps: told which of the `PARTS` it is at.

    Raises:
        RegistryError: it is damaged, incomplete, or made to do harm; the text names what.
        TrackingError: MLflow refuses.
    """
    with staging(home, "import") as folder:
        steps.advance(0, file.name)
        index = unpack(file, folder)
        steps.advance(1, "check it")
        package = check(folder, index.key, file.name)
        part = _dvc_part(folder, index, file.name)
        check_objects(part, package.object_path)
        check_outputs(part, package.object_path, package.details)
        steps.advance(1, "put in place")
        _take_snapshot(root, folder, package, file.name)
        install(part, package.object_path, DvcCache(root))
        here = known(local, package.key, package.origin)
        run_id = here.run.run_id if here else runs.write(package.run).run_id
    return Carried(index.key, run_id, len(index.members), index.size, here is None)


def _dvc_part(folder: Path, index: Index, where: str) -> DvcPart:
    """DVC's part, if the archive holds a run, its objects and nothing else."""
    try:
        text = (folder / FILE).read_bytes()
    except FileNotFoundError:
        raise RegistryError(f"{where}: {FILE}: not there") from None
    part = DvcPart.from_json(text, f"{where}: {FILE}")
    expected = {object_path(Path(), md5).as_posix() for md5 in part.objects} | {FILE, BUNDLE}
    for name in index.members:
        if name not in expected and not name.startswith(f"{RUN}/"):
            raise RegistryError(f"{where}: {name!r} belongs to no run; refused")
    return part


def _take_snapshot(root: Path, folder: Path, package: Package, where: str) -> None:
    """The snapshot into the repository; objects that no ref names are all that a failure leaves."""
    oid, bundle = package.details.snapshot, folder / BUNDLE
    if oid is None:
        return
    if not bundle.is_file():
        raise RegistryError(f"{where}: {BUNDLE}: not there, and the run has a snapshot")
    if not has_git(root):
        raise RegistryError(f"{root}: not a git repository; the snapshot has nowhere to go")
    unbundle_snapshot(root, bundle.resolve(), package.key, oid, (folder / "git").resolve())


_LARGEST_LIST = 256 << 20
"""Bytes of dvc.json."""

PARTS = 3
"""DVC's objects, the snapshot, the MLflow run."""

State = Literal["new", "already there", "published from elsewhere"]


@dataclass(frozen=True)
class Places:
    """Where a run is handed to, or had from."""

    root: Path
    """This checkout."""
    home: Path
    """`Store.home`; folders for what is under way are made in it."""
    dvc: DvcRemote
    git: str
    """Name of the git remote."""
    server: Library
    """The team's."""
    own: bool
    """Whether this machine records its runs on that server anyway."""


@dataclass(frozen=True)
class Handed:
    """What was done."""

    key: str
    run_id: str
    """Of the run where it was handed to."""
    state: State
    """Of the MLflow run there."""
    server: str
    dvc: str = ""
    """Address of the DVC remote."""
    objects: int = 0
    """DVC objects of the run."""
    new_objects: int = 0
    """Those that were not there before."""
    size: int = 0
    """Bytes of all of them."""
    entries: int = 0
    ref: str | None = None
    """The snapshot's, None for a run that was trained outside git."""
    new_ref: bool = False


def publish(
    record: Record,
    places: Places,
    mine: Runs,
    theirs: Runs,
    *,
    with_data: bool = False,
    steps: Steps = QUIET,
) -> Handed:
    """Hand a run to the team.  Nothing is sent before all three places have answered.

    Args:
        record: a run of this machine's store.
        places: where to.
        mine: MLflow's part of this machine's store.
        theirs: of the server.
        with_data: the raw data too.
        steps: told which of the `PARTS` it is at.

    Raises:
        RegistryError: the run is not whole, something of it is missing here, or one of the three
            places is not set or cannot be reached.
        TrackingError: MLflow refuses.
    """
    details = whole(record)
    part = collect_dvc(record, DvcCache(places.root), with_data=with_data)
    address = places.dvc.check()
    if details.snapshot:
        check_remote(places.root, places.git)
    there = _finished(record, places.server)
    done = Handed(record.key, "", "new", places.server.place, address, len(part.objects))
    done = replace(done, size=part.size, entries=len(part.entries))
    if there and origin_of(there) != origin_of(record) and not record.reproduction_of:
        return replace(done, run_id=there.run.run_id, state="published from elsewhere")
    steps.advance(0, f"{len(part.objects)} objects to DVC")
    new, _ = places.dvc.push(part.objects, part.entries)
    steps.advance(1, "snapshot to git")
    done = replace(done, new_objects=new)
    if details.snapshot:
        fresh = push_snapshot(places.root, places.git, record.key, details.snapshot)
        done = replace(done, ref=ref_of(record.key, details.snapshot), new_ref=fresh)
    steps.advance(1, "run to MLflow")
    if there and _has_list(there, places.server):
        return replace(done, run_id=there.run.run_id, state="already there")
    with staging(places.home, "publish") as folder:
        (folder / FILE).write_text(part.as_json(), encoding="utf-8")
        if there:  # it was recorded on the server in the first place
            theirs.add(there.run.run_id, folder / FILE)
            return replace(done, run_id=there.run.run_id)
        artifacts = read_run(mine, record, folder)
        (folder / FILE).replace(artifacts / FILE)
        check(folder, record.key, record.label)
        return replace(done, run_id=theirs.write(folder / RUN).run_id)


def fetch(
    record: Record,
    places: Places,
    local: Library,
    mine: Runs,
    theirs: Runs,
    *,
    steps: Steps = QUIET,
) -> Handed:
    """Get a run from the team, so that `dvc repro` restores it.

    Args:
        record: a run of the team's server.
        places: where from.
        local: this machine's runs.
        mine: MLflow's part of this machine's store.
        theirs: of the server.
        steps: told which of the `PARTS` it is at.

    Raises:
        RegistryError: the run is not whole or was not published, or something of it is missing,
            damaged, or could do harm; the text names it.
        TrackingError: MLflow refuses.
    """
    details = whole(record)
    part = _list_of(record, places.server)
    cache = DvcCache(places.root)
    wanted = {md5: part.objects[md5] for md5 in lacking(part, cache)}
    steps.advance(0, "run from MLflow")
    with staging(places.home, "fetch") as folder:
        read_run(theirs, record, folder)
        package = check(folder, record.key, f"{record.label} of {places.server.place}")
        steps.advance(1, f"{len(wanted)} objects from DVC")
        if wanted:
            places.dvc.pull(wanted, folder / OBJECTS)

        def place(md5: str) -> Path:
            return object_path(folder, md5) if md5 in wanted else cache.object_path(md5)

        check_objects(part, place)
        check_outputs(part, place, package.details)
        steps.advance(1, "snapshot from git")
        if details.snapshot:
            fetch_snapshot(places.root, places.git, record.key, details.snapshot)
        install(part, place, cache)
        here = record if places.own else known(local, record.key, package.origin)
        run_id = here.run.run_id if here else mine.write(package.run).run_id
    return Handed(
        record.key,
        run_id,
        "already there" if here else "new",
        places.server.place,
        objects=len(part.objects),
        new_objects=len(wanted),
        size=part.size,
        entries=len(part.entries),
        ref=ref_of(record.key, details.snapshot) if details.snapshot else None,
    )


def _finished(record: Record, server: Library) -> Record | None:
    """The server's run of the key: this one or a copy of it, else the oldest that is finished."""
    found = [one for one in server.matching(record.key) if one.run.status == "FINISHED"]
    same = [one for one in found if origin_of(one) == origin_of(record)]
    others = [one for one in found if not one.reproduction_of]
    return next(iter(same or others), None)


def _has_list(record: Record, server: Library) -> bool:
    try:
        with server.open_file(record, FILE):
            return True
    except RegistryError:
        return False


def _list_of(record: Record, server: Library) -> DvcPart:
    """What the publisher said of DVC's part."""
    where = f"{record.label}: {FILE} of run {record.run.run_id}"
    try:
        with server.open_file(record, FILE) as file:
            content = file.read(_LARGEST_LIST + 1)
    except RegistryError:
        host = record.details.host if record.details else "where it was trained"
        raise RegistryError(
            f"{record.label}: is on {server.place}, but was not published; run"
            f" `runkey publish {record.label}` on {host}"
        ) from None
    except (OSError, HTTPException) as error:
        raise RegistryError(f"{server.place}: the connection broke ({error})") from None
    if len(content) > _LARGEST_LIST:
        raise RegistryError(f"{where}: larger than 256 MiB; refused")
    return DvcPart.from_json(content, where)
