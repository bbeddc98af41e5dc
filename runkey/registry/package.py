"""A run in a folder: what `publish` sends, `fetch` gets, and an archive holds.

    run/run.json, run/artifacts/     the MLflow run (`runkey.identity.record`)
    dvc.json                         entries of DVC's run-cache, names and sizes of objects
    objects/<2 digits>/<the rest>    the objects, as in DVC's cache
    snapshot.bundle                  git's bundle of the snapshot, in archives only

`check` compares every hash there is before anything of it is used.
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
from runkey.registry.archive import check_weights, safe_path

RUN = "run"
OBJECTS = "objects"
BUNDLE = "snapshot.bundle"

_TEXTS = ("run_id", "name", "status")
_TABLES = ("params", "tags", "metrics")
_DATASET_TEXTS = ("name", "digest", "source_type", "source", "schema", "profile")


class Runs(Protocol):
    """Access to a store's MLflow runs; `runkey.tracking` implements it with MLflow."""

    def read(self, run_id: str, folder: Path) -> object:
        """Copy a run to a folder, in the form of `runkey.identity.record`."""

    def write(self, folder: Path) -> LoggedRun:
        """Copy a run from such a folder; it can be found by its key only when it is whole."""

    def add(self, run_id: str, file: Path) -> None:
        """Add a file to a run's artifacts."""


@dataclass(frozen=True)
class Package:
    """A run whose files were checked."""

    folder: Path
    key: str
    origin: str
    """MLflow id of the run that was made first."""
    details: Details

    @property
    def run(self) -> Path:
        """The folder of the MLflow run."""
        return self.folder / RUN

    def object_path(self, md5: str) -> Path:
        """Return where an object lies if the package has it."""
        return object_path(self.folder, md5)


def object_path(folder: Path, md5: str) -> Path:
    """Return where an object lies in a package's folder."""
    return folder / OBJECTS / md5[:2] / md5[2:]


@contextmanager
def staging(home: Path, what: str) -> Iterator[Path]:
    """Make a temporary folder in `Store.home`; it is deleted afterwards."""
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{what}-", dir=home) as folder:
        yield Path(folder)


def read_run(runs: Runs, record: Record, folder: Path) -> Path:
    """Copy the MLflow run into a package; return the folder of its artifacts."""
    (folder / RUN).mkdir()
    runs.read(record.run.run_id, folder / RUN)
    return folder / RUN / ARTIFACTS


def check(folder: Path, key: str, where: str) -> Package:
    """Check that the run in a folder is complete and is what it says.

    Args:
        folder: of the package.
        key: that the run must have.
        where: named in errors, such as the archive's name.

    Raises:
        RegistryError: it is incomplete, a file differs from its recorded hash, its key.json does
            not give that key, or a file could run code when it is loaded; the text names it.
    """
    stored = _read_content(folder / RUN / CONTENT, where)
    files = folder / RUN / ARTIFACTS
    tagged = stored["tags"].get(KEY) or stored["params"].get(KEY)
    try:
        recipe = Recipe.from_dict(_read_table(files / KEY_JSON, f"{where}: {KEY_JSON}"))
    except RecipeError as error:
        raise RegistryError(f"{where}: {error}") from None
    for what, found in (("its run", tagged), ("its key.json", recipe.key)):
        if found != key:
            raise RegistryError(
                f"{where}: {what} has another key, {short_key(str(found))}, than {short_key(key)}"
            )
    details_name = f"{where}: {DETAILS}"
    try:
        details = Details.from_dict(_read_table(files / DETAILS, details_name), details_name)
    except RecipeError as error:
        raise RegistryError(str(error)) from None
    for name, recorded in each("hash files", list(details.files.items()), "files"):
        path = files / safe_path(name, details_name)
        if not path.is_file():
            raise RegistryError(f"{where}: {name}: recorded by the run, and not there")
        if path.stat().st_size != recorded.size or sha256_file(path) != recorded.sha256:
            raise RegistryError(f"{where}: {name}: not the file that the run recorded")
    for path in sorted(p for p in files.rglob("*") if p.is_file()):
        check_weights(path, path.relative_to(files).as_posix())
    return Package(folder, key, str(stored["tags"].get(ORIGIN) or stored["run_id"]), details)


def _read_content(path: Path, where: str) -> dict[str, Any]:
    """Read run.json, and check the type of everything in it."""
    stored = _read_table(path, f"{where}: {CONTENT}")
    texts = all(isinstance(stored.get(name), str) for name in _TEXTS)
    tables = all(isinstance(stored.get(name), dict) for name in _TABLES)
    times = all(type(stored.get(name)) is int for name in ("started_ms", "ended_ms"))
    if stored.get("schema") != RUN_FOLDER_SCHEMA or not (texts and tables and times):
        raise RegistryError(f"{where}: {CONTENT} is not of the schema {RUN_FOLDER_SCHEMA}; refused")
    if stored["status"] != "FINISHED":
        raise RegistryError(f"{where}: the run is {stored['status']}, not FINISHED")
    values = {**stored["params"], **stored["tags"]}.values()
    points = [point for points in stored["metrics"].values() for point in points]
    if not all(isinstance(v, str) for v in values) or not all(map(_is_point, points)):
        raise RegistryError(f"{where}: {CONTENT}: params, tags or metrics of a wrong type; refused")
    datasets = stored.get("datasets")
    if not isinstance(datasets, list) or not all(map(_is_dataset, datasets)):
        raise RegistryError(f"{where}: {CONTENT}: data sets of a wrong type; refused")
    return stored


def _is_point(point: object) -> bool:
    """`[step, milliseconds, value]`, the value as text if it is not finite."""
    if not isinstance(point, list) or len(point) != 3:
        return False
    step, time_ms, value = point
    is_number = type(value) in (int, float) or value in ("nan", "inf", "-inf")
    return type(step) is int and type(time_ms) is int and is_number


def _is_dataset(data: object) -> bool:
    if not isinstance(data, dict) or not isinstance(data.get("tags"), dict):
        return False
    values = [*(data.get(name) for name in _DATASET_TEXTS), *data["tags"].values()]
    return set(data) == {*_DATASET_TEXTS, "tags"} and all(isinstance(v, str | None) for v in values)


def _read_table(path: Path, where: str) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RegistryError(f"{where}: not there") from None
    except (ValueError, RecursionError):
        raise RegistryError(f"{where}: not JSON") from None
    if not isinstance(stored, dict):
        raise RegistryError(f"{where}: no table; refused")
    return stored
