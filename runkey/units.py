"""Counts, sizes and durations as text, the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KIB, MIB, GIB = 2**10, 2**20, 2**30
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def counted(count: int | str, noun: str) -> str:
    """Format a count with its noun: `1 class`, `3 classes`, `1,200 images`, `0 entries`.

    `count` may be formatted already.
    """
    if str(count) == "1":
        return f"1 {noun}"
    if noun.endswith(("s", "x", "ch", "sh")) and not noun.endswith("epoch"):
        return f"{count} {noun}es"
    consonant = noun.endswith("y") and noun[-2] not in "aeiou"
    return f"{count} {noun[:-1]}ies" if consonant else f"{count} {noun}s"


def format_score(metrics: Mapping[str, Any], name: str) -> str:
    """Format a metric, with its 95% interval if that is known: `0.673 (95%: 0.652 to 0.694)`.

    The interval's ends are the metrics NAME_low and NAME_high.
    """
    value, low, high = (metrics.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return "none"
    known = isinstance(low, float) and isinstance(high, float)
    return f"{value:.3f} (95%: {low:.3f} to {high:.3f})" if known else f"{value:.3f}"


def format_bytes(count: float) -> str:
    """Format a file size in decimal units: `310 B`, `1.2 kB`, `45.1 MB`."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 999.5:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def format_seconds(seconds: float) -> str:
    """Format a duration in two units: `41 s`, `2 min 10 s`, `3 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_age(seconds: float) -> str:
    """Format an age in its largest unit: `35 s`, `4 min`, `2.5 h`, `3.1 d`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * _MINUTE:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _HOUR:.3g} h" if seconds < 2 * _DAY else f"{seconds / _DAY:.3g} d"
