"""An MLflow run, written from a background thread that training never waits for.

Importing mlflow, opening the database and creating the run take 10 s and can fail, now or later:
all of it happens in the thread, everything is kept until it has been written, and a failure is
said once, retried, and summed up at the end.  The JSONL log has every value whatever happens here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from runkey.identity.record import LoggedRun
from runkey.tracking.backlog import Backlog
from runkey.tracking.store import Store, in_one_line
from runkey.tracking.sync import RunSync, Training
from runkey.tracking.system import SampleLog
from runkey.tracking.writer import Status


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
