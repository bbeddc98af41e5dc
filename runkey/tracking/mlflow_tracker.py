"""An MLflow run, written from a background thread that training never waits for.

Importing mlflow, opening the database and creating the run take 10 s and can fail, now or later:
all of it happens in the thread, everything is kept until it has been written, and a failure is
said once, retried, and summed up at the end.  The JSONL log has every value whatever happens here.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runkey.tracking.backlog import Backlog
from runkey.tracking.describe import RunDescription
from runkey.tracking.store import Store, experiment_id, open_client
from runkey.tracking.system import SystemSampler

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow's limits on one request and on one value.
_BATCH_METRICS = 1000
_BATCH_PARAMS = 100
_VALUE_CHARACTERS = 6000
_TAG_CHARACTERS = 5000


@dataclass(frozen=True, slots=True)
class Pace:
    """How often the thread works, in seconds and points."""

    flush_points: int = 500
    """Values after which the thread is woken."""
    flush_seconds: float = 5.0
    """Longest time that a value waits."""
    retry_seconds: float = 15.0
    """Pause after a failure."""
    close_seconds: float = 120.0
    """How long `close` waits without anything having been written."""
    close_attempts: int = 3
    """Failures after which `close` gives up."""
    system_seconds: float = 5.0
    """Between samples of CPU, memory and GPU; 0: none."""


class MlflowTracker:
    """One run in MLflow.  Implements training's `Tracker`.

    Nothing raises, and nothing waits but `wait_for_run` and `close`, for a bounded time.
    """

    def __init__(
        self,
        store: Store,
        experiment: str,
        description: RunDescription | None,
        *,
        say: Callable[[str], None],
        run_id: str | None = None,
        pace: Pace = Pace(),
    ) -> None:
        """Start the thread.

        Args:
            store: where to.
            experiment: name of the MLflow experiment.
            description: name, params, tags and data set of a new run; None with `run_id`.
            say: told about failures, in one line each.
            run_id: an existing run to add to; its status is left alone.
            pace: how often to write.
        """
        if (description is None) == (run_id is None):
            raise ValueError("give a description (new run) or a run_id (existing run)")
        self._store = store
        self._experiment = experiment
        self._description = description
        self._say = say
        self._pace = pace
        self._existing = run_id is not None
        self._run_id = run_id
        self._described = self._existing
        self._client: MlflowClient | None = None
        self._backlog = Backlog()
        self._sampler: SystemSampler | None = None
        self._status: Status | None = None
        self._ended = False
        self._error: str | None = None
        self._progress = time.monotonic()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._made = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of one step."""
        if self._backlog.add_metrics(values, step, _now_ms()) >= self._pace.flush_points:
            self._wake.set()

    def event(self, kind: str, **fields: object) -> None:
        """Record something that happened, as the tag `event.<kind>` (the last one stays)."""
        self._backlog.add_tag(f"event.{kind}", json.dumps(fields, default=str))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file, or a folder's files, to `folder` of the run's artifacts.

        The path must stay until `close`.
        """
        self._backlog.add_artifact(path, folder)

    def wait_for_run(self, seconds: float) -> str | None:
        """The run's id, waiting for it at most that long; None if there is none yet."""
        if self._run_id is None and not self._closing.is_set():
            self._wake.set()
            self._made.wait(seconds)
        return self._run_id

    def close(self, status: Status = "FINISHED") -> str | None:
        """Write what is left and end the run; say what could not be written.

        Returns:
            The run's id, None if no run could be made.
        """
        self._status = status
        self._progress = time.monotonic()
        self._closing.set()
        self._wake.set()
        while self._thread.is_alive() and self._patient():
            self._thread.join(0.1)
        why = self._error or "no answer in time"
        if self._run_id is None:
            self._say(f"MLflow: no run was recorded ({why})")
        elif missing := self._backlog.missing():
            self._say(f"MLflow: run {self._run_id} lacks {missing} ({why})")
        elif not self._ended:
            self._say(f"MLflow: run {self._run_id} is whole but not marked {status} ({why})")
        return self._run_id

    def _patient(self) -> bool:
        return time.monotonic() - self._progress < self._pace.close_seconds

    # What follows runs in the thread.

    def _work(self) -> None:
        failures_closing = 0
        while failures_closing < self._pace.close_attempts:
            closing = self._closing.is_set()
            try:
                self._write()
                if closing:
                    self._end()
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
        interval = self._pace.system_seconds
        while not self._wake.is_set() and (left := end - time.monotonic()) > 0:
            if self._sampler and self._sampler.due(interval):
                self._sample(self._sampler)
            self._wake.wait(min(left, interval) if self._sampler else left)
        self._wake.clear()

    def _sample(self, sampler: SystemSampler) -> None:
        try:
            self._backlog.add_metrics(sampler.sample(), sampler.count, _now_ms())
        # psutil and the GPU driver raise their own kinds; samples are not worth a run.
        except Exception as error:  # noqa: BLE001
            self._say(f"MLflow: no more system metrics ({_one_line(error)})")
            self._sampler = None

    def _write(self) -> None:
        """Bring the run up to date: connection, run, description, values, tags, artifacts."""
        if self._client is None:
            self._client = open_client(self._store)
            self._step_done()
            if self._pace.system_seconds and not self._existing:
                self._sampler = SystemSampler()
        client = self._client
        if self._run_id is None:
            self._run_id = self._create(client)
            self._step_done()
        self._made.set()
        if not self._described and self._description:
            self._describe(client, self._run_id, self._description)
            self._described = True
            self._step_done()
        self._write_metrics(client, self._run_id)
        self._write_tags(client, self._run_id)
        self._write_artifacts(client, self._run_id)

    def _create(self, client: MlflowClient) -> str:
        assert self._description is not None
        experiment = experiment_id(client, self._store, self._experiment)
        tags = {name: value[:_TAG_CHARACTERS] for name, value in self._description.tags.items()}
        run = client.create_run(
            experiment,
            run_name=self._description.name,
            tags=tags,
            start_time=self._description.started_ms,
        )
        return str(run.info.run_id)

    def _describe(self, client: MlflowClient, run_id: str, description: RunDescription) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        params = [
            Param(_legal(name), value[:_VALUE_CHARACTERS])
            for name, value in description.params.items()
        ]
        for start in range(0, len(params), _BATCH_PARAMS):
            client.log_batch(run_id, params=params[start : start + _BATCH_PARAMS])
        if description.dataset:
            data = description.dataset
            entity = Dataset(data.name, data.digest, "local", data.source, None, data.profile)
            context = InputTag("mlflow.data.context", "training")
            client.log_inputs(run_id, [DatasetInput(entity, [context])])

    def _write_metrics(self, client: MlflowClient, run_id: str) -> None:
        from mlflow.entities import Metric

        while batch := self._backlog.metrics(_BATCH_METRICS):
            metrics = [Metric(_legal(m.name), m.value, m.time_ms, m.step) for m in batch]
            # Sent again after a lost answer, the same values are one entry in MLflow.
            client.log_batch(run_id, metrics=metrics)
            self._backlog.metrics_done(len(batch))
            self._step_done()

    def _write_tags(self, client: MlflowClient, run_id: str) -> None:
        for name, value in self._backlog.tags().items():
            client.set_tag(run_id, _legal(name), value[:_TAG_CHARACTERS])
            self._backlog.tag_done(name, value)
            self._step_done()

    def _write_artifacts(self, client: MlflowClient, run_id: str) -> None:
        while item := self._backlog.artifact():
            path, folder = item
            if not path.exists():
                self._say(f"MLflow: {path} is not there and was not kept with the run")
            elif path.is_dir():
                client.log_artifacts(run_id, str(path), folder or None)
            else:
                client.log_artifact(run_id, str(path), folder or None)
            self._backlog.artifact_done()
            self._step_done()

    def _end(self) -> None:
        if self._client and self._run_id and not self._existing:
            self._client.set_terminated(self._run_id, self._status)
        self._ended = True

    def _step_done(self) -> None:
        self._progress = time.monotonic()

    def _failed(self, error: Exception) -> None:
        first, self._error = self._error is None, _one_line(error)
        if first:
            self._say(f"MLflow: {self._error}; the work goes on, values are kept and sent later")

    def _recovered(self) -> None:
        if self._error:
            self._say("MLflow: recording again")
            self._error = None


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _legal(name: str) -> str:
    """`name` with what MLflow refuses in names (brackets of a class name, say) replaced by _."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def _one_line(error: Any, characters: int = 160) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= characters else text[: characters - 1] + "…"
