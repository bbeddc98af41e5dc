"""What two trainings must have in common, however often one of them was killed."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from runkey.plots.curves import write_plot_tables
from runkey.training.checkpoint import read_file
from tests.support.points import doubled, doubled_lines, points_of_log, read_jsonl

_WEIGHTS = "model/weights.safetensors"
_OF_THE_DAY = ("second", "wait")
"""In names of values that no two trainings share."""


def digests(root: Path, final: Path) -> dict[str, str]:
    """sha256 by name: of the last checkpoint, of the stage's outputs, of the log.

    Args:
        root: the project.
        final: the last checkpoint.
    """
    facts, tensors, _ = read_file(final)
    found = {part: _sha256(_bytes(state)) for part, state in tensors["parts"].items()}
    found["state"] = _sha256(_bytes(_without_clock(tensors["state"])))
    found["best weights"] = str(facts["best_hash"])
    with tempfile.TemporaryDirectory() as folder:
        steps, epochs, _ = write_plot_tables(root / "logs/train.jsonl", Path(folder))
        for name, path in ((_WEIGHTS, root / _WEIGHTS), (steps.name, steps), (epochs.name, epochs)):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    found["log"] = _sha256([json.dumps(log_of(root)).encode()])
    return found


def log_of(root: Path) -> list[Any]:
    """The log without times, paces, and events that tell of the day's machine."""
    entries = read_jsonl(root / "logs/train.jsonl")
    return [
        _without_clock({name: value for name, value in entry.items() if name != "time"})
        for entry in entries
        if not entry.get("event", "").startswith(("resumed", "hint"))
    ]


def mlflow_faults(root: Path, store: Path) -> list[str]:
    """What MLflow lacks, or has too often, of what the log has; empty: nothing.

    Read past MLflow, whose import takes longer than the rest.
    """
    log = root / "logs/train.jsonl"
    with closing(sqlite3.connect(store / "mlflow.db")) as database:
        runs = database.execute("SELECT run_uuid, status FROM runs").fetchall()
        recorded = database.execute(
            "SELECT key, step, timestamp, value FROM metrics"
            " WHERE key LIKE 'train/%' OR key LIKE 'val/%'"
        ).fetchall()
    faults = [] if [status for _, status in runs] == ["FINISHED"] else [f"runs: {runs}"]
    faults += [f"the log has twice {line}" for line in doubled_lines(log)]
    expected = points_of_log(log)
    found = Counter((name, step, at, float(value).hex()) for name, step, at, value in recorded)
    faults += [f"MLflow has twice {place}" for place in doubled(found.elements())]
    for what, points in (("lacks", expected - found), ("has too many", found - expected)):
        if points:
            faults.append(f"MLflow {what}: {points.total()} points, such as {next(iter(points))}")
    return faults


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not any(word in k for word in _OF_THE_DAY)}
        return {k: _without_clock(v) for k, v in kept.items()}
    return [_without_clock(v) for v in value] if isinstance(value, list) else value


def _bytes(tree: Any) -> Iterator[bytes]:
    """All that is in nested dicts, lists and tensors, each with its place."""
    if isinstance(tree, torch.Tensor):
        yield f"{tree.dtype} {tuple(tree.shape)}".encode()
        yield tree.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(tree, dict):
        for key in sorted(tree, key=str):
            yield repr(key).encode()
            yield from _bytes(tree[key])
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield str(number).encode()
            yield from _bytes(value)
    else:
        yield repr(tree).encode()


def _sha256(pieces: Any) -> str:
    total = hashlib.sha256()
    for piece in pieces:
        total.update(len(piece).to_bytes(8))
        total.update(piece)
    return total.hexdigest()
