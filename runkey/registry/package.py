"""A run in a folder: what `publish` sends, `fetch` gets, and an archive contains.

    run/run.json, run/artifacts/     the MLflow run (`runkey.identity.record`)
    dvc.json                         entries of DVC's run-cache, names and sizes of objects
    objects/<2 digits>/<the rest>    the objects, as in DVC's cache
    snapshot.bundle                  git's bundle of the snapshot, in archives only

`check` compares every hash there is before anything of it is used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict

from pydantic import ConfigDict, with_config

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
    Details,
    LoggedRun,
    Record,
)
from runkey.progress import each
from runkey.registry.archive import check_weights, parse_json, safe_path

RUN = "run"
OBJECTS = "objects"
BUNDLE = "snapshot.bundle"


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

    @property
    def files(self) -> Path:
        """The folder of its artifacts."""
        return self.run / ARTIFACTS


def object_path(folder: Path, md5: str) -> Path:
    """Return where an object lies in a package's folder."""
    return folder / OBJECTS / md5[:2] / md5[2:]


@contextmanager
def staging(home: Path, what: str) -> Iterator[Path]:
    """Make a temporary folder in `Store.home`; it is deleted afterwards."""
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{what}-", dir=home) as folder:
        yield Path(folder)


def read_run(runs: Runs, record: Record, folder: Path, where: str) -> Package:
    """Copy an MLflow run into a package's folder, and check it as `check` does."""
    (folder / RUN).mkdir()
    runs.read(record.run.run_id, folder / RUN)
    return check(folder, record.key, where)


# The form of run.json.


@with_config(ConfigDict(extra="forbid"))
class _Dataset(TypedDict):
    name: str | None
    digest: str | None
    source_type: str | None
    source: str | None
    schema: str | None
    profile: str | None
    tags: dict[str, str | None]


class _Content(TypedDict):
    schema: Literal["run1"]
    run_id: str
    name: str
    status: str
    started_ms: int
    ended_ms: int
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, list[tuple[int, int, float | Literal["nan", "inf", "-inf"]]]]
    """Each point as step, milliseconds and value."""
    datasets: list[_Dataset]


def check(folder: Path, key: str, where: str) -> Package:
    """Check that the run in a folder is complete, is of this key and is what it says.

    Raises:
        RegistryError: it is incomplete, a file differs from its recorded hash, its key.json does
            not give that key, or a file could run code when it is loaded; the text names it.
    """
    files = folder / RUN / ARTIFACTS
    stored = parse_json(_Content, *_read(folder / RUN / CONTENT, CONTENT, where))
    if stored["status"] != "FINISHED":
        raise RegistryError(f"{where}: the run is {stored['status']}, not FINISHED")
    tables = {
        name: parse_json(dict[str, Any], *_read(files / name, name, where))
        for name in (KEY_JSON, DETAILS)
    }
    try:
        recipe = Recipe.from_dict(tables[KEY_JSON])
        details = Details.from_dict(tables[DETAILS], DETAILS)
    except RecipeError as error:
        raise RegistryError(f"{where}: {error}") from None
    tagged = stored["tags"].get(KEY) or stored["params"].get(KEY)
    for what, found in (("its run", tagged), ("its key.json", recipe.key)):
        if found != key:
            raise RegistryError(
                f"{where}: {what} has another key, {short_key(str(found))}, than {short_key(key)}"
            )
    for name, recorded in each("hash files", list(details.files.items()), "files"):
        path = files / safe_path(name, f"{where}: {DETAILS}")
        if not path.is_file():
            raise RegistryError(f"{where}: {name}: recorded by the run, and not there")
        if path.stat().st_size != recorded.size or sha256_file(path) != recorded.sha256:
            raise RegistryError(f"{where}: {name}: not the file that the run recorded")
    for path in sorted(p for p in files.rglob("*") if p.is_file()):
        check_weights(path, path.relative_to(files).as_posix())
    return Package(folder, key, stored["tags"].get(ORIGIN) or stored["run_id"], details)


def _read(path: Path, name: str, where: str) -> tuple[bytes, str]:
    """The bytes of a file of the package, and what errors call it."""
    try:
        return path.read_bytes(), f"{where}: {name}"
    except FileNotFoundError:
        raise RegistryError(f"{where}: {name}: not there") from None
