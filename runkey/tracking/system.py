"""Samples of the machine while a run goes on: MLflow's own monitors, read from our thread.

MLflow would start a second thread that logs by itself; one writer with one backlog is what can be
retried as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class _Monitor(Protocol):
    """MLflow's BaseMetricsMonitor, which has no types."""

    def collect_metrics(self) -> None: ...

    def aggregate_metrics(self) -> dict[str, float]: ...

    def clear_metrics(self) -> None: ...


class SystemSampler:
    """Reads CPU and memory of the machine, this process's memory, and GPUs where there are any."""

    def __init__(self) -> None:
        # Here, for commands that only read import this package and count in milliseconds.
        import psutil

        self._monitors = _monitors()
        self._process = psutil.Process()
        self._last_seconds = time.monotonic()
        self.count = 0
        """Samples taken."""

    def due(self, interval_seconds: float) -> bool:
        """Whether the last sample is at least that old."""
        return time.monotonic() - self._last_seconds >= interval_seconds

    def sample(self) -> dict[str, float]:
        """One sample, under the names that MLflow's UI shows as system metrics."""
        self._last_seconds = time.monotonic()
        self.count += 1
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
