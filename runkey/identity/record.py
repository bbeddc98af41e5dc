"""What is known of a recorded run: MLflow's part of it, and the details that the run wrote itself.

    record.json     the `Details`, an artifact of the MLflow run
    run_id          the `RunPointer`, in the training's folder: which MLflow run it logs to

`runkey.identity.record_cache` keeps both parts of every run, so that they are read without MLflow.
"""

from __future__ import annotations

import json
import platform
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from runkey.errors import RecipeError
from runkey.files import write_atomically
from runkey.hashing import sha256_file
from runkey.identity.key import PARTS, short_key

SCHEMA = "record1"
DETAILS = "record.json"
"""Artifact of the MLflow run that holds the `Details`."""
KEY_JSON = "model/key.json"
"""Artifact, and output of the train stage, that holds the recipe."""
REPRODUCES = "RUNKEY_REPRODUCES"
"""Environment variable: MLflow id of the run that the train stage repeats, although its result is
there."""
REPRODUCTION_OF = "reproduction_of"
"""Tag of such a repeat: the MLflow id of the run that it repeats."""
RESUMED, RESUMED_AFTER = "resumed", "resumed.after"
"""Tags: how often the training was resumed; after which steps, and when."""
HINT = "event.hint."
"""Prefix of the tags that hold hints: JSON of what was `seen` and what to `change`."""
KEY = "key"
"""Name of the MLflow tag and param that hold the key; each part is the param `key.<part>`."""
NOT_KEPT = ("system/",)
"""Prefixes of metrics that are left out of records: samples of the machine."""

# The folder that carries a run from one store to another.
RUN_FOLDER_SCHEMA = "run1"
CONTENT = "run.json"
ARTIFACTS = "artifacts"
ORIGIN = "origin_run_id"
"""Tag of a copy: MLflow id of the original run, however often it was copied on."""

POINTER = "run_id"
"""File name of the `RunPointer`."""
TOKEN = "training"
"""Tag of an MLflow run that holds its training's token."""

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, slots=True)
class RunPointer:
    """The MLflow run of a training, and how much of the log it has."""

    uri: str
    """Of the store that the run was made in."""
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    """Chosen before the run is made.  It finds a run whose id never arrived here, because the
    process or the connection was lost in between."""
    run_id: str | None = None
    """None: not made yet, as far as is known."""
    sent: dict[str, int] = field(default_factory=dict)
    """By log name the bytes, all whole lines, that are certainly in MLflow."""


def read_pointer(folder: Path) -> RunPointer | None:
    """Return the pointer in a training's folder, or None if there is no readable one."""
    try:
        return RunPointer(**json.loads((folder / POINTER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_pointer(folder: Path, pointer: RunPointer) -> None:
    """Write the pointer atomically."""
    write_atomically(folder / POINTER, json.dumps(asdict(pointer), sort_keys=True) + "\n")


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

    @classmethod
    def from_mlflow(
        cls,
        info: Mapping[str, Any],
        params: Mapping[str, str],
        metrics: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> Self:
        """Return the run of MLflow's answer; numbers may come as text, such as NaN.

        The fields of `info` have the names of MLflow's REST interface.
        """
        status: Any = "RUNNING" if info["status"] == "SCHEDULED" else info["status"]
        ended = info.get("end_time")
        return cls(
            run_id=str(info["run_id"]),
            experiment_id=str(info["experiment_id"]),
            name=str(info.get("run_name") or tags.get("mlflow.runName", "")),
            status=status,
            started_ms=int(info["start_time"]),
            # MLflow keeps the time of the end when a run is resumed.
            ended_ms=int(ended) if ended and status != "RUNNING" else None,
            artifact_uri=str(info["artifact_uri"]),
            params=dict(sorted(params.items())),
            metrics={n: float(v) for n, v in sorted(metrics.items()) if not n.startswith(NOT_KEPT)},
            tags={n: v for n, v in sorted(tags.items()) if not n.startswith("mlflow.")},
        )

    @property
    def key(self) -> str:
        """`rk2-<64 hex digits>`; of older runs `rk1-`."""
        return self.params.get(KEY) or self.tags[KEY]

    @property
    def resumed(self) -> int:
        """How often the training was resumed."""
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
    """What a run records beside what MLflow has."""

    stage: str
    files: dict[str, StoredFile]
    """Every artifact but record.json by its path, which is that of a stage's output in the
    repository: `model/weights.pt`, `logs/train.jsonl`, `run.json`, `evaluation/metrics.json`."""
    outputs: list[str]
    """The files that the stage itself writes: what a reused run gives back."""
    witness: dict[str, Any]
    """`runkey.identity.manifest.RunEnvironment` without its two long lists, packages and files."""
    host: str
    """Name of the machine."""
    snapshot: str | None
    """Git commit that holds the tree that ran; None outside git."""
    pointer_md5: str | None
    """md5 of run.json, by which DVC's cache knows this run; None if DVC did not run it."""
    decision: str
    """Why it was trained, in one line."""
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics by the key of the stage `evaluate`."""
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    """Results of `runkey reproduce`, oldest first; see `runkey.registry.reproduce`."""
    schema: str = SCHEMA

    def as_json(self) -> str:
        """Return the contents of record.json."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], where: str) -> Self:
        """Return the details that `as_json` wrote; errors name `where`.

        Raises:
            RecipeError: it has another schema, or is incomplete.
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

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the details in a record.json; see `from_dict`."""
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))


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
        """Whether it finished with all its files recorded, so that it can be reused."""
        return self.run.status == "FINISHED" and self.details is not None

    @property
    def reproduction_of(self) -> str | None:
        """MLflow id of the run that this one repeated."""
        return self.run.tags.get(REPRODUCTION_OF)

    @property
    def label(self) -> str:
        """The short key, for messages."""
        return short_key(self.key)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON; the key first, for scripts."""
        return {"key": self.key, **asdict(self)}


def age(record: Record) -> tuple[int, str]:
    """Return a sort key: oldest first, in the same order everywhere."""
    return record.run.started_ms, record.run.run_id


def this_host() -> str:
    """Return this machine's name."""
    return platform.node() or "unknown"


def hashed_files(root: Path, places: Iterable[Path]) -> dict[str, StoredFile]:
    """Return hash and size by path of all files at some places of a workspace."""
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
    """Write record.json to a temporary folder for the length of the block."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / DETAILS
        path.write_text(details.as_json(), encoding="utf-8")
        yield path
