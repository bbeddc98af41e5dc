"""The log that is always written: one JSON object a line, whole after a crash.

    {"step": 10, "time": 1763815420.1, "values": {"train/loss": 1.5}}
    {"time": 1763815421.7, "event": "early_stop", "fields": {"epoch": 12}}

Numbers that JSON does not have (nan, inf) are written as strings, which `float()` reads back.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


class JsonlLog:
    """Appends to a JSONL file, flushed line by line.  Implements training's `Tracker`."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """Open `path` for appending; its folder is made.

        Args:
            path: the file.
            say: told once, in one line, if the file can no longer be written (disk full).
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._say = say
        self._cut = _is_cut(path)
        # Unbuffered: a line is the file's when `write` returns, and a failed one is not kept back.
        self._file = path.open("ab", buffering=0)
        self.lost_lines = 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write the values of one step.  Never raises."""
        self._write({"step": step, "time": _now(), "values": _plain(values)})

    def event(self, kind: str, **fields: object) -> None:
        """Write something that happened, such as `early_stop`.  Never raises."""
        self._write({"time": _now(), "event": kind, "fields": _plain(fields)})

    def close(self) -> None:
        """Close the file; what was written stays."""
        self._file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        line = (json.dumps(entry, ensure_ascii=False, default=str) + "\n").encode()
        start = b"\n" if self._cut else b""
        try:
            written = self._file.write(start + line)
            self._cut = written != len(start + line)
        except OSError as error:
            if not self.lost_lines:
                self._say(f"{self.path}: cannot be written ({error.strerror}); training goes on")
            self.lost_lines += 1


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log, without lines that a crash or a full disk cut short."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def _is_cut(path: Path) -> bool:
    """Whether the file ends in the middle of a line."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def _now() -> float:
    """Seconds since 1970, to the millisecond."""
    return round(time.time(), 3)


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    return {
        name: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
