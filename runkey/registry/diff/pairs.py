"""Two mappings side by side: what a comparison is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pair:
    """A name whose values differ; None: not there on that side."""

    name: str
    a: Any
    b: Any


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Pair]:
    """The names whose values are not the same, in alphabetical order."""
    return [
        Pair(name, a.get(name), b.get(name))
        for name in sorted(a.keys() | b.keys())
        if (name in a, a.get(name)) != (name in b, b.get(name))
    ]
