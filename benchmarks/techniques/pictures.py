"""The pictures of the guide's pages: the same quantity of several runs, from results/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.ticker import PercentFormatter

from benchmarks.techniques.collect import CURVES, FOLDER
from runkey.plots.style import CYCLE, drawing, legend_beside, plain_log_scale

_UNITS = {
    "train/lr": "learning rate",
    "train/epoch_loss": "training loss",
    "train/grad_norm": "gradient norm",
    "train/images_per_second": "images per second",
    "train/data_wait_share": "share of the time",
    "val/loss": "held-out loss",
    "val/AP": "AP, held-out images",
}


@dataclass(frozen=True)
class Picture:
    """Panels above each other, a line for each run in each."""

    panels: Mapping[str, str]
    """Metric by the panel's title."""
    runs: Mapping[str, str]
    """Label by the run's name in results/techniques_curves.json."""
    logarithmic: tuple[str, ...] = ()
    """Metrics on a logarithmic axis."""


_AP = {"AP": "val/AP"}
PICTURES = {
    "schedules": Picture(
        {"Learning rate": "train/lr"} | _AP,
        {
            "baseline-0 Intel(R)": "cosine (sample)",
            "constant-0 Intel(R)": "constant",
            "step-0 Intel(R)": "step",
            "multistep-0 Intel(R)": "multistep",
            "exponential-0 Intel(R)": "exponential",
            "onecycle-0 Intel(R)": "onecycle",
            "cyclical-0 Intel(R)": "cyclical",
            "lr-5e-5-0 Intel(R)": "cosine, lr 5e-5",
        },
    ),
    "clipping": Picture(
        {"Gradient norm before clipping": "train/grad_norm"} | _AP,
        {
            "baseline-0 Intel(R)": "norm 0.5 (sample)",
            "clip-0.1-0 Intel(R)": "norm 0.1",
            "clip-17-0 Intel(R)": "norm 17",
            "clip-none-0 Intel(R)": "none",
            "clip-percentile-0 Intel(R)": "percentile 10",
        },
    ),
    "overfitting": Picture(
        {"Training loss": "train/epoch_loss", "Held-out loss": "val/loss"} | _AP,
        {
            "baseline-0 Intel(R)": "sample",
            "no-augment-0 Intel(R)": "no augmentation",
            "no-augment-stop-0 AMD": "no augmentation,\nlr constant",
        },
    ),
    "accumulation": Picture(
        {"Training loss": "train/epoch_loss"} | _AP,
        {
            "baseline-0 Intel(R)": "batch 8 (sample)",
            "batch-32-0 Intel(R)": "batch 32",
            "batch-32-lr-0 Intel(R)": "batch 32, lr 2e-3",
        },
    ),
    "mixed-precision": Picture(
        {"Training loss": "train/epoch_loss"} | _AP | {"Speed": "train/images_per_second"},
        {
            "gpu-fp32-0 Intel(R)": "H200, fp32",
            "gpu-0 Intel(R)": "H200, bf16",
            "gpu-fp16-0 Intel(R)": "H200, fp16",
        },
    ),
    "data-loading": Picture(
        {"Speed": "train/images_per_second", "Waiting for data": "train/data_wait_share"},
        {
            "gpu-0 Intel(R)": "H200, decoded cache",
            "gpu-uncached-4-0 Intel(R)": "H200, decoded by\n4 workers",
            "gpu-uncached-0-0 Intel(R)": "H200, decoded in\nthe training process",
        },
    ),
    "nan": Picture(
        {"Training loss": "train/epoch_loss", "Gradient norm": "train/grad_norm"} | _AP,
        {
            "baseline-0 Intel(R)": "lr 1e-3 (sample)",
            "lr-3e-3-0 Intel(R)": "lr 3e-3",
            "lr-1e-2-0 Intel(R)": "lr 1e-2",
            "lr-1e-1-0 AMD": "lr 1e-1",
        },
        logarithmic=("train/epoch_loss", "train/grad_norm"),
    ),
    "distributed": Picture(
        {"Training loss": "train/epoch_loss"} | _AP,
        {"baseline-0 AMD": "1 process", "two-processes-0 AMD": "2 processes"},
    ),
}


def draw_all() -> list[Path]:
    """Draw every picture whose runs are there."""
    curves = json.loads(CURVES.read_text(encoding="utf-8"))
    return [
        draw(picture, curves, FOLDER / f"{page}.png")
        for page, picture in PICTURES.items()
        if set(picture.runs) <= set(curves)
    ]


def draw(picture: Picture, curves: Mapping[str, Any], path: Path) -> Path:
    """Draw one picture.

    Args:
        picture: what it shows.
        curves: of each run, by metric: epochs and values.
        path: the PNG.
    """
    with drawing(path, *picture.panels, height=2.4) as panels:
        for axes, metric in zip(panels, picture.panels.values(), strict=True):
            axes.set_ylabel(_UNITS[metric])
            for colour, (run, label) in zip(CYCLE, picture.runs.items(), strict=False):
                points = curves[run][metric]
                few = "o" if len(points) <= 30 else ""
                x, y = [p[0] for p in points], [p[1] for p in points]
                axes.plot(x, y, color=colour, label=label, marker=few, markersize=3)
            if metric in picture.logarithmic:
                plain_log_scale(axes)
            else:
                axes.set_ylim(bottom=0)
            if metric.endswith("_share"):
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        panels[-1].set_xlabel("epoch")
        panels[-1].set_xlim(left=0)
        legend_beside(panels[0])
    return path
