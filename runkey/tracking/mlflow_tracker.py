"""An MLflow run, written from a background thread that training never waits for.

Importing mlflow, opening the database and creating the run take 10 s and can fail, now or later:
all of it happens in the thread, everything is kept until it has been written, and a failure is
said once, retried, and summed up at the end.  The JSONL log has every value whatever happens here.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runkey.identity.record import LoggedRun
from runkey.tracking.backlog import Backlog
from runkey.tracking.describe import RunDescription
from runkey.tracking.store import Store
from runkey.tracking.system import SystemSampler
from runkey.tracking.writer import RunWriter, Status


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
        changed: Callable[[LoggedRun], None] = lambda _: None,
        supersedes: Iterable[str] = (),
        pace: Pace = Pace(),
    ) -> None:
        """Start the thread.

        Args:
            store: where to.
            experiment: name of the MLflow experiment.
            description: name, params, tags and data set of a new run; None with `run_id`.
            say: told about failures, in one line each.
            run_id: an existing run to add to; its status is left alone.
            changed: told, in the thread, what MLflow has of a run when it begins and when it ends.
            supersedes: runs whose processes are dead; marked KILLED.
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
        self._changed = changed
        self._superseded = list(supersedes)
        self._writer: RunWriter | None = None
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

    def log(self, values: Mapping[str, float], step: int, time_ms: int | None = None) -> None:
        """Record the values of one step; `time_ms` is milliseconds since 1970, None: now."""
        if self._backlog.add_metrics(values, step, time_ms or _now_ms()) >= self._pace.flush_points:
            self._wake.set()

    def event(self, kind: str, **fields: object) -> None:
        """Record something that happened, as the tag `event.<kind>` (the last one stays)."""
        self.tag(f"event.{kind}", json.dumps(fields, default=str))

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
        if self._writer is None:
            self._writer = RunWriter(self._store, self._step_done)
            if self._pace.system_seconds and not self._existing:
                self._sampler = SystemSampler()
        if self._run_id is None:
            assert self._description is not None
            self._run_id = self._writer.create(self._experiment, self._description)
        self._made.set()
        if not self._described and self._description:
            self._writer.describe(self._run_id, self._description)
            self._described = True
            self._changed(self._writer.read(self._run_id))
        while self._superseded:
            dead = self._writer.end_dead(self._superseded[-1])
            if dead:
                self._changed(dead)
            self._superseded.pop()
        self._writer.write(self._run_id, self._backlog, self._say)

    def _end(self) -> None:
        if self._writer and self._run_id:
            if not self._existing and self._status:
                self._writer.end(self._run_id, self._status)
            self._changed(self._writer.read(self._run_id))
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


def _one_line(error: Any, characters: int = 160) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= characters else text[: characters - 1] + "…"
