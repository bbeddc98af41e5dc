"""One run's tracker: the JSONL log always, MLflow where it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runkey import paths
from runkey.identity.record import LoggedRun
from runkey.tracking.describe import describe_run
from runkey.tracking.jsonl import JsonlLog
from runkey.tracking.mlflow_tracker import MlflowTracker, Pace
from runkey.tracking.store import locate_store
from runkey.tracking.writer import Status

if TYPE_CHECKING:
    from runkey.params import Params

TRAIN_LOG = paths.LOGS / "train.jsonl"
SAMPLES = paths.LOGS / "system.jsonl"
"""Samples of the machine: see `runkey.tracking.system`."""


class RunTracker:
    """Sends everything to both.  Implements training's `Tracker`; nothing here ever raises."""

    def __init__(self, jsonl: JsonlLog, mlflow: MlflowTracker | None) -> None:
        """Args: jsonl: the log file.  mlflow: the MLflow run, or None for the file alone."""
        self.jsonl = jsonl
        self.mlflow = mlflow

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of one optimizer step."""
        time_ms = self.jsonl.log(values, step)
        if self.mlflow and time_ms is not None:
            self.mlflow.log(values, step, time_ms)

    def event(self, kind: str, **fields: object) -> None:
        """Record something that happened."""
        is_new = self.jsonl.event(kind, **fields) is not None
        if self.mlflow and is_new:
            self.mlflow.event(kind, **fields)

    def position(self) -> dict[str, int | str]:
        """See `JsonlLog.position`."""
        return self.jsonl.position()

    def resume(self, position: Mapping[str, int | str] | None) -> None:
        """See `JsonlLog.resume`."""
        self.jsonl.resume(position)

    def finish_log(self) -> None:
        """Close the log, before what is made from it; see `JsonlLog.finish`."""
        self.jsonl.finish()

    def final(self, values: Mapping[str, float]) -> None:
        """Record numbers of the run as a whole in MLflow; the log has them as `training_end`."""
        if self.mlflow:
            self.mlflow.log(values, 0)

    def tag(self, name: str, value: str) -> None:
        """Set a tag of the MLflow run."""
        if self.mlflow:
            self.mlflow.tag(name, value)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a file, or of a folder's files, with the MLflow run."""
        if self.mlflow:
            self.mlflow.artifact(path, folder)

    def run_id(self, wait_seconds: float = 30.0) -> str | None:
        """The MLflow run's id; None without MLflow, or when it could not be made in time."""
        return self.mlflow.wait_for_run(wait_seconds) if self.mlflow else None

    def close(self, status: Status = "FINISHED") -> str | None:
        """End the run.  Returns its MLflow id, None if there is none."""
        self.jsonl.close()
        return self.mlflow.close(status) if self.mlflow else None


def open_run(
    params: Params,
    root: Path,
    folder: Path,
    *,
    key: str,
    parts: Mapping[str, str],
    tags: Mapping[str, str],
    counts: Mapping[str, int],
    say: Callable[[str], None],
    name: str | None = None,
    changed: Callable[[LoggedRun], None] = lambda _: None,
    supersedes: Iterable[str] = (),
) -> RunTracker:
    """Begin to record a training, as `params.runtime` says.

    Args:
        params: the resolved parameters.
        root: the workspace.
        folder: of the training, see `paths.training_folder`; a log in it is gone on with.
        key: the recipe key.
        parts: its parts by name.
        tags: further facts for MLflow, such as the device.
        counts: what the data set holds, such as {"train_images": 400}.
        say: told about failures, in one line each.
        name: of the run; None: what differs from the committed parameters.
        changed: see `MlflowTracker`.
        supersedes: see `MlflowTracker`.
    """
    log = JsonlLog(folder / TRAIN_LOG.name, say, shown=root / TRAIN_LOG)
    if not params.runtime.mlflow:
        return RunTracker(log, None)
    description = describe_run(params, root, key=key, parts=parts, tags=tags, counts=counts)
    if name is not None:
        description = replace(description, name=name)
    pace = Pace(system_seconds=params.runtime.system_metrics_seconds)
    experiment = params.runtime.experiment
    mlflow = MlflowTracker(
        locate_store(),
        experiment,
        description,
        say=say,
        changed=changed,
        supersedes=supersedes,
        pace=pace,
    )
    return RunTracker(log, mlflow)


def reopen_run(
    params: Params,
    run_id: str | None,
    say: Callable[[str], None],
    changed: Callable[[LoggedRun], None] = lambda _: None,
) -> MlflowTracker | None:
    """The MLflow run of a training, to add to; None if it was not recorded there.

    Args:
        params: the resolved parameters.
        run_id: its id in this store.
        say: told about failures, in one line each.
        changed: see `MlflowTracker`.
    """
    if not params.runtime.mlflow:
        return None
    if run_id is None:
        say("MLflow: the training was not recorded there, so there is nothing to add to")
        return None
    return MlflowTracker(
        locate_store(), params.runtime.experiment, None, run_id=run_id, say=say, changed=changed
    )
