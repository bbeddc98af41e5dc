"""What a hint is."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from runkey.progress import WIDTH

CLASS_SCORES = "class_scores"
"""Event of an evaluation during training; its fields are what `class_scores` gives."""
EVENT = "hint."
"""Beginning of the kinds of events that hold hints."""
MOST_NAMES = 5
"""Of classes, in a hint."""
_INDENT = " " * len("hint: ")


@dataclass(frozen=True, slots=True)
class Hint:
    """One thing to look at."""

    kind: str
    """Such as `loader`; a run is told each kind once."""
    seen: str
    """What was measured."""
    change: str
    """Which parameters change it, and which way."""

    @property
    def lines(self) -> list[str]:
        """For people; at most 100 columns."""
        return self.wrapped(WIDTH)

    def wrapped(self, width: int) -> list[str]:
        """For people; at most so many columns."""
        return [
            *textwrap.wrap(f"hint: {self.seen}", width, subsequent_indent=_INDENT),
            *textwrap.wrap(self.change, width, initial_indent=_INDENT, subsequent_indent=_INDENT),
        ]
