"""Whether a score of 0.8 means that 8 of 10 such detections are right.

Detections are matched at IoU 0.5 and put into ten bins by their score; the expected calibration
error is the mean distance between a bin's mean score and its share of right ones, weighted by the
bins' detections (Guo et al. 2017; for detections Kueppers et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runkey.evaluation.per_image import Judgement

BINS = 10


@dataclass(frozen=True, slots=True)
class Calibration:
    """Scores against what they promise."""

    counts: NDArray[np.int64]
    """[BINS]: detections in each bin."""
    mean_scores: NDArray[np.float64]
    """[BINS]; NaN where a bin is empty."""
    shares_right: NDArray[np.float64]
    """[BINS], 0..1; NaN where a bin is empty."""

    @property
    def error(self) -> float:
        """Expected calibration error, 0..1; 0 without detections."""
        used = self.counts > 0
        distances = np.abs(self.mean_scores - self.shares_right)[used]
        return float(np.average(distances, weights=self.counts[used])) if used.any() else 0.0


def calibration(judged: Judgement, least_score: float = 0.0) -> Calibration:
    """Bin all detections of at least some score; the bins are 0 to 0.1, 0.1 to 0.2, and so on."""
    shown = [d for d in judged.detections if d.score >= least_score]
    scores = np.array([d.score for d in shown], dtype=np.float64)
    right = np.array([d.right for d in shown], dtype=np.float64)
    place = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(place, minlength=BINS)

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.bincount(place, weights=values, minlength=BINS)
        means: NDArray[np.float64] = np.full(BINS, np.nan)
        np.divide(sums, counts, out=means, where=counts > 0)
        return means

    return Calibration(counts, mean(scores), mean(right))
