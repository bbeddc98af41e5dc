"""Names of the files in a training's folder, and which of them may go."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

KEPT = 2
"""Newest checkpoints that are kept, beside anchors."""
BAD = ".bad"
"""Ending added to the name of a file that could not be used."""

_NAME = re.compile(r"(step|anchor)-(\d{8,})\.ckpt")


@dataclass(frozen=True, order=True)
class Saved:
    """A checkpoint's file, ordered by how far its training was."""

    step: int
    is_anchor: bool

    @property
    def name(self) -> str:
        """The file's."""
        return f"{'anchor' if self.is_anchor else 'step'}-{self.step:08d}.ckpt"


def best_name(step: int, digest: str) -> str:
    """Name of a file with the best weights: another content never has the same."""
    return f"best-{step:08d}-{digest[:12]}.pt"


def find_saved(folder: Path) -> list[Saved]:
    """The checkpoints in a folder, the newest first.

    Of the same step, an anchor comes last: it was saved before the epoch's evaluation.
    """
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    found = [Saved(int(m.group(2)), m.group(1) == "anchor") for m in matches if m]
    return sorted(found, key=lambda one: (one.step, not one.is_anchor), reverse=True)


def obsolete(saved: Iterable[Saved]) -> list[Saved]:
    """Those that may go: all but the newest two, and the anchors that these may be rolled back to.

    An anchor is needed if it is the newest at or before a checkpoint that is kept, or after it:
    rolling back takes the newest one before the step that training is at.
    """
    newest_first = sorted(saved, reverse=True)
    steps = [one for one in newest_first if not one.is_anchor]
    anchors = [one for one in newest_first if one.is_anchor]
    kept = (steps or anchors)[:KEPT]
    needed = next((a.step for a in anchors if a.step <= kept[-1].step), 0)
    return [*steps[KEPT:], *(anchor for anchor in anchors if anchor.step < needed)]
