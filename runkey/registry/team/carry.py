"""A run as a file, for machines that never meet: `export` and `import`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from runkey.errors import RegistryError
from runkey.identity.record import Record
from runkey.progress import QUIET, Steps, each
from runkey.registry.dvc_cache import DvcCache
from runkey.registry.git import has_git
from runkey.registry.library import Library
from runkey.registry.team.archive import Index, pack, unpack
from runkey.registry.team.dvc_part import FILE, DvcPart, check_objects, check_outputs, install
from runkey.registry.team.package import (
    BUNDLE,
    RUN,
    Package,
    Runs,
    check,
    collect_dvc,
    known,
    object_path,
    read_run,
    staging,
    whole,
)
from runkey.registry.team.snapshot_transfer import bundle_snapshot, unbundle_snapshot

PARTS = 3
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
