"""Save a training that MLflow lacks, or lacks in part, in its folder; send it later.

The folder holds the description, the logs, how the training ended, and links to its artifacts:
enough to make the MLflow run without the training. `runkey replay KEY` sends it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from runkey.errors import TrackingError
from runkey.files import write_atomically
from runkey.identity.key import ANY_SCHEMA, SCHEMAS
from runkey.identity.record import DETAILS, POINTER, Details, LoggedRun, read_pointer
from runkey.identity.record_cache import update_record
from runkey.tracking.describe import RunDescription
from runkey.tracking.store import Store, in_one_line
from runkey.tracking.sync import RunSender, Status, TrainingRun
from runkey.training.lock import locked

logger = logging.getLogger(__name__)

DESCRIPTION, ENDED, ARTIFACTS, LOG = "description.json", "ended.json", "artifacts", "train.jsonl"
SAMPLES = "system.jsonl"
_FOR_MLFLOW = (DESCRIPTION, ENDED, ARTIFACTS, LOG, SAMPLES, POINTER)


@dataclass(frozen=True)
class TrainingEnd:
    """How a training ended."""

    status: Status
    ended_ms: int
    """Milliseconds since 1970."""
    tags: dict[str, str]
    """Tags set while it ran."""


def save_description(training: TrainingRun) -> None:
    """Save the description of a training that starts; remove how an earlier attempt ended."""
    (training.folder / ENDED).unlink(missing_ok=True)
    shutil.rmtree(training.folder / ARTIFACTS, ignore_errors=True)
    stored = {"experiment": training.experiment, "description": asdict(training.description)}
    write_atomically(training.folder / DESCRIPTION, json.dumps(stored, sort_keys=True) + "\n")


def save_end(
    training: TrainingRun,
    status: Status,
    tags: Mapping[str, str],
    artifacts: Iterable[tuple[Path, str]],
) -> None:
    """Save how a training ended, and the artifacts of its run.

    Each artifact is a file or a folder, with the folder that it goes to among the artifacts.
    """
    for path, folder in artifacts:
        place = training.folder / ARTIFACTS / folder
        place.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, place, copy_function=_link, dirs_exist_ok=True)
        elif path.is_file():
            _link(str(path), str(place / path.name))
    ended = TrainingEnd(status, time.time_ns() // 1_000_000, dict(tags))
    write_atomically(training.folder / ENDED, json.dumps(asdict(ended), sort_keys=True) + "\n")


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
        stored = json.loads(path.read_text(encoding="utf-8"))
        description = RunDescription(**stored["description"])
        logs = (folder / LOG, folder / SAMPLES)
        return TrainingRun(stored["experiment"], description, folder, logs)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrackingError(f"{path}: not the description of a training ({error})") from None


def read_end(folder: Path) -> TrainingEnd | None:
    """Read how the training ended; None: it was interrupted, or MLflow has everything.

    Raises:
        TrackingError: the file is damaged.
    """
    path = folder / ENDED
    try:
        return TrainingEnd(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise TrackingError(f"{path}: not readable ({error})") from None


def find_training(home: Path, address: str) -> Path | None:
    """Find the folder of a saved training; None if there is none.

    The address is a key or its beginning, with or without `rk2-`; KEY:RUN names an MLflow run's.

    Raises:
        TrackingError: several trainings match.
    """
    key, _, run = address.strip().lower().partition(":")
    begins = (key, *(f"{schema}-{key}" for schema in SCHEMAS))
    kept = sorted(path.parent for path in home.glob(f"{ANY_SCHEMA}-*/{DESCRIPTION}"))
    pointers = {path: read_pointer(path) for path in kept if path.name.startswith(begins)}
    runs = {path: (pointer and pointer.run_id) or "" for path, pointer in pointers.items()}
    found = [path for path, run_id in runs.items() if run_id.startswith(run)]
    if len(found) > 1:
        several = ", ".join(f"{path.name[:16]}:{runs[path][:8]}" for path in found)
        raise TrackingError(f"{address}: {len(found)} trainings are kept: {several}; name one")
    return found[0] if found else None


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
    """Send a saved training, update the run's record, and remove the folder if it is finished.

    Raises:
        TrainingError: a process trains there.
        TrackingError, RecipeError: see `replay`; a saved file is damaged.
    """
    with locked(folder):
        record = folder / ARTIFACTS / DETAILS  # which it left if it ended well
        details = Details.read(record) if record.is_file() else None

        sent = replay(store, folder, lambda run: update_record(store.cache, run, details))
        if sent.status == "FINISHED":
            clear_training(folder, everything=True)
    return sent


def replay(store: Store, folder: Path, on_change: Callable[[LoggedRun], None]) -> Replayed:
    """Send MLflow what it lacks of a training that no process works on; make the run if need be.

    `on_change` is called with what MLflow has of the run at the end.

    Raises:
        TrackingError: the folder holds no training, or MLflow cannot be reached or refuses.
    """
    training, ended = read_training(folder), read_end(folder)
    found: list[LoggedRun] = []
    sender = RunSender(store, training, on_change=found.append, resend=True)
    artifacts, files = folder / ARTIFACTS, 0
    if ended:
        sender.tags.extend(ended.tags.items())
        if artifacts.is_dir():
            sender.artifacts.append((artifacts, ""))
        files = sum(path.is_file() for path in artifacts.rglob("*"))
    try:
        sender.update()
        if ended:
            sender.end(ended.status, ended.ended_ms)
        elif found[0].status == "RUNNING":
            sender.end("KILLED")
    # Whatever MLflow, its database driver or the network raises.
    except Exception as error:  # noqa: BLE001
        text = in_one_line(error)
        raise TrackingError(f"{store.uri}: {text}; {folder} is kept, try again") from None
    on_change(found[-1])
    return Replayed(found[-1].run_id, found[-1].status, sender.values_sent, files)
