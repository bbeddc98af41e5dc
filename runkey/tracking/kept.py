"""What a training's folder keeps for MLflow, beside the log: enough to make its run without it.

description.json    what is said about the run when it begins
ended.json          how it ended, when MLflow did not get everything by then
artifacts/          the files that the run has then, linked: they outlast the workspace's
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from runkey.errors import TrackingError
from runkey.identity.key import ANY_SCHEMA, SCHEMAS
from runkey.identity.pointer import POINTER, RunPointer, read_pointer, write_durably
from runkey.identity.record import DETAILS, Details
from runkey.tracking.describe import Dataset, RunDescription
from runkey.tracking.sync import Training
from runkey.tracking.writer import Status

DESCRIPTION, ENDED, ARTIFACTS, LOG = "description.json", "ended.json", "artifacts", "train.jsonl"
SAMPLES = "system.jsonl"
_FOR_MLFLOW = (DESCRIPTION, ENDED, ARTIFACTS, LOG, SAMPLES)


@dataclass(frozen=True)
class Ended:
    """How a training ended."""

    status: Status
    ended_ms: int
    """Milliseconds since 1970."""
    tags: dict[str, str]
    """Those that were set while it ran."""


def keep_training(training: Training) -> None:
    """Write what the run is; it goes on, so how it ended before is no longer true.

    Raises:
        OSError: the folder cannot be written.
    """
    assert training.folder
    (training.folder / ENDED).unlink(missing_ok=True)
    shutil.rmtree(training.folder / ARTIFACTS, ignore_errors=True)
    content = {"experiment": training.experiment, "description": asdict(training.description)}
    write_durably(training.folder / DESCRIPTION, json.dumps(content, sort_keys=True) + "\n")


def keep_end(
    training: Training,
    status: Status,
    tags: Mapping[str, str],
    artifacts: Iterable[tuple[Path, str]],
) -> None:
    """Keep how a training ended, and the files that its run is to have.

    Args:
        training: has a folder.
        status: of the run.
        tags: set while it ran.
        artifacts: files and folders, each with the folder that it lies in among the artifacts.

    Raises:
        OSError: the folder cannot be written.
    """
    assert training.folder
    for path, folder in artifacts:
        place = training.folder / ARTIFACTS / folder
        place.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, place, copy_function=_link, dirs_exist_ok=True)
        elif path.is_file():
            _link(str(path), str(place / path.name))
    ended = Ended(status, time.time_ns() // 1_000_000, dict(tags))
    write_durably(training.folder / ENDED, json.dumps(asdict(ended), sort_keys=True) + "\n")


def clear_training(folder: Path, *, everything: bool) -> None:
    """Remove what a training that has ended needs no more.

    Args:
        folder: of the training; the caller holds its lock.
        everything: the folder itself; False: MLflow lacks something, and what it lacks stays.

    Raises:
        OSError: it cannot be written.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if everything or path.name not in (*_FOR_MLFLOW, POINTER):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if everything and folder.is_dir():
        folder.rmdir()


def read_training(folder: Path) -> Training:
    """The training in a folder.

    Raises:
        TrackingError: the folder holds none.
    """
    path = folder / DESCRIPTION
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        fields = stored["description"]
        dataset = Dataset(**fields["dataset"]) if fields["dataset"] else None
        description = RunDescription(**{**fields, "dataset": dataset})
        return Training(stored["experiment"], description, folder, (folder / LOG, folder / SAMPLES))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrackingError(f"{path}: not the description of a training ({error})") from None


def read_end(folder: Path) -> Ended | None:
    """How the training in a folder ended; None: it was interrupted, or MLflow had it all.

    Raises:
        TrackingError: the file is damaged.
    """
    path = folder / ENDED
    try:
        return Ended(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise TrackingError(f"{path}: not readable ({error})") from None


def read_details(folder: Path) -> Details | None:
    """What the training says of itself, if it ended well; see `runkey.identity.record`.

    Raises:
        RecipeError: the file is damaged.
    """
    path = folder / ARTIFACTS / DETAILS
    if not path.is_file():
        return None
    return Details.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))


def find_training(home: Path, address: str) -> Path | None:
    """The folder of the training that a user means; None: there is none.

    Args:
        home: `Store.home`.
        address: a key or a beginning of one, with `rk2-` or without; KEY:RUN for that of an MLflow
            run.

    Raises:
        TrackingError: there are several.
    """
    key, _, run = address.strip().lower().partition(":")
    begins = (key, *(f"{schema}-{key}" for schema in SCHEMAS))
    runs = {
        path: (read_pointer(path) or RunPointer("")).run_id or ""
        for path in sorted(home.glob(f"{ANY_SCHEMA}-*"))
        if path.name.startswith(begins) and (path / DESCRIPTION).is_file()
    }
    found = [path for path, run_id in runs.items() if run_id.startswith(run)]
    if len(found) > 1:
        several = ", ".join(f"{path.name[:16]}:{runs[path][:8]}" for path in found)
        raise TrackingError(f"{address}: {len(found)} trainings are kept: {several}; name one")
    return found[0] if found else None


def _link(source: str, target: str) -> None:
    """A second name for a file, which it keeps when the first goes; a copy on another disk."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
