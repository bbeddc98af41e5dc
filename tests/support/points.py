"""A training's points in its log and in its MLflow run, to be compared one by one."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from runkey.tracking.log import Entry, read_log
from runkey.tracking.store import Store, open_client
from runkey.tracking.sync import legal_name

Point = tuple[str, int, int, str]
"""Metric, step, milliseconds since 1970, value to the last bit."""

NOT_LOGGED = ("system/", "eval/")
"""Metrics of a run that no training logs."""


def read_jsonl(path: Path) -> Iterator[Entry]:
    """The entries of a log, without lines that were cut short."""
    return (entry for _, entry in read_log(path))


def points_of_log(path: Path) -> Counter[Point]:
    """The points of a log; of a metric that a step has twice, the first."""
    points: dict[tuple[str, int], Point] = {}
    for entry in read_jsonl(path):
        for name, value in entry.get("values", {}).items():
            place = legal_name(name), entry["step"]
            time_ms = round(entry["time"] * 1000)
            points.setdefault(place, (*place, time_ms, _exactly(float(value))))
    return Counter(points.values())


def doubled_lines(path: Path) -> list[tuple[int, tuple[str, ...]]]:
    """Step and metrics of lines that a log has more than once."""
    lines = Counter(
        (entry["step"], tuple(sorted(entry["values"])))
        for entry in read_jsonl(path)
        if "values" in entry
    )
    return sorted(line for line, count in lines.items() if count > 1)


def points_of_run(store: Store, run_id: str) -> Counter[Point]:
    """How often each point stands in a run, asked for through MLflow's client."""
    client = open_client(store)
    names = [n for n in client.get_run(run_id).data.metrics if not n.startswith(NOT_LOGGED)]
    return Counter(
        (name, m.step, m.timestamp, _exactly(m.value))
        for name in names
        for m in client.get_metric_history(run_id, name)
    )


def doubled(points: Iterable[Point]) -> list[tuple[str, int]]:
    """Metric and step of what is there more than once, whatever its time and value."""
    times = Counter((name, step) for name, step, _, _ in points)
    return sorted(place for place, count in times.items() if count > 1)


def assert_the_same_points(path: Path, store: Store, run_id: str) -> Counter[Point]:
    """Every metric and step exactly once in both, with the same value and time."""
    logged, recorded = points_of_log(path), points_of_run(store, run_id)
    lost, more = logged - recorded, recorded - logged
    assert not lost, f"{len(lost)} points are lost in MLflow, such as {sorted(lost)[:3]}"
    assert not more, f"MLflow has {len(more)} points more, such as {sorted(more)[:3]}"
    assert doubled(recorded.elements()) == []
    assert doubled_lines(path) == []
    return logged


def _exactly(value: float) -> str:
    """The value's bits as text; MLflow has the largest float for infinity."""
    if math.isinf(value):
        value = math.copysign(sys.float_info.max, value)
    return "nan" if math.isnan(value) else value.hex()
