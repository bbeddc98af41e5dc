"""Record one run: its log on disk, and the MLflow run that a background thread writes from it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

from runkey import paths
from runkey.identity.key import short_key
from runkey.identity.record import KEY, LoggedRun
from runkey.tracking import replay
from runkey.tracking.log import JsonlLog
from runkey.tracking.store import Store, in_one_line
from runkey.tracking.sync import RunSender, Status, TrainingRun

logger = logging.getLogger(__name__)

SAMPLES = paths.LOGS / replay.SAMPLES
"""System metrics: CPU, memory and GPU."""
_CLOSE_ATTEMPTS = 3


class SystemSampler:
    """Samples CPU, memory and GPU into a log. One thread samples, another may finish.

    MLflow's own SystemMetricsMonitor writes to the server only, so that the log and the plot made
    from it would lack the samples, and ends at the first failed request. Its monitors are used.
    """

    def __init__(self, log: JsonlLog, interval_seconds: float) -> None:
        """Prepare; the first sample is taken one interval after the first call of `sample`."""
        self.interval_seconds = interval_seconds
        self._log = log
        self._lock = Lock()
        self._finished = False
        self._monitors: list[Any] = []
        self._last_seconds = 0.0

    def sample(self, started_ms: int) -> None:
        """Take a sample if one is due; its step is the training's age in whole seconds.

        Of several samples in one second MLflow gets the first.
        """
        # Imported here: commands that only read import this module and count in milliseconds.
        import psutil

        with self._lock:
            if self._finished:
                return
            if not self._monitors:
                self._monitors = _open_monitors()
                self._last_seconds = time.monotonic()
            if time.monotonic() < self._last_seconds + self.interval_seconds:
                return
            self._last_seconds = time.monotonic()
            values = {"system/process_memory_megabytes": psutil.Process().memory_info().rss / 1e6}
            for monitor in self._monitors:
                monitor.collect_metrics()
                values |= {f"system/{k}": float(v) for k, v in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
            age_ms = time.time_ns() // 1_000_000 - started_ms
            self._log.log(values, max(age_ms, 0) // 1000)

    def finish(self) -> None:
        """Take no more samples; see `JsonlLog.finish`."""
        with self._lock:
            self._finished = True
            self._log.finish()


def _open_monitors() -> list[Any]:
    """Open MLflow's monitors of CPU and memory, and of GPUs (which raises without one)."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    monitors: list[Any] = [CPUMonitor()]  # type: ignore[no-untyped-call]
    with suppress(ImportError, RuntimeError):
        monitors.append(GPUMonitor())  # type: ignore[no-untyped-call]
    return monitors


@dataclass(frozen=True, slots=True)
class Pace:
    """How often the thread sends, and how long `close` waits; in seconds."""

    flush_seconds: float = 5.0
    """Longest time that a value waits."""
    retry_seconds: float = 15.0
    """Pause after a failure."""
    close_seconds: float = 120.0
    """How long `close` waits for an answer of MLflow; it gives up after three failures."""
    killed_seconds: float = 10.0
    """The same when training was interrupted, perhaps by a scheduler that kills soon, and when the
    last call to MLflow failed: a silent server takes 20 s for each."""


class TrackedRun:
    """A run that is being recorded. Nothing raises; only `run_id` and `close` wait, bounded."""

    def __init__(
        self,
        jsonl: JsonlLog | None,
        sender: RunSender | None,
        *,
        sampler: SystemSampler | None = None,
        pace: Pace = Pace(),
    ) -> None:
        """Start the thread that sends, and samples the system once the run exists.

        Without a log values go straight to MLflow; without a sender the log is all.
        """
        self.jsonl = jsonl
        self._sender, self._sampler, self._pace = sender, sampler, pace
        self._status: Status = "FINISHED"
        self._error: str | None = None
        self._failed = 0.0
        self._wake, self._closing = Event(), Event()
        self._thread = Thread(target=self._work, args=(sender,), name="mlflow", daemon=True)
        if sender:
            self._thread.start()

    @property
    def is_whole(self) -> bool:
        """Whether MLflow, if it is wanted, has everything; valid after `close`."""
        return self._sender is None or self._sender.ended

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics."""
        if self.jsonl:
            self.jsonl.log(values, step)
        elif self._sender:
            self._sender.entries.append({"time": time.time(), "step": step, "values": values})

    def log_again(self, values: Mapping[str, float]) -> None:
        """Record metrics of a finished run, behind earlier values; equal ones are not repeated."""
        if self._sender:
            entry = {"time": time.time(), "step": None, "values": dict(values)}
            self._sender.entries.append(entry)

    def tag(self, name: str, value: str) -> None:
        """Set a tag of the MLflow run."""
        if self._sender:
            self._sender.tags.append((name, value))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file or a folder's files, there until `close`, to `folder` of the artifacts."""
        if self._sender:
            self._sender.artifacts.append((path, folder))

    def run_id(self, wait_seconds: float = 30.0) -> str | None:
        """Return the MLflow run's id; None without MLflow, or if it was not made in time.

        It does not wait for an MLflow that failed.
        """
        if self._sender is None:
            return None
        if not self._sender.run_id and not self._closing.is_set():
            self._wake.set()
            end = time.monotonic() + wait_seconds
            while not (self._error or self._sender.created.wait(0.1)) and time.monotonic() < end:
                pass
        return self._sender.run_id or None

    def finish_logs(self) -> None:
        """Close the logs, before plots are made from them; see `JsonlLog.finish`."""
        for log in (self.jsonl, self._sampler):
            if log:
                log.finish()

    def close(self, status: Status = "FINISHED") -> str | None:
        """Send what is left, end the run and return its id, None if there is none.

        What of a training could not be sent stays in its folder; a warning names the command that
        sends it.
        """
        if self.jsonl:
            self.jsonl.close()
        if self._sender is None:
            return None
        if status == "FINISHED" and self.jsonl:
            # If the training is resumed it logs them again, at another time.
            self._sender.entries.extend(self.jsonl.unwritten())
        self._end(self._sender, status)
        if not self._sender.ended:
            self._save(self._sender, status)
        return self._sender.run_id or None

    def _end(self, sender: RunSender, status: Status) -> None:
        """Wait for the thread to end the run, as long as MLflow answers."""
        self._status, began = status, time.monotonic()
        self._closing.set()
        self._wake.set()
        while self._thread.is_alive():
            is_short = status == "KILLED" or sender.last_answer < self._failed
            patience = self._pace.killed_seconds if is_short else self._pace.close_seconds
            if time.monotonic() - max(began, sender.last_answer) > patience:
                return
            self._thread.join(0.1)

    def _save(self, sender: RunSender, status: Status) -> None:
        """Say what MLflow lacks, and keep it for `runkey replay`."""
        if sender.run_id:
            missing = sender.missing()
            lack = f"lacks {missing}" if missing else f"is whole but not marked {status}"
            text = f"run {sender.run_id} {lack}"
        else:
            text = "no run was recorded"
        logger.warning(f"MLflow: {text} ({self._error or 'no answer in time'})")
        if (training := sender.training) is None:
            return
        try:
            replay.save_end(training.folder, status, dict(sender.tags), sender.artifacts)
        except OSError as error:
            logger.warning(f"{training.folder}: cannot be written ({error.strerror})")
            return
        key = short_key(training.description.params[KEY])
        resume = "" if status == "FINISHED" else ", or training does when it goes on"
        logger.warning(
            f"MLflow: `runkey replay {key}` sends the rest from {training.folder}{resume}"
        )

    def _work(self, sender: RunSender) -> None:
        """Send in the thread, until the run has ended."""
        failures_closing = 0
        while failures_closing < _CLOSE_ATTEMPTS:
            closing = self._closing.is_set()
            try:
                sender.update()
                if closing:
                    sender.end(self._status)
                    return
                if self._error:
                    logger.info("MLflow: recording again")
                    self._error = None
                pause = self._pace.flush_seconds
            # Whatever MLflow, its database driver or the network raises must not reach training.
            except Exception as error:  # noqa: BLE001
                is_first, self._error = self._error is None, in_one_line(error)
                self._failed = time.monotonic()
                if is_first:
                    later = "values are kept and sent later" if sender.training else "tried again"
                    logger.warning(f"MLflow: {self._error}; the work goes on, {later}")
                pause = self._pace.retry_seconds
                failures_closing += closing
            if closing:
                time.sleep(min(1.0, pause))
            else:
                self._sleep(sender, pause)

    def _sleep(self, sender: RunSender, seconds: float) -> None:
        """Wait until woken or until `seconds` have passed; sample the system meanwhile."""
        end = time.monotonic() + seconds
        while not self._wake.is_set() and (left := end - time.monotonic()) > 0:
            try:
                if self._sampler and sender.run_id:
                    self._sampler.sample(sender.started_ms)
            # psutil and the GPU driver raise their own kinds; samples are not worth a run.
            except Exception as error:  # noqa: BLE001
                logger.warning(f"MLflow: no more system metrics ({in_one_line(error)})")
                self._sampler = None
            self._wake.wait(min(left, self._sampler.interval_seconds) if self._sampler else left)
        self._wake.clear()


def open_run(
    store: Store | None,
    training: TrainingRun,
    root: Path,
    *,
    on_change: Callable[[LoggedRun], None] = lambda _: None,
    system_seconds: float = 0.0,
    pace: Pace = Pace(),
) -> TrackedRun:
    """Start to record a training, or continue with the log and the run that its folder holds.

    Without a store the log is all. The logs are shown in the workspace `root`; `system_seconds` lie
    between samples of system metrics (0: none). For `on_change` see `RunSender`.
    """
    folder = training.folder
    log = JsonlLog(folder / paths.TRAIN_LOG.name, shown=root / paths.TRAIN_LOG)
    if store is None:
        return TrackedRun(log, None)
    logs, sampler = [log.path], None
    if system_seconds:
        samples = JsonlLog(folder / SAMPLES.name, shown=root / SAMPLES, quiet=True)
        logs.append(samples.path)
        sampler = SystemSampler(samples, system_seconds)
    training = replace(training, logs=tuple(logs))
    try:
        replay.save_description(training)
    except OSError as error:
        logger.warning(f"{folder}: cannot be written ({error.strerror})")
    sender = RunSender(store, training, on_change=on_change)
    return TrackedRun(log, sender, sampler=sampler, pace=pace)
