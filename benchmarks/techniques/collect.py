"""A sweep in two files of benchmarks/results: numbers, and curves for the pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.techniques.outcome import curves, hints, outcome
from benchmarks.techniques.run import REPOSITORY, RESULT
from benchmarks.techniques.variants import BY_NAME
from runkey.plots.curves import write_training_plots

RESULTS = REPOSITORY / "benchmarks" / "results" / "techniques.json"
CURVES = REPOSITORY / "benchmarks" / "results" / "techniques_curves.json"
FOLDER = REPOSITORY / "docs" / "pictures" / "guide"
COPIES = {
    "impatient-0": ("plots/loss_and_ap.png", "early-stopping.png"),
    "checkpointing-0": ("memory/timeline.png", "memory.png"),
    "lr-1-fp16-0": ("plots/loss_and_ap.png", "nan-stopped.png"),
}
"""Pictures of single runs that the guide shows: file of the run, name in `FOLDER`."""


def collect(folders: Sequence[Path]) -> str:
    """Add the runs of folders to both files, and write `COPIES`; later folders win.

    Runs that were collected before stay, as long as there is such a variant.
    A training that ended and whose evaluation did not (its machine went away) counts: its AP is
    that of its best evaluation in training, which is of the same weights and images.  Then
    `machine.json` beside the runs says which machine it was.

    Args:
        folders: each as `run --out` wrote it.

    Returns:
        A line about it.
    """
    rows, lines = _read(RESULTS), _read(CURVES)
    rows = {name: row for name, row in rows.items() if row["variant"] in BY_NAME}
    lines = {name: curve for name, curve in lines.items() if name in rows}
    for folder in folders:
        for run, row in read_runs(folder):
            name = f"{run.name} {row['machine']['cpu'].split()[0]}"
            rows[name] = row
            lines[name] = curves(run)
            if run.name in COPIES:
                source, target = COPIES[run.name]
                if not (run / "plots").exists():  # of a training that gave up
                    write_training_plots(run / "logs" / "train.jsonl", run / "plots")
                shutil.copy(run / source, FOLDER / target)
    _write(RESULTS, rows)
    _write(CURVES, lines)
    return f"{len(rows)} runs in {RESULTS.relative_to(REPOSITORY)}"


def read_runs(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folders in which a training ended, with their numbers."""
    for run in sorted(path for path in folder.iterdir() if path.is_dir()):
        row = _row(run)
        if row is not None:
            yield run, row


def _row(run: Path) -> dict[str, Any] | None:
    path = run / RESULT
    logged = outcome(run)  # anew, for numbers that were thought of after it ran
    if path.exists():
        row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) | logged
    elif logged.get("reason") is None:
        return None  # it was cut off
    else:
        name, _, seed = run.name.rpartition("-")
        facts = {"variant": name, "seed": int(seed), "settings": BY_NAME[name].settings}
        machine = json.loads((run.parent / "machine.json").read_text(encoding="utf-8"))
        row = facts | {"machine": machine, "failed": ""} | logged
        row["AP"] = row["best_AP"]
        row["AP_of"] = "the best evaluation in training"
    row["hints"] = hints(run, row["settings"])
    return row


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    """A line for each run, so that a change of one is a line in a diff."""
    body = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(content[name])}" for name in sorted(content)
    )
    path.write_text("{\n" + body + "\n}\n", encoding="utf-8")
