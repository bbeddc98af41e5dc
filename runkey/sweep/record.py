"""The record of a sweep, beside the store: its key, its points, and the comparison at its end.

.runkey/sweeps/<key>/sweep.json  table.csv  parallel.png  logs/<key of a training>.log
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from runkey.files import json_safe, read_json, write_atomically, write_json
from runkey.hashing import canonical_json, sha256_bytes
from runkey.identity.key import short_key
from runkey.params.load import as_text
from runkey.sweep.driver import Entry

_SCHEMA = "sw1"


@dataclass(frozen=True)
class SweepRecord:
    """A sweep that was begun, maybe in an earlier process."""

    key: str
    """`sw1-` and 64 hex digits: of the snapshot, the space, the settings and the seed."""
    folder: Path
    about: Mapping[str, Any]
    """What the key hashes."""

    @classmethod
    def of(cls, home: Path, commit: str, settings: Mapping[str, Any]) -> Self:
        """Return the record of these settings; nothing is written yet."""
        about = {"commit": commit, **settings}
        key = f"{_SCHEMA}-{sha256_bytes(canonical_json(json_safe(about)).encode())}"
        return cls(key, home / "sweeps" / short_key(key), about)

    @cached_property
    def begun(self) -> list[dict[str, Any]]:
        """The points of an earlier process, as `Entry.as_dict` gave them."""
        file = self.folder / "sweep.json"
        return list(read_json(file)["points"]) if file.is_file() else []

    def write(self, entries: Sequence[Entry]) -> None:
        """Write the points as they are now."""
        points = [one.as_dict() for one in entries]
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"key": self.key, **self.about, "points": points}
        write_json(self.folder / "sweep.json", json_safe(content))

    def compare(self, entries: Sequence[Entry]) -> dict[str, float]:
        """Write the table and the picture; return how much each parameter matters."""
        from runkey.plots.sweep import draw_sweep, importance

        text = io.StringIO()
        names = list(dict.fromkeys(name for one in entries for name in one.point))
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["key", *names, "AP", "state", "note"])
        for one in best_first(entries):
            cells = [as_text(one.point[name]) if name in one.point else "" for name in names]
            table.writerow([one.key, *cells, one.ap, one.state, one.note])
        write_atomically(self.folder / "table.csv", text.getvalue())
        done = [one for one in entries if one.ap is not None]
        points, scores = [one.point for one in done], [one.ap for one in done if one.ap is not None]
        if len(points) > 1:
            draw_sweep(self.folder / "parallel.png", points, scores)
        return importance(points, scores)


def best_first(entries: Sequence[Entry]) -> list[Entry]:
    """Sort by AP; what has none comes last."""
    return sorted(entries, key=lambda one: -1.0 if one.ap is None else one.ap, reverse=True)
