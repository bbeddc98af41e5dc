"""CSV tables that `dvc plots show` and `dvc plots diff` draw."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from runkey.evaluation.files import read_precision_recall
from runkey.plots.log import Point, read_log

# More rows than pixels across a screen only make the page slow.
MOST_ROWS = 2000

_STEP_COLUMNS = {
    "lr": "train/lr",
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "grad_norm_clipped": "train/grad_norm_clipped",
}
_EPOCH_COLUMNS = {
    "train_loss": "train/epoch_loss",
    "val_loss": "val/loss",
    "AP": "val/AP",
    "AP50": "val/AP50",
}


def write_plot_tables(log: Path, out: Path) -> list[Path]:
    """Write steps.csv and epochs.csv of a training, finished or not.

    Args:
        log: logs/train.jsonl.
        out: the folder; made if it is not there.

    Returns:
        The written files; a value that was not logged is an empty cell.

    Raises:
        DataError: there is no log.
    """
    content = read_log(log)
    every = max(1, -(-len(content.steps) // MOST_ROWS))
    steps = ([p.step, *_cells(p, _STEP_COLUMNS.values())] for p in content.steps[::every])
    epochs = (
        [_epoch(p, number), *_cells(p, _EPOCH_COLUMNS.values())]
        for number, p in enumerate(content.epochs, start=1)
    )
    return [
        _write(out / "steps.csv", ["step", *_STEP_COLUMNS], steps),
        _write(out / "epochs.csv", ["epoch", *_EPOCH_COLUMNS], epochs),
    ]


def write_precision_recall_table(curves: Path, path: Path) -> Path:
    """Write precision at IoU 0.5 at 21 recalls of each class, one row each.

    Args:
        curves: evaluation/precision_recall.json.
        path: the CSV: class, recall, precision.

    Raises:
        DataError: there is no such file.
    """
    content = read_precision_recall(curves)
    rows = (
        [c["name"], recall, precision]
        for c in content["classes"]
        if c["precision"] is not None
        for recall, precision in list(zip(content["recall"], c["precision"][0], strict=True))[::5]
    )
    return _write(path, ["class", "recall", "precision"], rows)


def _epoch(point: Point, number: int) -> int:
    """The epoch that a point ends; its place in the log if it does not say."""
    epoch = point.values.get("train/epoch", math.nan)
    return round(epoch) if math.isfinite(epoch) else number


def _cells(point: Point, names: Iterable[str]) -> list[str]:
    values = [point.values.get(name, math.nan) for name in names]
    return [f"{value:.6g}" if math.isfinite(value) else "" for value in values]


def _write(path: Path, header: list[str], rows: Iterable[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path
