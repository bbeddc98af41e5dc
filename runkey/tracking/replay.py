"""Send what is left of a training to MLflow: the values that it lacks, its files, its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runkey import paths
from runkey.errors import TrackingError
from runkey.identity.record import LoggedRun, update_record
from runkey.tracking.backlog import Backlog
from runkey.tracking.kept import (
    ARTIFACTS,
    clear_training,
    read_details,
    read_end,
    read_training,
)
from runkey.tracking.store import Store, in_one_line
from runkey.tracking.sync import RunSync
from runkey.tracking.writer import Status
from runkey.training.checkpoint.lock import locked


@dataclass(frozen=True)
class Replayed:
    """What was sent."""

    run_id: str
    status: str
    """Of the run, as it now stands."""
    values: int
    files: int


def send_kept(store: Store, folder: Path, say: Callable[[str], None]) -> Replayed:
    """Send what a training's folder keeps, record the run, and remove the folder if it is finished.

    Args:
        store: where to.
        folder: of the training, see `paths.training_folder`.
        say: told what people should know, in one line each.

    Raises:
        TrainingError: a process trains there.
        TrackingError, RecipeError: see `replay`; what the folder keeps is damaged.
    """
    with locked(folder, say):
        details = read_details(folder)

        def changed(run: LoggedRun) -> None:
            if not store.is_server:
                update_record(store.home / paths.RECORDS, run, details)

        sent = replay(store, folder, say, changed)
        if sent.status == "FINISHED":
            clear_training(folder, everything=True)
    return sent


def replay(
    store: Store,
    folder: Path,
    say: Callable[[str], None],
    changed: Callable[[LoggedRun], None],
) -> Replayed:
    """Bring the MLflow run of a training that nobody works on up to date, or make it.

    What the run has already is asked for and not sent again.

    Args:
        store: where to.
        folder: of the training, see `paths.training_folder`.
        say: told what people should know, in one line each.
        changed: told what MLflow has of the run, at the end.

    Raises:
        TrackingError: the folder holds no training, or MLflow cannot be reached or refuses.
    """
    training, ended = read_training(folder), read_end(folder)
    backlog = Backlog()
    for name, value in ended.tags.items() if ended else ():
        backlog.add_tag(name, value)
    artifacts = folder / ARTIFACTS
    if ended and artifacts.is_dir():
        backlog.add_artifact(artifacts, "")
    files = sum(path.is_file() for path in artifacts.rglob("*")) if ended else 0
    found: list[LoggedRun] = []
    sync = RunSync(store, training, backlog, say=say, changed=found.append, ask=True)
    try:
        sync.update()
        status: Status = ended.status if ended else "KILLED"
        if ended or found[0].status == "RUNNING":
            sync.end(status, ended.ended_ms if ended else None)
    # Whatever MLflow, its database driver or the network raises.
    except Exception as error:  # noqa: BLE001
        text = in_one_line(error)
        raise TrackingError(f"{store.uri}: {text}; {folder} is kept, try again") from None
    changed(found[-1])
    return Replayed(found[-1].run_id, found[-1].status, sync.sent, files)
