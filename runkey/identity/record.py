"""What is known of a recorded run: MLflow's part of it, and the details that the run wrote itself.

    <home>/runs/<key>-<run id>.json      a `Record`, one small file a run, read without MLflow
    record.json                          the `Details`, an artifact of the MLflow run

The files can be deleted: `runkey index` writes them again from MLflow, to the same content.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from runkey.hashing import sha256_file
from runkey.identity.errors import RecipeError
from runkey.identity.key import PARTS, short_key

SCHEMA = "record1"
DETAILS = "record.json"
"""Artifact of the MLflow run that holds the `Details`."""
KEY_JSON = "model/key.json"
"""Artifact, and output of the train stage, that holds the recipe."""
REPRODUCES = "RUNKEY_REPRODUCES"
"""Environment variable that tells the train stage which run it repeats, by its MLflow id: it trains
although the result is there."""
REPRODUCTION_OF = "reproduction_of"
"""Tag of such a repeat: the MLflow id of the run that it repeats."""
RESUMED, RESUMED_AFTER = "resumed", "resumed.after"
"""Tags: how often a training went on after it was interrupted; after which steps, and when."""
HINT = "event.hint."
"""Beginning of the tags that hold hints: JSON of what was `seen` and what to `change`."""
KEY = "key"
"""Name of the MLflow tag and param that hold the key; each part is the param `key.<part>`."""
NOT_KEPT = ("system/",)
"""Beginnings of names of metrics that no record holds: samples of the machine."""

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """A run as MLflow has it."""

    run_id: str
    experiment_id: str
    name: str
    """What differs from the baseline, such as `lr=5e-05`."""
    status: Status
    started_ms: int
    """Milliseconds since 1970."""
    ended_ms: int | None
    artifact_uri: str
    params: dict[str, str]
    """Resolved parameters under dotted names, the key and its parts."""
    metrics: dict[str, float]
    """The last value of each, without those that are `NOT_KEPT`."""
    tags: dict[str, str]
    """Without MLflow's own (`mlflow.*`)."""

    @property
    def key(self) -> str:
        """`rk2-<64 hex digits>`; of older runs `rk1-`."""
        return self.params.get(KEY) or self.tags[KEY]

    @property
    def resumed(self) -> int:
        """How often it went on after an interruption."""
        times = self.tags.get(RESUMED, "")
        return int(times) if times.isdecimal() else 0

    @property
    def parts(self) -> dict[str, str]:
        """Hash of each part of the key."""
        return {part: self.params.get(f"{KEY}.{part}", "") for part in PARTS}


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file that is kept with a run."""

    sha256: str
    size: int
    """Bytes."""


@dataclass(frozen=True, kw_only=True)
class Details:
    """What a run says of itself, beside what MLflow has."""

    stage: str
    files: dict[str, StoredFile]
    """Every artifact but record.json by its path, which is that of a stage's output in the
    repository: `model/weights.pt`, `logs/train.jsonl`, `run.json`, `evaluation/metrics.json`."""
    outputs: list[str]
    """Those among them that the stage itself writes: what a run that is reused gives back."""
    witness: dict[str, Any]
    """`runkey.identity.manifest.Witness` without its two long lists, packages and files."""
    host: str
    """Name of the machine that it ran on."""
    snapshot: str | None
    """Git commit that holds the tree that ran; None outside git."""
    pointer_md5: str | None
    """md5 of run.json, by which DVC's cache knows this run; None if DVC did not run it."""
    decision: str
    """Why it was trained, in a line."""
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics by the key of the stage `evaluate`."""
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    """What `runkey reproduce` found, oldest first; see `runkey.registry.checks.reproduce`."""
    schema: str = SCHEMA

    def as_json(self) -> str:
        """The contents of record.json."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], where: str) -> Self:
        """The details that `as_json` gave.

        Args:
            stored: the parsed JSON.
            where: said in errors.

        Raises:
            RecipeError: of another schema, or incomplete.
        """
        if stored.get("schema") != SCHEMA:
            raise RecipeError(
                f"{where}: schema {stored.get('schema')!r}; this runkey reads {SCHEMA}"
            )
        try:
            files = {path: StoredFile(**file) for path, file in stored["files"].items()}
            return cls(**{**stored, "files": files})
        except (AttributeError, KeyError, TypeError) as error:
            raise RecipeError(f"{where}: not a run's record ({error})") from None


@dataclass(frozen=True, kw_only=True)
class Record:
    """A recorded run."""

    run: LoggedRun
    details: Details | None
    """None while it runs, or if it ended before it could write them."""

    @property
    def key(self) -> str:
        """`rk2-<64 hex digits>`; of older runs `rk1-`."""
        return self.run.key

    @property
    def is_whole(self) -> bool:
        """Whether it finished with all its files recorded: what can be reused and verified."""
        return self.run.status == "FINISHED" and self.details is not None

    @property
    def reproduction_of(self) -> str | None:
        """MLflow id of the run that this one repeated."""
        return self.run.tags.get(REPRODUCTION_OF)

    @property
    def label(self) -> str:
        """How the run is named to people: the short key."""
        return short_key(self.key)

    @property
    def file_name(self) -> str:
        """Its file's name in a folder of records."""
        return f"{self.key}-{self.run.run_id}.json"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the key first, for scripts."""
        return {"key": self.key, **asdict(self)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], where: str) -> Self:
        """The record that `as_dict` gave.

        Raises:
            RecipeError: see `Details.from_dict`.
        """
        try:
            run = LoggedRun(**stored["run"])
            details = stored["details"]
        except (KeyError, TypeError) as error:
            raise RecipeError(f"{where}: not a run's record ({error})") from None
        return cls(run=run, details=Details.from_dict(details, where) if details else None)


def this_host() -> str:
    """This machine's name, as records, claims and notes on runs have it."""
    return platform.node() or "unknown"


def write_record(folder: Path, record: Record) -> Path:
    """Write a record's file whole or not at all; several processes may write the same one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / record.file_name
    temporary = folder / f".{record.run.run_id}.{os.getpid()}"
    temporary.write_text(json.dumps(record.as_dict(), sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def update_record(folder: Path, run: LoggedRun, details: Details | None = None) -> Path:
    """Write what MLflow has of a run now; without `details`, those in the file stay."""
    path = folder / Record(run=run, details=None).file_name
    if details is None and path.is_file():
        details = read_record(path).details
    return write_record(folder, Record(run=run, details=details))


def read_record(path: Path) -> Record:
    """The record in a file.

    Raises:
        RecipeError: it is no record; the text says how to write it again.
        FileNotFoundError: it is gone.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise RecipeError(f"{path}: not JSON; delete it, `runkey index` writes it again") from None
    return Record.from_dict(stored, str(path))


def hashed_files(root: Path, places: Iterable[Path]) -> dict[str, StoredFile]:
    """Hash and size by path of all files at some places of a workspace."""
    files: dict[str, StoredFile] = {}
    for place in places:
        top = root / place
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                name = path.relative_to(root).as_posix()
                files[name] = StoredFile(sha256=sha256_file(path), size=path.stat().st_size)
    return files


@contextmanager
def details_file(details: Details) -> Iterator[Path]:
    """record.json, to be copied while this lasts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / DETAILS
        path.write_text(details.as_json(), encoding="utf-8")
        yield path
