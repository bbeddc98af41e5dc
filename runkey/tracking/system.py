"""Samples of the machine while a run goes on: MLflow's own monitors, read from our thread.

MLflow would start a second thread that logs by itself.  Here samples go to a log of their own,
`system.jsonl` beside the training's, from which MLflow gets them like all else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from runkey.tracking.jsonl import JsonlLog


class _Monitor(Protocol):
    """MLflow's BaseMetricsMonitor, which has no types."""

    def collect_metrics(self) -> None: ...

    def aggregate_metrics(self) -> dict[str, float]: ...

    def clear_metrics(self) -> None: ...


class SampleLog:
    """Samples on their way to a log; may be closed while another thread takes them."""

    def __init__(self, log: JsonlLog, interval_seconds: float) -> None:
        """Args: log: where to.  interval_seconds: between two samples."""
        self.interval_seconds = interval_seconds
        self._log = log
        self._lock = threading.Lock()
        self._closed = False
        self._sampler: SystemSampler | None = None

    def take(self, started_ms: int) -> None:
        """Take a sample if it is time; its step is the training's age in whole seconds.

        So it goes on rising in a training that goes on after an interruption.  Of several samples
        in one second MLflow gets the first, the log has all.

        Args:
            started_ms: when the training began, in milliseconds since 1970.
        """
        with self._lock:
            if self._closed:
                return
            if self._sampler is None:
                self._sampler = SystemSampler()
            if self._sampler.due(self.interval_seconds):
                age_ms = time.time_ns() // 1_000_000 - started_ms
                self._log.log(self._sampler.sample(), max(age_ms, 0) // 1000)

    def finish(self) -> None:
        """Take no more; see `JsonlLog.finish`."""
        with self._lock:
            self._closed = True
            self._log.finish()


class SystemSampler:
    """Reads CPU and memory of the machine, this process's memory, and GPUs where there are any."""

    def __init__(self) -> None:
        # Here, for commands that only read import this package and count in milliseconds.
        import psutil

        self._monitors = _monitors()
        self._process = psutil.Process()
        self._last_seconds = time.monotonic()

    def due(self, interval_seconds: float) -> bool:
        """Whether the last sample is at least that old."""
        return time.monotonic() - self._last_seconds >= interval_seconds

    def sample(self) -> dict[str, float]:
        """One sample, under the names that MLflow's UI shows as system metrics."""
        self._last_seconds = time.monotonic()
        values = {"system/process_memory_megabytes": self._process.memory_info().rss / 1e6}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {f"system/{k}": float(v) for k, v in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values


def _monitors() -> list[_Monitor]:
    """MLflow's monitors of CPU and memory, and of GPUs (whose constructor raises without one)."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    cpu: Callable[[], _Monitor] = CPUMonitor
    gpu: Callable[[], _Monitor] = GPUMonitor
    try:
        return [cpu(), gpu()]
    except (ImportError, RuntimeError):
        return [cpu()]
