"""Whether a loss is far above the ones before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

# The standard deviation of a normal distribution, in median absolute deviations.
_DEVIATIONS = 1.4826
# Losses that hardly differ are no measure of what is far: a thousandth of their median is not.
_LEAST_PART = 1e-3


def robust_score(value: float, history: Sequence[float]) -> float:
    """How many robust standard deviations a value lies above the median of others.

    The robust z-score of Iglewicz and Hoaglin (1993): neither median nor median absolute deviation
    is moved by a few wild values.

    Args:
        value: finite.
        history: finite values, at least one.

    Returns:
        Negative below the median; always finite, unless value and history are near the largest
        float.
    """
    middle = median(history)
    spread = _DEVIATIONS * median(abs(other - middle) for other in history)
    return (value - middle) / max(spread, _LEAST_PART * abs(middle), math.ulp(1.0))
