"""Save a training that MLflow lacks, or lacks in part, in its folder; send it later.

The folder holds the description, the logs, how the training ended, and links to its artifacts:
enough to make the MLflow run without the training. `runkey replay KEY` sends it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from runkey.errors import TrackingError
from runkey.files import expect, read_json, write_atomically
from runkey.identity.key import training_folders
from runkey.identity.record import DETAILS, KEY, POINTER, Details, LoggedRun, RunPointer
from runkey.identity.record_cache import update_record
from runkey.paths import TRAIN_LOG
from runkey.tracking.describe import RunDescription
from runkey.tracking.store import Store, tracked
from runkey.tracking.sync import RunSender, Status, TrainingRun
from runkey.training.lock import locked

DESCRIPTION, ENDED, ARTIFACTS = "description.json", "ended.json", "artifacts"
LOG = TRAIN_LOG.name
SAMPLES = "system.jsonl"
_FOR_MLFLOW = (DESCRIPTION, ENDED, ARTIFACTS, LOG, SAMPLES, POINTER)


@dataclass(frozen=True)
class TrainingEnd:
    """How a training ended."""

    status: Status
    ended_ms: int
    tags: dict[str, str]
    """Tags set while it ran."""


def save_description(training: TrainingRun) -> None:
    """Save the description of a training that starts; remove how an earlier attempt ended."""
    (training.folder / ENDED).unlink(missing_ok=True)
    shutil.rmtree(training.folder / ARTIFACTS, ignore_errors=True)
    stored = {"experiment": training.experiment, "description": asdict(training.description)}
    write_atomically(training.folder / DESCRIPTION, json.dumps(stored, sort_keys=True) + "\n")


def save_end(
    folder: Path, status: Status, tags: dict[str, str], artifacts: Iterable[tuple[Path, str]]
) -> None:
    """Save in a training's folder how it ended, and the artifacts of its run.

    Each artifact is a file or a folder, with the folder that it goes to among the artifacts.
    """
    for path, inner in artifacts:
        place = folder / ARTIFACTS / inner
        place.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, place, copy_function=_link, dirs_exist_ok=True)
        elif path.is_file():
            _link(str(path), str(place / path.name))
    ended = TrainingEnd(status, time.time_ns() // 1_000_000, tags)
    write_atomically(folder / ENDED, json.dumps(asdict(ended), sort_keys=True) + "\n")


def clear_training(folder: Path, *, everything: bool) -> None:
    """Clear the folder of a training that has ended; the caller holds its lock.

    Without `everything`, what MLflow still lacks is kept.
    """
    if everything and folder.is_dir():
        shutil.rmtree(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in _FOR_MLFLOW:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_training(folder: Path) -> TrainingRun:
    """Read the training saved in a folder; TrackingError if there is none."""
    path = folder / DESCRIPTION
    try:
        stored = read_json(path)
        description = expect(RunDescription, stored["description"])
        experiment = expect(str, stored["experiment"])
        expect(str, description.params.get(KEY))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrackingError(f"{path}: not the description of a training ({error})") from None
    return TrainingRun(experiment, description, folder, (folder / LOG, folder / SAMPLES))


def read_end(folder: Path) -> TrainingEnd | None:
    """Read how it ended; None: interrupted, or MLflow has everything. TrackingError if damaged."""
    path = folder / ENDED
    try:
        return cast("TrainingEnd", read_json(path, TrainingEnd))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise TrackingError(f"{path}: not readable ({error})") from None


def find_training(home: Path, address: str) -> Path | None:
    """Find the folder of a saved training; None if there is none.

    The address is a key or its beginning, with or without `rk2-`; KEY:RUN names an MLflow run's.
    TrackingError if several trainings match.
    """
    key, _, run = address.strip().lower().partition(":")
    found: dict[Path, str] = {}
    for folder in training_folders(home, key):
        pointer = RunPointer.read(folder)
        run_id = (pointer and pointer.run_id) or ""
        if (folder / DESCRIPTION).exists() and run_id.startswith(run):
            found[folder] = run_id
    if len(found) > 1:
        several = ", ".join(f"{path.name[:16]}:{run_id[:8]}" for path, run_id in found.items())
        raise TrackingError(f"{address}: {len(found)} trainings are kept: {several}; name one")
    return next(iter(found), None)


def _link(source: str, target: str) -> None:
    """Hard-link a file; copy it if `target` is on another disk."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@dataclass(frozen=True)
class Replayed:
    """What was sent."""

    run_id: str
    status: str
    """Of the run, after sending."""
    values: int
    files: int


def send_saved(store: Store, folder: Path) -> Replayed:
    """Send MLflow what it lacks of a saved training, and update the run's record.

    The run is made if need be; the folder of a finished one is removed.

    Raises:
        TrainingError: a process trains there.
        TrackingError: the folder holds no training, or MLflow cannot be reached or refuses.
        RecipeError: the saved record is damaged.
    """
    with locked(folder):
        training, ended = read_training(folder), read_end(folder)
        artifacts = folder / ARTIFACTS
        record = artifacts / DETAILS  # which it left if it ended well
        details = Details.read(record) if record.is_file() else None
        found: list[LoggedRun] = []
        sender = RunSender(store, training, on_change=found.append, resend=True)
        if ended:
            sender.tags.extend(ended.tags.items())
            if artifacts.is_dir():
                sender.artifacts.append((artifacts, ""))
        with tracked(store, f"not sent, {folder} is kept, try again"):
            sender.update()
            if ended:
                sender.end(ended.status, ended.ended_ms)
            elif found[0].status == "RUNNING":
                sender.end("KILLED")
        run = found[-1]
        update_record(store.cache, run, details)
        files = sum(path.is_file() for path in artifacts.rglob("*")) if ended else 0
        if run.status == "FINISHED":
            clear_training(folder, everything=True)
    return Replayed(run.run_id, run.status, sender.values_sent, files)
