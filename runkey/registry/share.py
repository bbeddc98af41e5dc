"""Hand a run to the team or to another machine, and take one in.

    publish   objects and entries to the DVC remote, snapshot to the git remote, MLflow run last
    fetch     the other way round: everything is checked in a temporary folder, MLflow run last
    export    everything to one file, for machines that never meet
    import    from such a file, which may come from anybody

The MLflow run comes last, so that whoever finds the run finds all of it, and an interruption
leaves only objects that nothing refers to.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Literal, Protocol

from runkey.errors import RegistryError
from runkey.identity.record import ORIGIN, Details, Record
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
    object_path,
    read_run,
    staging,
)
from runkey.registry.share_dvc import FILE, DvcPart, collect
from runkey.registry.snapshot import (
    bundle_snapshot,
    check_remote,
    fetch_snapshot,
    has_git,
    push_snapshot,
    ref_of,
    unbundle_snapshot,
)
from runkey.units import MIB

PARTS = 3
"""Parts of each of the four commands, for `steps`."""
_LARGEST_LIST = 256 * MIB
"""Bytes of dvc.json."""


class Remote(Protocol):
    """A DVC remote; `runkey.dvc_transfer.DvcRemote` implements it with DVC."""

    def check(self) -> str:
        """Return its address; raise RegistryError if nobody else can read it."""

    def push(self, objects: Mapping[str, int], entries: Iterable[str]) -> int:
        """Copy objects and entries there; return the number of new objects."""

    def pull(self, objects: Mapping[str, int], folder: Path) -> None:
        """Copy objects from there to `<folder>/<2 digits>/<the rest>`."""


# export and import


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
    """True if the run was not there before."""


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
        runs: the store's MLflow runs.
        target: file to write; replaced if it is there.
        with_data: also write the raw data.
        steps: progress over `PARTS`.

    Raises:
        RegistryError: the run is not whole, something of it is missing, or the file cannot be
            written.
        TrackingError: MLflow refuses.
    """
    details = _whole(record)
    cache = DvcCache(root)
    part = _collect(record, details, cache, with_data=with_data)
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
        part.check_objects(lambda md5: object_path(folder, md5))
        if details.snapshot:
            bundle_snapshot(root, record.key, details.snapshot, (folder / BUNDLE).resolve())
        steps.advance(1, target.name)
        index = pack(folder, record.key, target)
    return Carried(record.key, record.run.run_id, len(index.members), index.size)


def import_run(
    file: Path, root: Path, home: Path, runs: Runs, local: Library, *, steps: Steps = QUIET
) -> Carried:
    """Take a run from an archive, which may come from anybody.

    Everything is unpacked and checked in a temporary folder. Then objects, entries, the snapshot
    and, last, the MLflow run are put in place.

    Args:
        file: the archive.
        root: this checkout.
        home: `Store.home`.
        runs: the store's MLflow runs.
        local: this machine's runs.
        steps: progress over `PARTS`.

    Raises:
        RegistryError: it is damaged, incomplete, or made to do harm; the text names what.
        TrackingError: MLflow refuses.
    """
    with staging(home, "import") as folder:
        steps.advance(0, file.name)
        index = unpack(file, folder)
        steps.advance(1, "check it")
        package = check(folder, index.key, file.name)
        part = _packed_part(folder, index, file.name)
        part.check_objects(package.object_path)
        part.check_outputs(package.object_path, package.details)
        steps.advance(1, "put in place")
        _take_snapshot(root, package, file.name)
        part.install(package.object_path, DvcCache(root))
        here = _known(local, package)
        run_id = here.run.run_id if here else runs.write(package.run).run_id
    return Carried(index.key, run_id, len(index.members), index.size, here is None)


def _packed_part(folder: Path, index: Index, where: str) -> DvcPart:
    """The DVC part of an archive that holds a run, its objects and nothing else."""
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


def _take_snapshot(root: Path, package: Package, where: str) -> None:
    """Put the snapshot into the repository; a failure leaves only objects that no ref names."""
    oid, bundle = package.details.snapshot, package.folder / BUNDLE
    if oid is None:
        return
    if not bundle.is_file():
        raise RegistryError(f"{where}: {BUNDLE}: not there, and the run has a snapshot")
    if not has_git(root):
        raise RegistryError(f"{root}: not a git repository; the snapshot has nowhere to go")
    unbundle_snapshot(root, bundle.resolve(), package.key, oid, (package.folder / "git").resolve())


# publish and fetch


State = Literal["new", "already there", "published from elsewhere"]


@dataclass(frozen=True)
class Places:
    """This checkout and the team's three places."""

    root: Path
    """This checkout."""
    home: Path
    """`Store.home`; temporary folders are made in it."""
    dvc: Remote
    git: str
    """Name of the git remote."""
    server: Library
    """Runs of the team's server."""
    own: bool
    """True if this machine records its runs on that server anyway."""


@dataclass(frozen=True)
class Handed:
    """What was published or fetched."""

    key: str
    run_id: str
    """MLflow id where the run was handed to."""
    state: State
    """Of the MLflow run there."""
    server: str
    dvc: str = ""
    """Address of the DVC remote."""
    objects: int = 0
    """DVC objects of the run."""
    new_objects: int = 0
    """Objects that were not there before."""
    size: int = 0
    """Bytes of all objects."""
    entries: int = 0
    ref: str | None = None
    """The snapshot's; None for a run that was trained outside git."""
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
    """Hand a run to the team. Nothing is sent before all three places have answered.

    Args:
        record: a run of this machine's store.
        places: the team's.
        mine: MLflow runs of this machine's store.
        theirs: MLflow runs of the server.
        with_data: also send the raw data.
        steps: progress over `PARTS`.

    Raises:
        RegistryError: the run is not whole, something of it is missing here, or one of the three
            places is not set or cannot be reached.
        TrackingError: MLflow refuses.
    """
    details = _whole(record)
    part = _collect(record, details, DvcCache(places.root), with_data=with_data)
    done = Handed(
        record.key,
        "",
        "new",
        places.server.place,
        dvc=places.dvc.check(),
        objects=len(part.objects),
        size=part.size,
        entries=len(part.entries),
    )
    if details.snapshot:
        check_remote(places.root, places.git)
    there = _finished(record, places.server)
    if there and _origin(there) != _origin(record) and not record.reproduction_of:
        return replace(done, run_id=there.run.run_id, state="published from elsewhere")
    steps.advance(0, f"{len(part.objects)} objects to DVC")
    done = replace(done, new_objects=places.dvc.push(part.objects, part.entries))
    steps.advance(1, "snapshot to git")
    if details.snapshot:
        is_new = push_snapshot(places.root, places.git, record.key, details.snapshot)
        done = replace(done, ref=ref_of(record.key, details.snapshot), new_ref=is_new)
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
        places: the team's.
        local: this machine's runs.
        mine: MLflow runs of this machine's store.
        theirs: MLflow runs of the server.
        steps: progress over `PARTS`.

    Raises:
        RegistryError: the run is not whole or was not published, or something of it is missing,
            damaged, or could do harm; the text names it.
        TrackingError: MLflow refuses.
    """
    details = _whole(record)
    part = _published_part(record, places.server)
    cache = DvcCache(places.root)
    wanted = {md5: part.objects[md5] for md5 in part.missing_from(cache)}
    steps.advance(0, "run from MLflow")
    with staging(places.home, "fetch") as folder:
        read_run(theirs, record, folder)
        package = check(folder, record.key, f"{record.label} of {places.server.place}")
        steps.advance(1, f"{len(wanted)} objects from DVC")
        if wanted:
            places.dvc.pull(wanted, folder / OBJECTS)

        def path_of(md5: str) -> Path:
            return package.object_path(md5) if md5 in wanted else cache.object_path(md5)

        part.check_objects(path_of)
        part.check_outputs(path_of, package.details)
        steps.advance(1, "snapshot from git")
        if details.snapshot:
            fetch_snapshot(places.root, places.git, record.key, details.snapshot)
        part.install(path_of, cache)
        here = record if places.own else _known(local, package)
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


def _whole(record: Record) -> Details:
    """The details of a run that can be handed on."""
    if record.details is None or not record.is_whole:
        raise RegistryError(
            f"{record.label}: run {record.run.run_id} is {record.run.status}"
            f"{'' if record.details else ' and has no record.json'}; only a finished run that was"
            " recorded whole can be handed on"
        )
    return record.details


def _collect(record: Record, details: Details, cache: DvcCache, *, with_data: bool) -> DvcPart:
    if details.pointer_md5 is None:
        raise RegistryError(
            f"{record.label}: was not trained by `dvc repro`, so DVC has nothing that could be"
            " handed on; `dvc repro` trains it so"
        )
    return collect(cache, details.pointer_md5, record.label, with_data=with_data)


def _origin(record: Record) -> str:
    """MLflow id of the run that a run is a copy of; its own if it is none."""
    return record.run.tags.get(ORIGIN) or record.run.run_id


def _known(library: Library, package: Package) -> Record | None:
    """The package's run in a store, or a finished copy of it."""
    finished = (one for one in library.matching(package.key) if one.run.status == "FINISHED")
    return next((r for r in finished if package.origin in (r.run.run_id, _origin(r))), None)


def _finished(record: Record, server: Library) -> Record | None:
    """The server's run of the key: this one or a copy of it, else the oldest finished one."""
    found = [one for one in server.matching(record.key) if one.run.status == "FINISHED"]
    same = [one for one in found if _origin(one) == _origin(record)]
    others = [one for one in found if not one.reproduction_of]
    return next(iter(same or others), None)


def _has_list(record: Record, server: Library) -> bool:
    try:
        with server.open_file(record, FILE):
            return True
    except RegistryError:
        return False


def _published_part(record: Record, server: Library) -> DvcPart:
    """The DVC part that the publisher wrote."""
    where = f"{record.label}: {FILE} of run {record.run.run_id}"
    try:
        with server.open_file(record, FILE) as file:
            data = file.read(_LARGEST_LIST + 1)
    except RegistryError:
        host = record.details.host if record.details else "where it was trained"
        raise RegistryError(
            f"{record.label}: is on {server.place}, but was not published; run"
            f" `runkey publish {record.label}` on {host}"
        ) from None
    except (OSError, HTTPException) as error:
        raise RegistryError(f"{server.place}: the connection broke ({error})") from None
    if len(data) > _LARGEST_LIST:
        raise RegistryError(f"{where}: larger than 256 MiB; refused")
    return DvcPart.from_json(data, where)
