"""One run's tracker: the JSONL log always, MLflow where it is wanted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from runkey import paths
from runkey.identity.key import short_key
from runkey.identity.record import KEY, LoggedRun
from runkey.tracking import replay
from runkey.tracking.describe import SampleLog, describe_run
from runkey.tracking.log import JsonlLog
from runkey.tracking.store import Store, in_one_line, locate_store
from runkey.tracking.sync import Backlog, RunSync, Status, Training, points_of

if TYPE_CHECKING:
    from runkey.params import Params


# An MLflow run, written from a background thread that training never waits for.


@dataclass(frozen=True, slots=True)
class Pace:
    """How often the thread works, in seconds and points."""

    flush_points: int = 500
    """Values in memory after which the thread is woken."""
    flush_seconds: float = 5.0
    """Longest time that a value waits."""
    retry_seconds: float = 15.0
    """Pause after a failure."""
    close_seconds: float = 120.0
    """How long `close` waits without anything having been written."""
    killed_seconds: float = 10.0
    """The same when training was interrupted, by a scheduler perhaps that soon kills."""
    close_attempts: int = 3
    """Failures after which `close` gives up."""


class MlflowTracker:
    """One run in MLflow.

    Nothing raises, and nothing waits but `wait_for_run` and `close`, for a bounded time.
    """

    def __init__(
        self,
        store: Store,
        target: Training | str,
        *,
        say: Callable[[str], None],
        changed: Callable[[LoggedRun], None] = lambda _: None,
        samples: SampleLog | None = None,
        pace: Pace = Pace(),
    ) -> None:
        """Start the thread.

        Args:
            store: where to.
            target: a training, or the id of a run to add to, whose status is left alone.
            say: told about failures, in one line each.
            changed: told, in the thread, what MLflow has of a run when it begins, was interrupted,
                or ends.
            samples: takes samples of the machine in this thread, as soon as there is a run.
            pace: how often to write.
        """
        self._say = say
        self._pace = pace
        self._samples = samples
        self._backlog = Backlog()
        self._sync = RunSync(
            store, target, self._backlog, say=say, changed=changed, done=self._step_done
        )
        self._status: Status = "FINISHED"
        self._error: str | None = None
        self._progress = time.monotonic()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def is_whole(self) -> bool:
        """Whether MLflow has everything, and the run's end; after `close`."""
        return self._sync.ended

    def log(self, values: Mapping[str, float], step: int, time_ms: int | None = None) -> None:
        """Record values that no log has; `time_ms` is milliseconds since 1970, None: now."""
        if self._backlog.add_metrics(values, step, time_ms or _now_ms()) >= self._pace.flush_points:
            self._wake.set()

    def tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        self._backlog.add_tag(name, value)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file, or a folder's files, to `folder` of the run's artifacts.

        The path must stay until `close`.
        """
        self._backlog.add_artifact(path, folder)

    def wait_for_run(self, seconds: float) -> str | None:
        """The run's id, waiting for it at most that long; None if there is none yet."""
        if self._sync.run_id is None and not self._closing.is_set():
            self._wake.set()
            self._sync.made.wait(seconds)
        return self._sync.run_id

    def close(self, status: Status = "FINISHED") -> str | None:
        """Write what is left and end the run; say what could not be written.

        Returns:
            The run's id, None if no run could be made.
        """
        self._status = status
        self._progress = time.monotonic()
        self._closing.set()
        self._wake.set()
        patience = self._pace.killed_seconds if status == "KILLED" else self._pace.close_seconds
        while self._thread.is_alive() and time.monotonic() - self._progress < patience:
            self._thread.join(0.1)
        run_id, why = self._sync.run_id, self._error or "no answer in time"
        if run_id is None:
            self._say(f"MLflow: no run was recorded ({why})")
        elif not self._sync.ended:
            missing = self._sync.missing()
            lack = f"lacks {missing}" if missing else f"is whole but not marked {status}"
            self._say(f"MLflow: run {run_id} {lack} ({why})")
        return run_id

    # What follows runs in the thread.

    def _work(self) -> None:
        failures_closing = 0
        while failures_closing < self._pace.close_attempts:
            closing = self._closing.is_set()
            try:
                self._sync.update()
                if closing:
                    self._sync.end(self._status)
                    return
                self._recovered()
                pause = self._pace.flush_seconds
            # Whatever MLflow, its database driver or the network raises must not reach training.
            except Exception as error:  # noqa: BLE001
                self._failed(error)
                pause = self._pace.retry_seconds
                failures_closing += closing
            if closing:
                time.sleep(min(1.0, pause))
            else:
                self._sleep(pause)

    def _sleep(self, seconds: float) -> None:
        """Until woken, or `seconds` have passed; the system is sampled meanwhile."""
        end = time.monotonic() + seconds
        while not self._wake.is_set() and (left := end - time.monotonic()) > 0:
            if self._samples and self._sync.run_id:
                self._sample(self._samples)
            self._wake.wait(min(left, self._samples.interval_seconds) if self._samples else left)
        self._wake.clear()

    def _sample(self, samples: SampleLog) -> None:
        try:
            samples.take(self._sync.started_ms)
        # psutil and the GPU driver raise their own kinds; samples are not worth a run.
        except Exception as error:  # noqa: BLE001
            self._say(f"MLflow: no more system metrics ({in_one_line(error)})")
            self._samples = None

    def _step_done(self) -> None:
        self._progress = time.monotonic()

    def _failed(self, error: Exception) -> None:
        first, self._error = self._error is None, in_one_line(error)
        if first:
            self._say(f"MLflow: {self._error}; the work goes on, values are kept and sent later")

    def _recovered(self) -> None:
        if self._error:
            self._say("MLflow: recording again")
            self._error = None


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


TRAIN_LOG = paths.LOGS / replay.LOG
SAMPLES = paths.LOGS / replay.SAMPLES
"""Samples of the machine: see `runkey.tracking.describe`."""


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
            replay.keep_end(training, status, self._tags, self._artifacts)
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
        replay.keep_training(training)
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
