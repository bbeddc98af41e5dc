"""logs/system.jsonl: what the machine did while a training ran, sampled every few seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runkey.plots.log import Point, entries, number

SAMPLES = "system.jsonl"
"""Beside the training's log."""


def read_samples(path: Path) -> list[Point]:
    """The samples of the machine, in the order of time; `step` counts them.

    A training that records no MLflow run samples nothing and leaves no file: no samples.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [
        Point(step, number(entry["time"]), {n: number(v) for n, v in entry["values"].items()})
        for step, entry in enumerate(entries(lines), start=1)
        if isinstance(entry.get("values"), dict) and "time" in entry
    ]


def gpu_names(samples: Sequence[Point], ending: str) -> list[str]:
    """Names of the metrics of each GPU that end so, such as `system/gpu_0_utilization_...`."""
    names = {name for sample in samples for name in sample.values}
    return sorted(n for n in names if n.startswith("system/gpu_") and n.endswith(ending))
