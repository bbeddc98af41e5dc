"""All pictures of an evaluation, from the files that `prepare` and `evaluate` wrote."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray

from runkey.data.index import read_classes, read_index
from runkey.evaluation.detections import read_results
from runkey.evaluation.files import (
    METRICS,
    PRECISION_RECALL,
    PREDICTIONS,
    read_metrics,
    read_precision_recall,
)
from runkey.evaluation.per_image import (
    BINS,
    Calibration,
    Confusion,
    calibration,
    confusion,
    judge_images,
)
from runkey.plots.canvas import class_name, drawable
from runkey.plots.sheets import detection_sheet
from runkey.plots.style import (
    BLACK,
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    VERMILLION,
    drawing,
    legend,
    legend_beside,
    say_nothing_yet,
    shades,
)
from runkey.plots.tables import write_confusion_table

# AP by the size of objects: of all classes together and of each.


MOST_CLASSES = 20
SIZES = {
    "small": ("small, to 32² px", ORANGE, "o"),
    "medium": ("medium, to 96² px", GREEN, "s"),
    "large": ("large", BLUE, "D"),
}


def ap_by_size(metrics: Path, path: Path) -> Path:
    """Draw AP of small, medium and large objects, with how many there are.

    Of more than twenty classes the worst are shown.

    Args:
        metrics: evaluation/metrics.json.
        path: the picture, PNG.

    Raises:
        DataError: there is no such file.
    """
    content = read_metrics(metrics)
    classes = {name: c for name, c in content["per_class"].items() if c["AP"] is not None}
    worst = sorted(classes, key=lambda name: classes[name]["AP"])[:MOST_CLASSES]
    shown = [name for name in classes if name in worst]
    height = max(3.4, 0.9 + 0.27 * len(shown))
    with drawing(path, panels=1, height=height, columns=2) as (_, (left, right)):
        left.set_title("AP by size of the object")
        right.set_title("" if shown else "Each class")
        if not shown:
            for axes in (left, right):
                say_nothing_yet(axes, "no class has objects in the held-out images")
            return path
        _draw_all(left, content)
        _draw_classes_by_size(right, {name: classes[name] for name in shown})
        if len(shown) < len(classes):
            right.set_xlabel(f"AP, 0 to 1; the worst {len(shown)} of {len(classes)} classes")
        for axes, limit in ((left, left.set_ylim), (right, right.set_xlim)):
            limit(0, 1.03)
            axes.spines["left"].set_visible(axes is left)
    return path


def _draw_all(axes: Any, content: dict[str, Any]) -> None:
    values = np.array([_value(content.get(f"AP_{size}")) for size in SIZES])
    colours = [colour for _, colour, _ in SIZES.values()]
    axes.bar(range(len(SIZES)), np.nan_to_num(values), color=colours, width=0.6)
    for place, value in enumerate(values):
        text = f"{value:.3f}" if math.isfinite(value) else "none there"
        at = (place, value if math.isfinite(value) else 0.0)
        axes.annotate(
            text,
            at,
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    objects = {
        size: sum(_objects(c, size) for c in content["per_class"].values()) for size in SIZES
    }
    axes.axhline(
        _value(content["AP"]), color=BLACK, linestyle="--", linewidth=1.2, label="AP of all"
    )
    axes.set_xticks(
        range(len(SIZES)),
        [f"{size}\n{objects[size]:,} objects" for size in SIZES],
    )
    axes.set_ylabel("AP, 0 to 1")
    axes.grid(visible=False, axis="x")
    legend(axes)


def _draw_classes_by_size(axes: Any, classes: dict[str, dict[str, Any]]) -> None:
    rows = np.arange(len(classes))
    by_size = {
        size: np.array([_value(c["by_size"].get(size, {}).get("AP")) for c in classes.values()])
        for size in SIZES
    }
    every = np.array(list(by_size.values()))
    axes.barh(rows, _spread(every), left=_lowest(every), height=0.16, color=PALE, zorder=1)
    for size, (label, colour, marker) in SIZES.items():
        axes.scatter(by_size[size], rows, color=colour, marker=marker, s=30, label=label, zorder=3)
    names = [drawable(name, f"class {row + 1}") for row, name in enumerate(classes)]
    axes.set_yticks(rows, [name if len(name) <= 18 else name[:17] + "…" for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("AP, 0 to 1")
    axes.grid(visible=False, axis="y")
    legend(axes)


def _lowest(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[sizes, K] -> [K]; 0 for a class without any."""
    lowest: NDArray[np.float64] = np.where(np.isnan(values), np.inf, values).min(axis=0)
    return np.where(np.isfinite(lowest), lowest, 0.0)


def _spread(values: NDArray[np.float64]) -> NDArray[np.float64]:
    highest: NDArray[np.float64] = np.nan_to_num(values).max(axis=0)
    return highest - _lowest(values)


def _objects(of_class: dict[str, Any], size: str) -> int:
    return int(of_class["by_size"].get(size, {}).get("objects", 0))


def _value(number: float | None) -> float:
    return math.nan if number is None else float(number)


# Scores against the share of right detections: a reliability diagram.


LEAST_SCORE = 0.05
"""Below, there is a crowd of detections that nobody looks at, which would be most of the error."""


def reliability(scores: Calibration, path: Path) -> Path:
    """Draw the share of right detections over their score, and how many there are.

    Args:
        scores: of detections of at least `LEAST_SCORE`.
        path: the picture, PNG.
    """
    edges = np.arange(BINS) / BINS
    with drawing(path, panels=2, height=2.6) as (_, (shares, counts)):
        shares.set_title("Calibration: is a score of 0.8 right in 8 of 10?")
        counts.set_title("Detections")
        if not scores.counts.any():
            for axes in (shares, counts):
                say_nothing_yet(axes, f"no detection of score {LEAST_SCORE} or above")
            return path
        width = 0.94 / BINS
        shares.bar(
            edges, scores.shares_right, width, align="edge", color=BLUE, label="right, of the bin"
        )
        shares.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="as promised")
        shares.plot(
            scores.mean_scores,
            scores.shares_right,
            color=VERMILLION,
            marker="o",
            markersize=4,
            label=f"mean error {scores.error:.3f}",
        )
        shares.set_ylim(0, 1.03)
        shares.set_ylabel("share right, 0 to 1")
        legend_beside(shares, "a match is IoU 0.5")
        counts.bar(edges, scores.counts, width, align="edge", color=GREY)
        for edge, count in zip(edges, scores.counts.tolist(), strict=True):
            counts.annotate(
                f"{count:,}",
                (edge + width / 2, count),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        counts.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
        counts.set_ylim(0, 1.18 * scores.counts.max())
        counts.set_ylabel("detections")
        counts.set_xlabel(f"score (of {LEAST_SCORE} and above)")
        counts.set_xlim(0, 1)
    return path


# Which class is taken for which, with the background.


MOST_CONFUSED_CLASSES = 20
MOST_LETTERS = 16
_BLUES = LinearSegmentedColormap.from_list("blues", ["#FFFFFF", "#8EC8EC", "#0072B2", "#003A63"])
_OTHERS = "other classes"


def confusion_matrix(counted: Confusion, names: list[str], path: Path) -> Path:
    """Draw counts, coloured by their share of the row.

    Of more than twenty classes those with the most faults are shown, the others as one.

    Args:
        counted: the counts.
        names: of the classes, in letters that the font has.
        path: the picture, PNG.
    """
    counts, labels = _most_confused(counted.counts, names)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    with drawing(path, panels=1, height=1.2 + 0.37 * len(counts)) as (_, (axes,)):
        axes.set_title(
            f"Which class was taken for which, at score {counted.threshold:.2f} and above"
        )
        if not counts.any():
            say_nothing_yet(axes, "no object and no detection")
            return path
        axes.imshow(shares, cmap=_BLUES, vmin=0, vmax=1, aspect="auto")
        size = 9 if len(counts) <= 12 else 7
        for row, column in zip(*np.nonzero(counts), strict=True):
            ink = "white" if shares[row, column] > 0.45 else BLACK
            text = f"{counts[row, column]:,}"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=ink)
        _name_axes(axes, labels)
    return path


def _name_axes(axes: Any, labels: list[str]) -> None:
    last = len(labels)
    short = [label if len(label) <= MOST_LETTERS else label[:15] + "…" for label in labels]
    axes.set_xticks(range(last + 1), [*short, "missed"])
    axes.set_yticks(range(last + 1), [*short, "background"])
    if last > 8 or max(map(len, short), default=0) > 8:
        axes.tick_params(axis="x", rotation=40)
        for label in axes.get_xticklabels():
            label.set_ha("right")
            label.set_rotation_mode("anchor")
    axes.set_xlabel("detected as (a match is IoU 0.5)")
    axes.set_ylabel("truth; colour: share of the row")
    axes.grid(visible=False)
    axes.axhline(last - 0.5, color=BLACK, linewidth=1)
    axes.axvline(last - 0.5, color=BLACK, linewidth=1)


def _most_confused(
    counts: NDArray[np.int64], names: list[str]
) -> tuple[NDArray[np.int64], list[str]]:
    """Counts and names of at most twenty classes, in their order, the others added up."""
    if len(names) <= MOST_CONFUSED_CLASSES:
        return counts, names
    faults = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diag(counts)
    shown = sorted(np.argsort(-faults[:-1], kind="stable")[: MOST_CONFUSED_CLASSES - 1].tolist())
    others = len(shown)
    place = np.full(len(counts), others)
    place[shown] = range(others)
    place[-1] = others + 1
    few = np.zeros((others + 2, others + 2), dtype=np.int64)
    np.add.at(few, (place[:, None], place[None]), counts)
    return few, [*(names[k] for k in shown), _OTHERS]


# Precision over recall, of each class and at each IoU.


MOST_NAMED = 8
LINES = (*CYCLE[:7], GREY)  # a yellow line is hard to see on white


def precision_recall(curves: Path, path: Path) -> Path:
    """Draw the curves that `evaluate` wrote.

    Above: each class at IoU 0.5 (of more than eight classes, the best and the worst four by name).
    Below: the mean over classes at several IoU.

    Args:
        curves: evaluation/precision_recall.json.
        path: the picture, PNG.

    Raises:
        DataError: there is no such file.
    """
    content = read_precision_recall(curves)
    recall = np.array(content["recall"], dtype=np.float64)
    classes = [c for c in content["classes"] if c["precision"] is not None]
    with drawing(path, panels=2, height=3.1) as (_, (upper, lower)):
        upper.set_title("Precision over recall of each class, at IoU 0.5")
        lower.set_title("Mean of the classes, by IoU")
        if not classes:
            for axes in (upper, lower):
                say_nothing_yet(axes, "no class has objects in the held-out images")
            return path
        precision = np.array([c["precision"] for c in classes], dtype=np.float64)
        _draw_classes(upper, recall, precision[:, 0], [c["name"] for c in classes])
        _draw_ious(lower, recall, precision.mean(axis=0), content["iou"])
        for axes in (upper, lower):
            axes.set_xlim(0, 1.01)
            axes.set_ylim(0, 1.03)
            axes.set_ylabel("precision: share right")
        lower.set_xlabel("recall: share of the objects that are found")
    return path


def _draw_classes(
    axes: Any, recall: NDArray[np.float64], precision: NDArray[np.float64], names: list[str]
) -> None:
    ap50 = precision.mean(axis=1)
    order = np.argsort(-ap50, kind="stable")
    half = MOST_NAMED // 2
    named = order if len(names) <= MOST_NAMED else np.concatenate([order[:half], order[-half:]])
    for k in range(len(names)):
        if k not in named:
            axes.plot(recall, precision[k], color=GREY, alpha=0.25, linewidth=0.8)
    for colour, k in zip(LINES, named, strict=False):
        name = drawable(names[k], f"class number {k + 1}")
        short = name if len(name) <= 22 else name[:21] + "…"
        axes.plot(recall, precision[k], color=colour, label=f"{short}  {ap50[k]:.2f}")
    title = "class, AP50" if len(names) <= MOST_NAMED else f"best and worst {half}, AP50"
    legend_beside(axes, title)


def _draw_ious(
    axes: Any, recall: NDArray[np.float64], precision: NDArray[np.float64], ious: list[float]
) -> None:
    chosen = [t for t in range(len(ious)) if round(ious[t] * 100) % 10 == 0 or t == len(ious) - 1]
    for colour, t in zip(shades(len(chosen)), chosen, strict=True):
        axes.plot(
            recall, precision[t], color=colour, label=f"{ious[t]:.2f}  {precision[t].mean():.2f}"
        )
    axes.plot(
        recall,
        precision.mean(axis=0),
        color=BLACK,
        linestyle="--",
        label=f"mean  {precision.mean():.2f}",
    )
    legend_beside(axes, "IoU, AP")


def write_evaluation_plots(
    prepared: Path, evaluation: Path, data_folder: Path, out: Path, *, images: int = 8
) -> list[Path]:
    """Draw curves, confusion, sizes and calibration, and the best and the worst images.

    Args:
        prepared: the folder with classes.json and val.json.
        evaluation: the folder with metrics.json, predictions.json and precision_recall.json.
        data_folder: what `Record.file` is relative to.
        out: the folder; made if it is not there.
        images: in each sheet; 0: no sheets.

    Returns:
        The written pictures; the table beside them is for `dvc plots`.

    Raises:
        DataError: a file is missing; says which, and what to run.
    """
    records, classes = read_index(prepared / "val.json"), read_classes(prepared / "classes.json")
    judged = judge_images(records, classes, read_results(evaluation / PREDICTIONS))
    names = [class_name(one) for one in classes]
    counted = confusion(judged, len(classes))
    written = [
        precision_recall(evaluation / PRECISION_RECALL, out / "precision_recall.png"),
        confusion_matrix(counted, names, out / "confusion.png"),
        ap_by_size(evaluation / METRICS, out / "ap_by_size.png"),
        reliability(calibration(judged, LEAST_SCORE), out / "calibration.png"),
    ]
    write_confusion_table(counted, names, out / "confusion.csv")
    if images:
        for best in (True, False):
            path = out / ("best.jpg" if best else "worst.jpg")
            written.append(
                detection_sheet(judged, classes, data_folder, path, best=best, images=images)
            )
    return written
