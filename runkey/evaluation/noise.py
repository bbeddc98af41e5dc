"""Whether the AP of two runs differs by more than the noise of their held-out images.

    compare_scores(metrics_a, metrics_b, resampled_a, resampled_b)

Runs that were evaluated on the same images are compared in pairs: the images that are hard for one
are hard for the other, and cancel out of the difference. Else their intervals are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from runkey.evaluation.files import Resampled
from runkey.evaluation.intervals import METRICS, Interval, difference_interval

_MOST_DEVIATIONS = 20.0
"""Above those of two images, the fewest with an interval: a larger number is damage."""


@dataclass(frozen=True, slots=True)
class ScoreDifference:
    """The difference of a metric of two runs, and whether it is within noise."""

    name: str
    difference: float
    """B - A."""
    interval: Interval | None
    """95% interval of the difference, of runs that are compared in pairs; None also of equal
    ones."""
    is_paired: bool
    is_noise: bool

    def __str__(self) -> str:
        """Say it in a line."""
        start = f"{self.name}: {self.difference:+.3f}"
        if not self.is_paired:
            verdict = "overlap: may be noise" if self.is_noise else "do not overlap: no noise"
            return f"{start}; the 95% intervals of the two, on different images, {verdict}"
        if self.interval is None:
            return f"{start}: the same on each of these images"
        verdict = "within noise" if self.is_noise else "more than noise"
        low, high = self.interval.low, self.interval.high
        return f"{start} (95%: {low:+.3f} to {high:+.3f}, paired by image): {verdict}"


def compare_scores(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    resampled_a: Resampled | None,
    resampled_b: Resampled | None,
) -> list[ScoreDifference]:
    """Compare AP and AP50 of two runs, as far as both have them with intervals.

    Args:
        a: metrics by name: AP, AP_low, AP_high, ...
        b: those of the other run.
        resampled_a: see `runkey.evaluation.files.Resampled`; None: not at hand.
        resampled_b: that of the other run.
    """
    found = []
    for name in METRICS:
        first, second = a.get(name), b.get(name)
        if not _is_share(first) or not _is_share(second):
            continue
        if paired := _paired(name, second - first, resampled_a, resampled_b):
            found.append(paired)
        elif (one := _interval(a, name)) and (other := _interval(b, name)):
            overlap = one.low <= other.high and other.low <= one.high
            found.append(ScoreDifference(name, second - first, None, False, overlap))
    return found


def _paired(
    name: str, difference: float, a: Resampled | None, b: Resampled | None
) -> ScoreDifference | None:
    """Compare in pairs; None if the runs were evaluated on different images, or it is not known."""
    if a is None or b is None or a["truth"] != b["truth"]:
        return None
    values_a, values_b = (one["AP"] if name == "AP" else one["AP50"] for one in (a, b))
    if len(values_a) != len(values_b):  # of another number of sets
        return None
    if values_a == values_b and not difference:
        return ScoreDifference(name, difference, None, True, True)
    reach = max(one["deviations"].get(name) or 0.0 for one in (a, b))
    if not 0 < reach <= _MOST_DEVIATIONS or not all(
        map(_is_share, filter(None, (*values_a, *values_b)))
    ):
        return None
    interval = difference_interval(values_a, values_b, difference, reach)
    if interval is None:
        return None
    return ScoreDifference(name, difference, interval, True, interval.low <= 0 <= interval.high)


def _is_share(value: object) -> TypeGuard[float]:
    return isinstance(value, float) and 0 <= value <= 1


def _interval(metrics: Mapping[str, Any], name: str) -> Interval | None:
    low, high = (metrics.get(f"{name}_{end}") for end in ("low", "high"))
    return Interval(low, high) if _is_share(low) and _is_share(high) else None
