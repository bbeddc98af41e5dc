"""One run's tracker: the JSONL log always, MLflow where it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runkey import paths
from runkey.identity.key import short_key
from runkey.identity.record import KEY, LoggedRun
from runkey.tracking import kept
from runkey.tracking.describe import describe_run
from runkey.tracking.jsonl import JsonlLog
from runkey.tracking.mlflow_tracker import MlflowTracker, Pace
from runkey.tracking.store import Store, locate_store
from runkey.tracking.sync import Training
from runkey.tracking.system import SampleLog
from runkey.tracking.tail import points_of
from runkey.tracking.writer import Status

if TYPE_CHECKING:
    from runkey.params import Params

TRAIN_LOG = paths.LOGS / kept.LOG
SAMPLES = paths.LOGS / kept.SAMPLES
"""Samples of the machine: see `runkey.tracking.system`."""


class RunTracker:
    """Writes the log, which MLflow gets from there.  Implements training's `Tracker`."""

    def __init__(
        self,
        jsonl: JsonlLog,
        mlflow: MlflowTracker | None,
        training: Training | None = None,
        samples: SampleLog | None = None,
    ) -> None:
        """Nothing is written yet.

        Args:
            jsonl: the log.
            mlflow: the MLflow run that follows it, or None for the file alone.
            training: what is kept in its folder if MLflow lacks something at the end.
            samples: of the machine, taken by `mlflow`.
        """
        self.jsonl = jsonl
        self.mlflow = mlflow
        self._training = training
        self._samples = samples
        self._tags: dict[str, str] = {}
        self._artifacts: list[tuple[Path, str]] = []

    @property
    def is_whole(self) -> bool:
        """Whether MLflow, if it is wanted, has everything; after `close`."""
        return self.mlflow is None or self.mlflow.is_whole

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of one optimizer step."""
        self.jsonl.log(values, step)

    def event(self, kind: str, **fields: object) -> None:
        """Record something that happened; in MLflow it is the tag `event.<kind>`."""
        self.jsonl.event(kind, **fields)

    def position(self) -> dict[str, int | str]:
        """See `JsonlLog.position`."""
        return self.jsonl.position()

    def resume(self, position: Mapping[str, int | str] | None) -> None:
        """See `JsonlLog.resume`."""
        self.jsonl.resume(position)

    def finish_log(self) -> None:
        """Close the logs, before what is made from them; see `JsonlLog.finish`."""
        self.jsonl.finish()
        if self._samples:
            self._samples.finish()

    def tag(self, name: str, value: str) -> None:
        """Set a tag of the MLflow run."""
        self._tags[name] = value
        if self.mlflow:
            self.mlflow.tag(name, value)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a file, or of a folder's files, with the MLflow run."""
        self._artifacts.append((path, folder))
        if self.mlflow:
            self.mlflow.artifact(path, folder)

    def run_id(self, wait_seconds: float = 30.0) -> str | None:
        """The MLflow run's id; None without MLflow, or when it could not be made in time."""
        return self.mlflow.wait_for_run(wait_seconds) if self.mlflow else None

    def close(self, status: Status = "FINISHED") -> str | None:
        """End the run.

        What MLflow lacks then stays in the training's folder, and how to send it is said.

        Returns:
            The run's MLflow id, None if there is none.
        """
        self.jsonl.close()
        if self.mlflow is None:
            return None
        if status == "FINISHED":
            # Values that the disk did not take.  Not before: a training that goes on logs them
            # again, at another time.
            for entry in self.jsonl.unwritten():
                for name, value, time_ms, step in points_of(entry):
                    self.mlflow.log({name: value}, step, time_ms)
        run_id = self.mlflow.close(status)
        if not self.mlflow.is_whole and self._training:
            self._keep(status, self._training)
        return run_id

    def _keep(self, status: Status, training: Training) -> None:
        key = short_key(training.description.params[KEY])
        try:
            kept.keep_end(training, status, self._tags, self._artifacts)
        except OSError as error:
            self.jsonl.say(f"{training.folder}: cannot be written ({error.strerror})")
            return
        way = f"`runkey replay {key}` sends the rest from {training.folder}"
        goes_on = "" if status == "FINISHED" else ", or training does when it goes on"
        self.jsonl.say(f"MLflow: {way}{goes_on}")


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
    """Begin to record a training, or go on, as `params.runtime` says.

    Args:
        params: the resolved parameters.
        root: the workspace.
        folder: of the training, see `paths.training_folder`; a log and a run that it holds are
            gone on with.
        key: the recipe key.
        parts: its parts by name.
        tags: further facts for MLflow, such as the device.
        counts: what the data set holds, such as {"train_images": 400}.
        say: told about failures, in one line each.
        name: of the run; None: what differs from the committed parameters.
        changed: see `MlflowTracker`.
        supersedes: see `Training`.
    """
    if not params.runtime.mlflow:
        return RunTracker(JsonlLog(folder / TRAIN_LOG.name, say, shown=root / TRAIN_LOG), None)
    description = describe_run(params, root, key=key, parts=parts, tags=tags, counts=counts)
    if name is not None:
        description = replace(description, name=name)
    training = Training(params.runtime.experiment, description, folder, (), tuple(supersedes))
    seconds = params.runtime.system_metrics_seconds
    return begin_run(locate_store(), training, root, say, changed, system_seconds=seconds)


def begin_run(
    store: Store,
    training: Training,
    root: Path,
    say: Callable[[str], None],
    changed: Callable[[LoggedRun], None] = lambda _: None,
    *,
    system_seconds: float = 0.0,
    pace: Pace | None = None,
) -> RunTracker:
    """Begin to record a training in a store, or go on.

    Args:
        store: where to.
        training: with a folder; its logs are added here.
        root: the workspace, where the logs are shown.
        say: told about failures, in one line each.
        changed: see `MlflowTracker`.
        system_seconds: between samples of the machine; 0: none.
        pace: see `MlflowTracker`.
    """
    folder = training.folder
    assert folder
    log = JsonlLog(folder / TRAIN_LOG.name, say, shown=root / TRAIN_LOG)
    logs, samples = [log.path], None
    if system_seconds:
        sampled = JsonlLog(folder / SAMPLES.name, _not_twice, shown=root / SAMPLES)
        logs.append(sampled.path)
        samples = SampleLog(sampled, system_seconds)
    training = replace(training, logs=tuple(logs))
    try:
        kept.keep_training(training)
    except OSError as error:
        say(f"{folder}: cannot be written ({error.strerror})")
    mlflow = MlflowTracker(
        store, training, say=say, changed=changed, samples=samples, pace=pace or Pace()
    )
    return RunTracker(log, mlflow, training, samples)


def _not_twice(line: str) -> None:
    """What the disk does to the samples it does to the training's log, which says so."""


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
    return MlflowTracker(locate_store(), run_id, say=say, changed=changed)
