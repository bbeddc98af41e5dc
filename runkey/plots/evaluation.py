"""Pictures and tables of an evaluation, from the files that `prepare` and `evaluate` write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray

from runkey.data.index import index_file, read_classes, read_index
from runkey.evaluation.files import (
    METRICS_JSON,
    OTHER,
    PRECISION_RECALL,
    PREDICTIONS,
    ClassMetrics,
    Curves,
    Metrics,
    SizeMetrics,
    read_metrics,
    read_precision_recall,
    read_results,
)
from runkey.evaluation.per_image import BINS, Calibration, calibration, confusion, judge_images
from runkey.inference.draw import printable
from runkey.plots import style
from runkey.plots.log import number
from runkey.plots.sheets import class_name, detection_sheet
from runkey.units import counted

_MAX_CLASSES = 20
_MAX_NAMED = 8
_NO_OBJECTS = "no class has objects in the held-out split"
_SIZES = {
    "small": ("small, to 32² px", style.ORANGE, "o"),
    "medium": ("medium, to 96² px", style.GREEN, "s"),
    "large": ("large", style.BLUE, "D"),
}
_NO_SIZE: SizeMetrics = {"AP": None, "objects": 0}
_LEAST_SCORE = 0.05
"""Detections below it are many, rarely looked at, and would dominate the calibration error."""
_BLUES = LinearSegmentedColormap.from_list("blues", ["#FFFFFF", "#8EC8EC", "#0072B2", "#003A63"])


def write_evaluation_plots(
    prepared: Path, evaluation: Path, data_folder: Path, out: Path, *, images: int = 8
) -> list[Path]:
    """Draw curves, confusion, sizes and calibration, and the best and the worst images.

    confusion.csv and precision_recall.csv, for `dvc plots`, are written beside the pictures.
    `ImageRecord.file` is relative to `data_folder`; with 0 `images` a sheet there are no sheets.
    """
    classes = read_classes(prepared / "classes.json")
    curves = read_precision_recall(evaluation / PRECISION_RECALL)
    metrics = read_metrics(evaluation / METRICS_JSON)
    records, threshold = list(read_index(index_file(prepared, "val"))), None
    if metrics.get("split") == "test":
        found = read_results(evaluation / OTHER / PREDICTIONS, classes)
        threshold = judge_images(records, found).threshold
        records = list(read_index(index_file(prepared, "test")))
    judged = judge_images(records, read_results(evaluation / PREDICTIONS, classes), threshold)
    names = [class_name(one) for one in classes]
    counted = confusion(judged, len(classes))
    written = [
        precision_recall(curves, out / "precision_recall.png"),
        confusion_matrix(counted, names, judged.threshold, out / "confusion.png"),
        ap_by_size(metrics, out / "ap_by_size.png"),
        reliability(calibration(judged, _LEAST_SCORE), out / "calibration.png"),
    ]
    write_confusion_table(counted, names, out / "confusion.csv")
    write_precision_recall_table(curves, out / "precision_recall.csv")
    for name in ("best", "worst") if images else ():
        where = (data_folder, out / f"{name}.jpg")
        written.append(detection_sheet(judged, classes, *where, best=name == "best", images=images))
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
    return style.write_table(path, pd.DataFrame(columns))


def write_precision_recall_table(stored: Curves, path: Path) -> Path:
    """Write precision at IoU 0.5 of each class at 21 recalls."""
    rows = [
        (one["name"], recall, precision)
        for one in stored["classes"]
        if one["precision"] is not None
        for recall, precision in list(zip(stored["recall"], one["precision"][0], strict=True))[::5]
    ]
    table = pd.DataFrame(rows, columns=["class", "recall", "precision"])
    return style.write_table(path, table, digits=None)


def precision_recall(stored: Curves, path: Path) -> Path:
    """Draw precision over recall, of each class at IoU 0.5 and of the mean at several IoU.

    Of more than eight classes, the best four and the worst four by AP50 are named.
    """
    recall = np.array(stored["recall"], dtype=np.float64)
    classes = [one for one in stored["classes"] if one["precision"] is not None]
    titles = ("Precision-recall curve of each class, at IoU 0.5", "Mean over classes, by IoU")
    with style.drawing(path, *titles, height=3.1, empty=_NO_OBJECTS) as (upper, lower):
        if not classes:
            return path
        precision = np.array([one["precision"] for one in classes], dtype=np.float64)
        _draw_classes(upper, recall, precision[:, 0], [one["name"] for one in classes])
        mean, ious = precision.mean(axis=0), stored["iou"]  # mean: [T, R]
        shown = [t for t, iou in enumerate(ious) if round(iou * 100) % 10 == 0 or iou == ious[-1]]
        for shade, t in zip(np.linspace(1, 1 / 3, len(shown)), shown, strict=True):
            label = f"{ious[t]:.2f}  {mean[t].mean():.2f}"
            lower.plot(recall, mean[t], color=_BLUES(shade), label=label)
        over_ious = mean.mean(axis=0)
        label = f"mean  {over_ious.mean():.2f}"
        lower.plot(recall, over_ious, color=style.BLACK, linestyle="--", label=label)
        style.legend_beside(lower, "IoU, AP")
        for axes in (upper, lower):
            axes.set(xlim=(0, 1.01), ylim=(0, 1.03), ylabel="precision")
        lower.set_xlabel("recall")
    return path


def _draw_classes(
    axes: Any, recall: NDArray[np.float64], precision: NDArray[np.float64], names: list[str]
) -> None:
    """Draw precision [K, R] over recall [R] of K classes."""
    ap50 = precision.mean(axis=1)
    order = np.argsort(-ap50, kind="stable")
    half = _MAX_NAMED // 2
    named = order if len(names) <= _MAX_NAMED else np.concatenate([order[:half], order[-half:]])
    for k in sorted(set(range(len(names))) - set(named.tolist())):
        axes.plot(recall, precision[k], color=style.GREY, alpha=0.25, linewidth=0.8)
    # Grey in place of yellow, which is hard to see on white.
    for colour, k in zip((*style.CYCLE[:7], style.GREY), named, strict=False):
        name = style.cut(printable(names[k], f"class number {k + 1}"), 22)
        axes.plot(recall, precision[k], color=colour, label=f"{name}  {ap50[k]:.2f}")
    title = "class, AP50" if len(names) <= _MAX_NAMED else f"best and worst {half}, AP50"
    style.legend_beside(axes, title)


def confusion_matrix(
    counts: NDArray[np.int64], names: list[str], threshold: float, path: Path
) -> Path:
    """Draw the confusion matrix [K+1, K+1] at a score threshold, coloured by the share of each row.

    Of more than twenty classes, those with the most errors are shown, the others as one.
    """
    counts, labels = _most_confused(counts, names)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    title = f"Confusion matrix at score {threshold:.2f} and above"
    height, empty = 1.2 + 0.37 * len(counts), "no object and no detection"
    with style.drawing(path, title, height=height, empty=empty) as (axes,):
        if not counts.any():
            return path
        axes.imshow(shares, cmap=_BLUES, vmin=0, vmax=1, aspect="auto")
        look: dict[str, Any] = {"ha": "center", "va": "center"}
        look["fontsize"] = 9 if len(counts) <= 12 else 7
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.45 else style.BLACK
            axes.text(column, row, f"{counts[row, column]:,}", color=colour, **look)
        last, short = len(labels), [style.cut(label, 16) for label in labels]
        axes.set_xticks(range(last + 1), [*short, "missed"])
        axes.set_yticks(range(last + 1), [*short, "background"])
        if last > 8 or max(map(len, short), default=0) > 8:
            axes.tick_params(axis="x", rotation=40)
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        axes.set(xlabel="detected class (match: IoU 0.5)")
        axes.set(ylabel="true class; colour: share of the row")
        axes.grid(visible=False)
        axes.axhline(last - 0.5, color=style.BLACK, linewidth=1)
        axes.axvline(last - 0.5, color=style.BLACK, linewidth=1)
    return path


def _most_confused(
    counts: NDArray[np.int64], names: list[str]
) -> tuple[NDArray[np.int64], list[str]]:
    """Reduce a confusion matrix [K+1, K+1] to at most twenty classes; the others are summed up."""
    if len(names) <= _MAX_CLASSES:
        return counts, names
    errors = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diag(counts)
    shown = sorted(np.argsort(-errors[:-1], kind="stable")[: _MAX_CLASSES - 1].tolist())
    others = len(shown)
    place = np.full(len(counts), others)
    place[shown] = range(others)
    place[-1] = others + 1
    reduced = np.zeros((others + 2, others + 2), dtype=np.int64)
    np.add.at(reduced, (place[:, None], place[None]), counts)
    return reduced, [*(names[k] for k in shown), "other classes"]


def ap_by_size(stored: Metrics, path: Path) -> Path:
    """Draw AP of small, medium and large objects, and their number, of all classes and of each.

    Of more than twenty classes, the worst are shown.
    """
    classes = {name: one for name, one in stored["per_class"].items() if one["AP"] is not None}
    worst = sorted(classes, key=lambda name: number(classes[name]["AP"]))[:_MAX_CLASSES]
    shown = {name: one for name, one in classes.items() if name in worst}
    look: dict[str, Any] = {"height": max(3.4, 0.9 + 0.27 * len(shown)), "empty": _NO_OBJECTS}
    with style.drawing(path, "AP by object size", "", columns=2, **look) as (left, right):
        if not shown:
            return path
        _draw_sizes(left, stored)
        _draw_classes_by_size(right, shown)
        if len(shown) < len(classes):
            every = counted(len(classes), "class")
            right.set_xlabel(f"AP, 0 to 1; the worst {len(shown)} of {every}")
        left.set_ylim(0, 1.03)
        right.set_xlim(0, 1.03)
        right.spines["left"].set_visible(False)
    return path


def _draw_sizes(axes: Any, stored: Metrics) -> None:
    values = [number(stored.get(f"AP_{size}")) for size in _SIZES]
    colours = [colour for _, colour, _ in _SIZES.values()]
    bars = axes.bar(range(len(values)), np.nan_to_num(values), color=colours, width=0.6)
    texts = ["no objects" if math.isnan(value) else f"{value:.3f}" for value in values]
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    axes.bar_label(bars, texts, padding=3, fontsize=9, bbox=white)
    ticks = []
    for size in _SIZES:
        by_size = (one["by_size"].get(size, _NO_SIZE) for one in stored["per_class"].values())
        total = sum(one["objects"] for one in by_size)
        ticks.append(f"{size}\n{counted(f'{total:,}', 'object')}")
    ap, low, high = (number(stored.get(f"AP{end}")) for end in ("", "_low", "_high"))
    axes.axhline(ap, color=style.BLACK, linestyle="--", linewidth=1.2, label="all sizes")
    if low < high:
        axes.axhspan(low, high, color=style.GREY, alpha=0.25, linewidth=0, label="95%")
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_ylabel("AP, 0 to 1")
    axes.grid(visible=False, axis="x")
    style.legend(axes)


def _draw_classes_by_size(axes: Any, classes: dict[str, ClassMetrics]) -> None:
    rows = np.arange(len(classes))
    by_size = [one["by_size"] for one in classes.values()]
    values = np.array([[number(one.get(s, _NO_SIZE)["AP"]) for one in by_size] for s in _SIZES])
    lowest = np.nan_to_num(np.fmin.reduce(values))  # [sizes, K] -> [K]
    highest = np.nan_to_num(np.fmax.reduce(values))
    axes.barh(rows, highest - lowest, left=lowest, height=0.16, color=style.PALE, zorder=1)
    for of_size, (label, colour, shape) in zip(values, _SIZES.values(), strict=True):
        axes.scatter(of_size, rows, color=colour, marker=shape, s=30, label=label, zorder=3)
    _draw_class_intervals(axes, list(classes.values()))
    names = [printable(name, f"class {row + 1}") for row, name in enumerate(classes)]
    axes.set_yticks(rows, [style.cut(name, 18) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("AP, 0 to 1")
    axes.grid(visible=False, axis="y")
    style.legend(axes)


def _draw_class_intervals(axes: Any, classes: Sequence[ClassMetrics]) -> None:
    """Draw the AP of all sizes and its 95% interval, of the classes that have one."""
    ends = [[number(one.get(f"AP_{end}")) for one in classes] for end in ("low", "high")]
    low, high = np.array(ends)
    ap = np.array([number(one["AP"]) for one in classes])
    rows = np.flatnonzero(np.isfinite(high))
    look: dict[str, Any] = {"fmt": "|", "color": style.BLACK, "capsize": 3, "markersize": 9}
    if len(rows):
        # Ends are rounded to 6 digits, so that one may lie beyond an AP of nearly 0.
        errors = np.maximum(0, np.stack([ap - low, high - ap]))[:, rows]
        axes.errorbar(ap[rows], rows, xerr=errors, label="all, 95%", zorder=2, lw=1, **look)


def reliability(scores: Calibration, path: Path) -> Path:
    """Draw precision and number of the detections over their score (a reliability diagram)."""
    edges = np.arange(BINS) / BINS
    titles = ("Calibration of the scores", "Detections")
    empty = f"no detection of score {_LEAST_SCORE} or above"
    with style.drawing(path, *titles, height=2.6, empty=empty) as (shares, counts):
        if not scores.counts.any():
            return path
        bins: dict[str, Any] = {"width": 0.94 / BINS, "align": "edge"}
        right = scores.shares_right
        shares.bar(edges, right, color=style.BLUE, label="precision of the bin", **bins)
        shares.plot([0, 1], [0, 1], color=style.GREY, linestyle="--", label="perfect calibration")
        error = f"expected calibration\nerror (ECE) {scores.error:.3f}"
        dots: dict[str, Any] = {"color": style.VERMILLION, "marker": "o", "markersize": 4}
        shares.plot(scores.mean_scores, right, label=error, **dots)
        shares.set(ylim=(0, 1.03), ylabel="precision")
        style.legend_beside(shares, "match: IoU 0.5")
        bars = counts.bar(edges, scores.counts, color=style.GREY, **bins)
        counts.bar_label(bars, [f"{count:,}" for count in scores.counts], padding=2, fontsize=9)
        counts.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
        counts.set(ylim=(0, 1.18 * scores.counts.max()), ylabel="detections")
        counts.set(xlim=(0, 1), xlabel=f"score (of {_LEAST_SCORE} and above)")
    return path
