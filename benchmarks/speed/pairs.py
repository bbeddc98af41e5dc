"""Paired timing: contestants in turn, processor time, medians and quartiles of ratios.

Whatever else a shared machine does meets all contestants of a round alike, so the ratio of a round
says more than the seconds in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

OURS = "runkey"


@dataclass(frozen=True, slots=True)
class Row:
    """What one measurement found: a table of the page, a line for each contestant."""

    name: str
    """Such as `training step, 1 thread`."""
    cpu_ms: dict[str, list[float]]
    """Processor milliseconds of each round, by contestant."""
    peers: tuple[str, ...]
    """Contestants that the others are compared with."""
    agreement: dict[str, float]
    """Largest difference from what it was compared with before timing, by contestant."""
    extra: dict[str, dict[str, float]] = field(default_factory=dict)
    """Other numbers of a contestant, such as `peak_mib`."""

    def summary(self) -> dict[str, Any]:
        """Return what the JSON file keeps of each contestant.

        `times_faster` has for each peer the quartiles of (peer's time / contestant's time), of
        the rounds.
        """
        return {
            contestant: {
                "cpu_ms": round(median(times), 3),
                "rounds": len(times),
                "times_faster": {
                    peer: quartiles([a / b for a, b in zip(self.cpu_ms[peer], times, strict=True)])
                    for peer in self.peers
                },
                **self.extra.get(contestant, {}),
            }
            | ({"agreement": self.agreement[contestant]} if contestant in self.agreement else {})
            for contestant, times in self.cpu_ms.items()
        }


def quartiles(values: list[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    found = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [round(value, 3) for value in found]


def time_in_turn(
    contestants: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Call all contestants in each round and return their processor milliseconds.

    Every round begins with another one, so that none always follows the same.
    """
    names = list(contestants)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.process_time()
            contestants[name]()
            taken = 1000 * (time.process_time() - start)
            if number >= 0:
                found[name].append(taken)
    return found


def relative(theirs: float, ours: float) -> float:
    """Return the relative difference of two numbers."""
    return abs(theirs - ours) / max(abs(ours), 1e-12)


def check(name: str, differences: Mapping[str, float], most: float) -> dict[str, float]:
    """Return the differences; raise ValueError if one is above `most`: nothing is timed then."""
    for contestant, difference in differences.items():
        if not difference <= most:
            raise ValueError(
                f"{name}: {contestant} differs from runkey by {difference:.2g}, at most {most:g}"
                " is allowed; the two do not compute the same"
            )
    return {contestant: float(f"{value:.2g}") for contestant, value in differences.items()}
