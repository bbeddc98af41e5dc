"""A run on its way, in a folder: what `publish` sends, `fetch` gets, and an archive holds.

    run/run.json, run/artifacts/     the MLflow run (`runkey.identity.record`)
    dvc.json                         the entries of DVC's run-cache, the objects' names and sizes
    objects/<2 digits>/<the rest>    the objects, as DVC's cache has them
    snapshot.bundle                  git's bundle of the snapshot, in archives alone

Nothing of it is believed: `check` compares every hash there is before anything is moved on.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runkey.errors import RecipeError, RegistryError
from runkey.hashing import sha256_file
from runkey.identity.key import Recipe, short_key
from runkey.identity.record import (
    ARTIFACTS,
    CONTENT,
    DETAILS,
    KEY,
    KEY_JSON,
    ORIGIN,
    RUN_FOLDER_SCHEMA,
    Details,
    LoggedRun,
    Record,
)
from runkey.progress import each
from runkey.registry.archive import safe_path
from runkey.registry.dvc_cache import DvcCache
from runkey.registry.library import Library
from runkey.registry.share_dvc import DvcPart, check_pickles, collect

RUN = "run"
OBJECTS = "objects"
BUNDLE = "snapshot.bundle"

_TEXTS = ("run_id", "name", "status")
_TABLES = ("params", "tags", "metrics")


class Runs(Protocol):
    """MLflow's part of a store; `runkey.tracking.transfer` has it, the registry knows no MLflow."""

    def read(self, run_id: str, folder: Path) -> object:
        """Copy a run to a folder, in the form of `runkey.identity.record`."""

    def write(self, folder: Path) -> LoggedRun:
        """Copy a run from such a folder; it is found by its key when it is whole, not before."""

    def add(self, run_id: str, file: Path) -> None:
        """Add a file to a run's artifacts."""


@dataclass(frozen=True)
class Package:
    """A run whose files were checked."""

    folder: Path
    key: str
    origin: str
    """MLflow id of the run that was first made."""
    details: Details

    @property
    def run(self) -> Path:
        """The MLflow run's folder."""
        return self.folder / RUN

    def object_path(self, md5: str) -> Path:
        """Where an object lies if the package has it."""
        return object_path(self.folder, md5)


def object_path(folder: Path, md5: str) -> Path:
    """Where an object lies in a package's folder."""
    return folder / OBJECTS / md5[:2] / md5[2:]


@contextmanager
def staging(home: Path, what: str) -> Iterator[Path]:
    """A folder in `Store.home` for what is under way; gone afterwards."""
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{what}-", dir=home) as folder:
        yield Path(folder)


def whole(record: Record) -> Details:
    """The details of a run that can be handed on.

    Raises:
        RegistryError: it is not finished, or has no details.
    """
    if record.details is None or not record.is_whole:
        raise RegistryError(
            f"{record.label}: run {record.run.run_id} is {record.run.status}"
            f"{'' if record.details else ' and has no record.json'}; only a finished run that was"
            " recorded whole can be handed on"
        )
    return record.details


def origin_of(record: Record) -> str:
    """MLflow id of the run that a run is a copy of; its own if it is none."""
    return record.run.tags.get(ORIGIN) or record.run.run_id


def known(library: Library, key: str, origin: str) -> Record | None:
    """The run `origin` of a key, or a finished copy of it."""
    found = (one for one in library.matching(key) if one.run.status == "FINISHED")
    return next((one for one in found if origin in (one.run.run_id, origin_of(one))), None)


def collect_dvc(record: Record, cache: DvcCache, *, with_data: bool) -> DvcPart:
    """DVC's part of a run.

    Raises:
        RegistryError: see `dvc_part.collect`; or DVC did not run it.
    """
    pointer = whole(record).pointer_md5
    if pointer is None:
        raise RegistryError(
            f"{record.label}: was not trained by `dvc repro`, so DVC has nothing that could be"
            " handed on; `dvc repro` trains it so"
        )
    return collect(cache, pointer, record.label, with_data=with_data)


def read_run(runs: Runs, record: Record, folder: Path) -> Path:
    """Copy the MLflow run into a package; the folder of its artifacts."""
    (folder / RUN).mkdir()
    runs.read(record.run.run_id, folder / RUN)
    return folder / RUN / ARTIFACTS


def check(folder: Path, key: str, where: str) -> Package:
    """The run in a folder, if all of it is what it says.

    Args:
        folder: of the package.
        key: that it must have.
        where: said in errors, such as the archive's name.

    Raises:
        RegistryError: it is incomplete, a file differs from its recorded hash, its key.json does
            not give that key, or a file could run code when it is loaded; the text names it.
    """
    content = _content(folder / RUN / CONTENT, where)
    files = folder / RUN / ARTIFACTS
    told = content["tags"].get(KEY) or content["params"].get(KEY)
    for said, found in (("its run", told), ("its key.json", _recipe_key(files, where))):
        if found != key:
            raise RegistryError(
                f"{where}: {said} has another key, {short_key(str(found))}, than {short_key(key)}"
            )
    details = _details(files / DETAILS, where)
    _check_files(files, details, where)
    for path in sorted(p for p in files.rglob("*") if p.is_file()):
        check_pickles(path, path.relative_to(files).as_posix())
    origin = content["tags"].get(ORIGIN) or content["run_id"]
    return Package(folder, key, str(origin), details)


def _content(path: Path, where: str) -> dict[str, Any]:
    """run.json, if everything in it has its type."""
    content = _json(path, f"{where}: {CONTENT}")
    texts = all(isinstance(content.get(name), str) for name in _TEXTS)
    tables = all(isinstance(content.get(name), dict) for name in _TABLES)
    times = all(type(content.get(name)) is int for name in ("started_ms", "ended_ms"))
    if content.get("schema") != RUN_FOLDER_SCHEMA or not (texts and tables and times):
        raise RegistryError(f"{where}: {CONTENT} is not of the schema {RUN_FOLDER_SCHEMA}; refused")
    if content["status"] != "FINISHED":
        raise RegistryError(f"{where}: the run is {content['status']}, not FINISHED")
    named = {**content["params"], **content["tags"]}
    points = [point for points in content["metrics"].values() for point in points]
    if not all(isinstance(v, str) for v in named.values()) or not all(map(_is_point, points)):
        raise RegistryError(f"{where}: {CONTENT}: params, tags or metrics of a wrong type; refused")
    if not isinstance(content.get("datasets"), list) or not all(map(_is_data, content["datasets"])):
        raise RegistryError(f"{where}: {CONTENT}: data sets of a wrong type; refused")
    return content


def _is_point(point: object) -> bool:
    """`[step, milliseconds, value]`, the value as text if it is not finite."""
    if not isinstance(point, list) or len(point) != 3:
        return False
    step, time_ms, value = point
    number = type(value) in (int, float) or value in ("nan", "inf", "-inf")
    return type(step) is int and type(time_ms) is int and number


def _is_data(data: object) -> bool:
    if not isinstance(data, dict) or not isinstance(data.get("tags"), dict):
        return False
    texts = ("name", "digest", "source_type", "source", "schema", "profile")
    values = [*(data.get(name) for name in texts), *data["tags"].values()]
    return set(data) == {*texts, "tags"} and all(isinstance(v, str | None) for v in values)


def _recipe_key(files: Path, where: str) -> str:
    try:
        return Recipe.from_dict(_json(files / KEY_JSON, f"{where}: {KEY_JSON}")).key
    except RecipeError as error:
        raise RegistryError(f"{where}: {error}") from None


def _details(path: Path, where: str) -> Details:
    try:
        return Details.from_dict(_json(path, f"{where}: {DETAILS}"), f"{where}: {DETAILS}")
    except RecipeError as error:
        raise RegistryError(str(error)) from None


def _check_files(files: Path, details: Details, where: str) -> None:
    for name, stored in each("hash files", list(details.files.items()), "files"):
        path = files / safe_path(name, f"{where}: {DETAILS}")
        if not path.is_file():
            raise RegistryError(f"{where}: {name}: recorded by the run, and not there")
        if path.stat().st_size != stored.size or sha256_file(path) != stored.sha256:
            raise RegistryError(f"{where}: {name}: not the file that the run recorded")


def _json(path: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RegistryError(f"{where}: not there") from None
    except (ValueError, RecursionError):
        raise RegistryError(f"{where}: not JSON") from None
    if not isinstance(content, dict):
        raise RegistryError(f"{where}: no table; refused")
    return content
