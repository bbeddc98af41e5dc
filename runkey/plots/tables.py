"""CSV tables that `dvc plots show` and `dvc plots diff` draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from runkey.evaluation.files import read_output
from runkey.plots.log import read_log

_MAX_ROWS = 2000  # more than the pixels of a screen only make DVC's page slow
_STEP_COLUMNS = {
    "train/lr": "lr",
    "train/loss": "loss",
    "train/grad_norm": "grad_norm",
    "train/grad_norm_clipped": "grad_norm_clipped",
}
_EPOCH_COLUMNS = {"train/epoch_loss": "train_loss"}
_EVALUATION_COLUMNS = {"val/loss": "val_loss", "val/AP": "AP", "val/AP50": "AP50"}


def write_plot_tables(log: Path, out: Path) -> list[Path]:
    """Write steps.csv, epochs.csv and evaluations.csv of a training, finished or not.

    Points that lack a value which others have are left out, so that epochs without an evaluation
    have no row in evaluations.csv: DVC draws an empty cell as zero.
    """
    training = read_log(log)
    every = max(1, -(-len(training.steps) // _MAX_ROWS))
    steps = pd.DataFrame([point.values | {"step": point.step} for point in training.steps[::every]])
    epochs = pd.DataFrame([point.values for point in training.epochs])
    logged = (point.values.get("train/epoch", math.nan) for point in training.epochs)
    numbered = enumerate(logged, start=1)
    epochs["epoch"] = [round(epoch) if math.isfinite(epoch) else n for n, epoch in numbered]
    written = []
    for name, index, points, columns in (
        ("steps", "step", steps, _STEP_COLUMNS),
        ("epochs", "epoch", epochs, _EPOCH_COLUMNS),
        ("evaluations", "epoch", epochs, _EVALUATION_COLUMNS),
    ):
        table = points.reindex(columns=[index, *columns]).rename(columns=columns)
        values = table.drop(columns=index)
        logged_by_any = values.columns[values.notna().any()]
        whole = table.dropna(subset=logged_by_any) if len(logged_by_any) else table.iloc[:0]
        written.append(_write(out / f"{name}.csv", whole))
    return written


def write_confusion_table(counts: NDArray[np.int64], names: Sequence[str], path: Path) -> Path:
    """Write a row for each object and each false positive, which DVC's template counts.

    Brackets keep what is no class apart in DVC's order by name.
    """
    truth, detected = np.nonzero(counts)
    times = counts[truth, detected]
    columns = {
        "truth": np.array([*names, "(background)"])[truth].repeat(times),
        "detected": np.array([*names, "(missed)"])[detected].repeat(times),
    }
    return _write(path, pd.DataFrame(columns))


def write_precision_recall_table(curves: Path, path: Path) -> Path:
    """Write precision at IoU 0.5 of each class at 21 recalls."""
    stored = read_output(curves)
    rows = [
        (one["name"], recall, precision)
        for one in stored["classes"]
        if one["precision"] is not None
        for recall, precision in list(zip(stored["recall"], one["precision"][0], strict=True))[::5]
    ]
    return _write(path, pd.DataFrame(rows, columns=["class", "recall", "precision"]), digits=None)


def _write(path: Path, table: pd.DataFrame, digits: str | None = "%.6g") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False, float_format=digits, lineterminator="\n")
    return path
