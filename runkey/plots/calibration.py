"""Scores against the share of right detections: a reliability diagram."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runkey.evaluation.calibration import BINS, Calibration
from runkey.plots.style import BLUE, GREY, VERMILLION, drawing, legend_beside, say_nothing_yet

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
