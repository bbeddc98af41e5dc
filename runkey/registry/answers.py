"""What a tracking server answers, as far as it is used; checked, since any server may answer.

`checked` and `parsed` are the one place where answers become objects.  The fields have the names of
MLflow's REST interface, which leaves empty texts and lists out.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from runkey.files import expect, parse_json
from runkey.identity.key import ANY_SCHEMA
from runkey.identity.record import KEY, LoggedRun

LATEST_MS = 253_402_300_799_000
"""The last second of the year 9999, after which Python has no dates."""
_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
_KEY = re.compile(rf"{ANY_SCHEMA}-[0-9a-f]{{64}}")


@dataclass(frozen=True)
class Pair:
    """A tag or a parameter."""

    key: str
    value: str = ""


@dataclass(frozen=True)
class Metric:
    """The last value of a metric."""

    key: str
    value: float


@dataclass(frozen=True)
class RunInfo:
    """MLflow's own part of a run."""

    run_id: str
    experiment_id: str
    status: Literal["RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED"]
    start_time: int
    artifact_uri: str
    run_name: str | None = None
    end_time: int | None = None
    lifecycle_stage: str = "active"

    def __post_init__(self) -> None:
        """Raise ValueError for an id that is none, a time without a date, a torn address."""
        for value in (self.run_id, self.experiment_id):
            if not _ID.fullmatch(value):
                raise ValueError(f"{value[:60]!r} is no id")
        for time_ms in (self.start_time, self.end_time or 0):
            if not 0 <= time_ms <= LATEST_MS:
                raise ValueError(f"no time in milliseconds since 1970: {str(time_ms)[:60]}")
        urllib.parse.urlsplit(self.artifact_uri)


@dataclass(frozen=True)
class RunData:
    """What was logged to a run."""

    params: Sequence[Pair] = ()
    metrics: Sequence[Metric] = ()
    tags: Sequence[Pair] = ()


@dataclass(frozen=True)
class Run:
    """A run that has a key."""

    info: RunInfo
    data: RunData = field(default_factory=RunData)

    def __post_init__(self) -> None:
        """Raise ValueError for a run without a key."""
        key = self.logged().params.get(KEY) or self.logged().tags.get(KEY, "")
        if not _KEY.fullmatch(key):
            raise ValueError(f"key {key[:80]!r} is none")

    def logged(self) -> LoggedRun:
        """Return the part of it that a record holds."""
        params, tags = (
            {one.key: one.value for one in pairs} for pairs in (self.data.params, self.data.tags)
        )
        metrics = {one.key: one.value for one in self.data.metrics}
        return LoggedRun.from_mlflow(asdict(self.info), params, metrics, tags)


@dataclass(frozen=True)
class Experiment:
    """An experiment."""

    experiment_id: str
    tags: Sequence[Pair] = ()


@dataclass(frozen=True)
class Alias:
    """A name for one version of a registered model."""

    alias: str


@dataclass(frozen=True)
class Model:
    """A registered model."""

    name: str
    tags: Sequence[Pair] = ()
    aliases: Sequence[Alias] = ()
    latest_versions: Sequence[Any] = ()


@dataclass(frozen=True)
class ArtifactFile:
    """A file or folder among a run's artifacts."""

    path: str
    is_dir: bool = False
    file_size: int | None = None
    """In bytes."""


@dataclass(frozen=True)
class Refusal:
    """MLflow's answer to a request that it refuses."""

    error_code: str
    message: str = ""


def parsed[T](kind: type[T], data: bytes | str) -> T:
    """Return the JSON of a stranger as an object; FormatError if it is another one."""
    return checked(kind, parse_json(data))


def checked[T](kind: type[T], value: Any) -> T:
    """Return a part of parsed JSON as an object; FormatError if it is another one."""
    found: T = expect(kind, value)
    return found
