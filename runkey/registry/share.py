"""Share a run with the team or another machine, and get one from there.

    publish   copy objects and entries to the DVC remote, the snapshot to the git remote, the MLflow
              run to the team's server
    fetch     get all of these back; everything is checked in a temporary folder first
    export    write everything to one file, for a machine without a connection
    import    read such a file, which may come from anybody

The MLflow run is always copied last, so a run that can be found is complete, and an interruption
leaves only objects that nothing refers to.

Each of the four raises RegistryError if something of the run is missing, damaged, or could do harm,
or a place cannot be reached, and TrackingError if MLflow refuses; the text names what.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from runkey.errors import RegistryError, RunkeyError
from runkey.hashing import sha256_file
from runkey.identity.dvc_yaml import chain, read_pipeline
from runkey.identity.inputs import Inputs
from runkey.identity.key import make_recipe
from runkey.identity.record import ORIGIN, Details, Record
from runkey.params import load_params
from runkey.paths import PARAMS
from runkey.progress import each, progress
from runkey.registry.archive import pack, parse_json, unpack
from runkey.registry.dvc_cache import DvcCache, pointer_md5
from runkey.registry.library import Library, NotStoredError
from runkey.registry.package import (
    BUNDLE,
    FILE,
    OBJECTS,
    RUN,
    DvcPart,
    Package,
    Runs,
    check,
    collect,
    confirm,
    note_taken,
    object_path,
    read_run,
    staging,
)
from runkey.registry.snapshot import (
    bundle_snapshot,
    check_remote,
    fetch_snapshot,
    has_git,
    push_snapshot,
    ref_of,
    unbundle_snapshot,
)
from runkey.units import counted

logger = logging.getLogger(__name__)


class Remote(Protocol):
    """A DVC remote; `runkey.dvc_transfer.DvcRemote` implements it with DVC."""

    def check(self) -> str:
        """Return its address; raise RegistryError if other machines cannot read it."""

    def push(self, objects: Mapping[str, int], entries: Iterable[str]) -> int:
        """Copy objects and entries there; return the number of new objects."""

    def pull(self, objects: Mapping[str, int], folder: Path) -> None:
        """Copy objects from there to `<folder>/<2 digits>/<the rest>`."""


@dataclass(frozen=True)
class Checkout:
    """This checkout and its store."""

    root: Path
    home: Path
    """`Store.home`; temporary folders are made in it."""
    library: Library
    runs: Runs
    commit: Callable[[Collection[str]], object] = lambda _: None
    """Puts the outputs of stages into DVC's cache, as `dvc commit` does."""


@dataclass(frozen=True)
class Team:
    """The team's three places."""

    dvc: Remote
    git: str
    """Name of the git remote."""
    library: Library
    """Runs of the team's server."""
    runs: Runs


@dataclass(frozen=True)
class Carried:
    """The result of an export or import."""

    key: str
    run_id: str
    """In this machine's store."""
    files: int
    size: int
    """Bytes, unpacked."""
    is_new: bool = True
    """True if the run was not there before."""


def export_run(record: Record, here: Checkout, target: Path, *, with_data: bool = False) -> Carried:
    """Write a run of this machine's store to an archive, with the raw data if wanted."""
    details = _whole(record)
    part, cache = _collected(record, here, details, with_data=with_data), DvcCache(here.root)
    with staging(here.home, "export") as folder, progress("export", 3, "parts") as steps:
        steps.advance(0, "run from MLflow")
        package = read_run(here.runs, record, folder, record.label)
        steps.advance(1, "objects of DVC")
        (folder / FILE).write_text(part.as_json(), encoding="utf-8")
        for md5 in each("copy objects", list(part.objects), "objects"):
            place = object_path(folder, md5)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(cache.object_path(md5), place)
        part.check(partial(object_path, folder), package)
        if details.snapshot:
            bundle_snapshot(here.root, record.key, details.snapshot, (folder / BUNDLE).resolve())
        steps.advance(1, target.name)
        index = pack(folder, record.key, target)
    return Carried(record.key, record.run.run_id, len(index.members), index.size)


def import_run(file: Path, here: Checkout) -> Carried:
    """Import a run from an archive that may come from anybody.

    Everything is unpacked and checked in a temporary folder. Then the snapshot, objects, entries
    and, last, the MLflow run are put in place.
    """
    with staging(here.home, "import") as folder, progress("import", 3, "parts") as steps:
        steps.advance(0, file.name)
        index = unpack(file, folder)
        steps.advance(1, "check it")
        package = check(folder, index.key, file.name)
        part = parse_json(DvcPart, folder / FILE, f"{file.name}: {FILE}")
        expected = {object_path(Path(), md5).as_posix() for md5 in part.objects} | {FILE, BUNDLE}
        for name in index.members:
            if name not in expected and not name.startswith(f"{RUN}/"):
                raise RegistryError(f"{file.name}: {name!r} belongs to no run; refused")
        path_of = partial(object_path, folder)
        entries = part.check(path_of, package)
        steps.advance(1, "put in place")
        if oid := package.details.snapshot:
            bundle = (folder / BUNDLE).resolve()
            if not bundle.is_file():
                text = f"{file.name}: {BUNDLE}: not there, and the run has a snapshot"
                raise RegistryError(text)
            if not has_git(here.root):
                text = f"{here.root}: not a git repository; the snapshot has nowhere to go"
                raise RegistryError(text)
            unbundle_snapshot(here.root, bundle, index.key, oid, bundle.parent / "git")
        part.install(path_of, DvcCache(here.root), confirm(entries, package, here.root))
        run_id, is_new = _put_in_place(package, here, f"imported from {file.name}")
    return Carried(index.key, run_id, len(index.members), index.size, is_new)


@dataclass
class Handed:
    """The result of publishing or fetching a run."""

    key: str
    run_id: str = ""
    """MLflow id of the run at its target."""
    state: Literal["new", "already there", "published from elsewhere"] = "new"
    """Of the MLflow run at the target."""
    server: str = ""
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


def publish(record: Record, here: Checkout, team: Team, *, with_data: bool = False) -> Handed:
    """Publish a run of this machine's store to the team, with the raw data if wanted.

    Nothing is sent before all three places have answered.
    """
    details = _whole(record)
    part = _collected(record, here, details, with_data=with_data)
    done = _handed(record, part, team)
    done.dvc = team.dvc.check()
    if details.snapshot:
        check_remote(here.root, team.git)
    published = _finished(team.library, record.key)
    there = _copy_of(published, _origin(record))
    other = next((run for run in published if not run.reproduction_of), None)
    if other and not there and not record.reproduction_of:
        done.run_id, done.state, done.ref = other.run.run_id, "published from elsewhere", None
        return done
    with staging(here.home, "publish") as folder, progress("publish", 3, "parts") as steps:
        steps.advance(0, f"{counted(len(part.objects), 'object')} to DVC")
        done.new_objects = team.dvc.push(part.objects, part.entries)
        steps.advance(1, "snapshot to git")
        if details.snapshot:
            done.new_ref = push_snapshot(here.root, team.git, record.key, details.snapshot)
        steps.advance(1, "run to MLflow")
        (folder / FILE).write_text(part.as_json(), encoding="utf-8")
        if not there:
            package = read_run(here.runs, record, folder, record.label)
            (folder / FILE).replace(package.files / FILE)
            done.run_id = team.runs.write(package.run).run_id
            return done
        done.run_id = there.run.run_id
        if _is_published(there, team.library):
            done.state = "already there"
        else:  # it was recorded on the server in the first place
            team.runs.add(done.run_id, folder / FILE)
    return done


def fetch(record: Record, here: Checkout, team: Team) -> Handed:
    """Get a run of the team's server, so that `dvc repro` restores it."""
    details, cache = _whole(record), DvcCache(here.root)
    if not _is_published(record, team.library):
        raise RegistryError(
            f"{record.label}: is on {team.library.place}, but was not published; run"
            f" `runkey publish {record.label}` on {details.host}"
        )
    with staging(here.home, "fetch") as folder, progress("fetch", 3, "parts") as steps:
        steps.advance(0, "run from MLflow")
        where = f"{record.label} of {team.library.place}"
        package = read_run(team.runs, record, folder, where)
        part = parse_json(DvcPart, package.files / FILE, f"{where}: {FILE}")
        wanted = {md5: part.objects[md5] for md5 in part.missing_from(cache)}
        steps.advance(1, f"{counted(len(wanted), 'object')} from DVC")
        if wanted:
            team.dvc.pull(wanted, folder / OBJECTS)

        def path_of(md5: str) -> Path:
            return object_path(folder, md5) if md5 in wanted else cache.object_path(md5)

        entries = part.check(path_of, package)
        steps.advance(1, "snapshot from git")
        if oid := package.details.snapshot:
            fetch_snapshot(here.root, team.git, record.key, oid, team.git)
        done = _handed(record, part, team)
        left_out = confirm(entries, package, here.root)
        part.install(path_of, DvcCache(here.root), left_out)
        done.entries -= len(left_out)
        done.run_id, is_new = _put_in_place(package, here, f"fetched from {team.library.place}")
    done.state, done.new_objects = "new" if is_new else "already there", len(wanted)
    return done


def _handed(record: Record, part: DvcPart, team: Team) -> Handed:
    oid = record.details.snapshot if record.details else None
    return Handed(
        record.key,
        server=team.library.place,
        objects=len(part.objects),
        size=part.size,
        entries=len(part.entries),
        ref=ref_of(record.key, oid) if oid else None,
    )


def _whole(record: Record) -> Details:
    """The details of a run that can be shared."""
    if record.is_whole and record.details:
        return record.details
    lacks = "" if record.details else " and has no record.json"
    raise RegistryError(
        f"{record.label}: run {record.run.run_id} is {record.run.status}{lacks}; only a finished"
        " run that was recorded whole can be handed on"
    )


def _collected(record: Record, here: Checkout, details: Details, *, with_data: bool) -> DvcPart:
    """Find what DVC holds of a run.

    Outputs of a run that torchrun or a person started, not DVC, are put into its cache first.
    """
    pointer = pointer_md5(here.library, record) or ""
    if not DvcCache(here.root).entry_of(pointer) and _is_in_place(record, here, details):
        params = load_params(here.root / PARAMS)
        stages = chain(read_pipeline(here.root, params.flat()), details.stage)
        here.commit([stage.name for stage in stages])
    cache = DvcCache(here.root)
    return collect(cache, pointer, record.label, record.run.params, with_data=with_data)


def _is_in_place(record: Record, here: Checkout, details: Details) -> bool:
    """Return True if a checkout has a run's key, and its inputs and outputs byte for byte."""
    for path in details.outputs:
        file = here.root / path
        if not file.is_file() or sha256_file(file) != details.files[path].sha256:
            return False
    try:
        params = load_params(here.root / PARAMS)
        recipe = make_recipe(details.stage, here.root, params)
        Inputs(here.root, params, recipe, here.home).check()
    except RunkeyError as error:
        logger.info(f"{record.label}: not put into DVC's cache from this checkout: {error}")
        return False
    return recipe.key == record.key


def _put_in_place(package: Package, here: Checkout, how: str) -> tuple[str, bool]:
    """Write the MLflow run, unless it is there; return its id, and True if it is new."""
    if known := _copy_of(_finished(here.library, package.key), package.origin):
        return known.run.run_id, False
    note_taken(package, how)
    return here.runs.write(package.run).run_id, True


def _origin(record: Record) -> str:
    """MLflow id of the run that a run is a copy of; its own if it is none."""
    return record.run.tags.get(ORIGIN) or record.run.run_id


def _finished(library: Library, key: str) -> list[Record]:
    return [record for record in library.matching(key) if record.run.status == "FINISHED"]


def _copy_of(records: Iterable[Record], origin: str) -> Record | None:
    return next((record for record in records if _origin(record) == origin), None)


def _is_published(record: Record, server: Library) -> bool:
    """Return True if the publisher has added the list of DVC's objects."""
    try:
        with server.open_file(record, FILE):
            return True
    except NotStoredError:
        return False
