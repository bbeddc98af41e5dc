"""The training log: a JSONL file that is always written and stays whole after a crash.

    {"step": 10, "time": 1763815420.1, "values": {"train/loss": 1.5}}
    {"time": 1763815421.7, "event": "early_stop", "fields": {"step": 120, "epoch": 12}}

Numbers that JSON does not have (nan, inf) are strings, which `float()` reads back. A resumed
training repeats the steps since its last checkpoint: the log keeps their first lines.
"""

from __future__ import annotations

import errno
import json
import logging
import mmap
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runkey.files import FormatError, json_safe, open_plain, parse_json, write_atomically
from runkey.units import MIB, counted

logger = logging.getLogger(__name__)

Entry = dict[str, Any]
"""A line of the log: values or an event."""

ALWAYS_NEW = ("resumed",)
"""Events that are never a repetition of an earlier one."""
_WALL_TIME = ("seconds", "per_second", "data_wait_share")
"""Endings of the names of values that measure the machine's speed, which differ in every run."""
_NOT_FINITE = ("nan", "inf", "-inf")
_BYTES, _LOST = "log_bytes", "log_lost_lines"
_MAX_WAITING_BYTES = 64 * MIB
"""Bound on the lines kept in memory while the disk is full: about 100,000 lines."""


def _parse(line: bytes) -> Entry | None:
    try:
        entry = parse_json(line)
        is_whole = {"time", "step", "values"} <= {*entry} or {"time", "event", "fields"} <= {*entry}
    except (ValueError, TypeError):
        return None
    return entry if is_whole else None


def read_log(path: Path, start: int = 0, stop: int = sys.maxsize) -> Iterator[tuple[int, Entry]]:
    """Yield the entries between two bytes of a log, if there is one, each with the byte behind it.

    Lines that a crash or a full disk cut short are left out.
    """
    if path.is_file():
        with path.open("rb") as file:
            file.seek(start)
            for line in file:
                start += len(line)
                if start > stop or not line.endswith(b"\n"):
                    return
                if entry := _parse(line):
                    yield start, entry


def check_log(path: Path) -> None:
    """Raise FormatError unless each whole line of a log that came from elsewhere is an entry."""
    with open_plain(path) as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n") and not _is_sound(_parse(line)):
                raise FormatError(f"{path.name}, line {number}: no entry of a training log")


def _is_sound(entry: Any) -> bool:
    if not isinstance(entry, dict) or type(entry["time"]) not in (int, float):
        return False
    if "event" in entry:
        fields = entry["fields"]
        fits = isinstance(entry["event"], str) and isinstance(fields, dict)
        return fits and _is_step(fields.get("step", 0))
    values = entry["values"]
    return (
        _is_step(entry["step"])
        and isinstance(values, dict)
        and all(type(v) in (int, float) or v in _NOT_FINITE for v in values.values())
    )


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _broken_lines(path: Path, stop: int) -> int:
    """Count the lines before byte `stop` that are no entries."""
    with path.open("rb") as file:
        return sum(not _parse(line) for line in file.read(stop).splitlines())


class ExpectedEntries:
    """Entries already in the log that a resumed training will log again.

    Values are recognised by their step and names, events by kind and fields.
    """

    def __init__(self) -> None:
        self._places: dict[str, deque[tuple[int, Entry]]] = defaultdict(deque)
        """Offset and contents of the entries of each name."""
        self._step = 0
        self.differing: list[int] = []
        """Steps whose repeated values differ from the logged ones."""

    def read(self, path: Path, offset: int) -> None:
        """Read the lines of a log that begin at byte `offset` or later."""
        for end, entry in read_log(path, offset):
            if entry.get("event") not in ALWAYS_NEW:
                self._places[_name(entry)].append((offset, entry))
            offset = end

    def take(self, entry: Entry) -> bool:
        """Return True if the entry was expected; it is not expected again after that."""
        self._step = entry.get("step", self._step)
        if not (places := self._places.get(_name(entry))):
            return False
        _, logged = places.popleft()
        if _without_pace(logged.get("values", {})) != _without_pace(entry.get("values", {})):
            self.differing.append(self._step)
        return True

    def first_offset(self) -> int | None:
        """Return the byte at which the first entry still expected begins; None if there is none.

        An entry of an earlier step will not come any more: `runtime.log_every` has changed, or the
        entry described the machine.
        """
        places = (place for places in self._places.values() for place in places)
        offsets = (offset for offset, entry in places if _step(entry, self._step) >= self._step)
        return min(offsets, default=None)


def _name(entry: Entry) -> str:
    if "event" in entry:
        named = [entry["event"], _without_pace(entry["fields"])]
    else:
        named = [entry["step"], sorted(entry["values"])]
    return json.dumps(named, sort_keys=True)


def _step(entry: Entry, default: int) -> int:
    """Return the step of an entry; `default` for an event without one."""
    return int(entry.get("step", entry.get("fields", {}).get("step", default)))


def _without_pace(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not name.endswith(_WALL_TIME)}


class JsonlLog:
    """A JSONL file that is appended to line by line. No disk error is raised; it is logged once.

    Implements training's protocol for metrics.
    """

    def __init__(self, path: Path, shown: Path | None = None, *, quiet: bool = False) -> None:
        """Open the file, make its folder, and cut off a half-written last line.

        Args:
            path: the file, in a folder that outlives the process.
            shown: where people look for it: a hard link to `path`, replaced by a copy in `finish`.
            quiet: log no warnings; for a second log on the same disk.
        """
        self.path, self._shown, self._quiet = path, shown, quiet
        self._file, self._size = -1, 0
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._dropped_steps: list[int] = []
        self._lost_before = 0
        self._failed = False
        self._expected = ExpectedEntries()
        try:
            self._open()
        except OSError as error:
            self._open_elsewhere(error)
        else:
            self._show()

    @property
    def lost_lines(self) -> int:
        """Lines missing from the file."""
        return self._lost_before + len(self._dropped_steps) + len(self._waiting)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write the values of one optimizer step, unless the file has that line already."""
        self._write({"step": step, "time": _now(), "values": dict(values)})

    def event(self, kind: str, **fields: object) -> None:
        """Write an event such as `early_stop`; in MLflow it becomes the tag `event.<kind>`."""
        self._write({"time": _now(), "event": kind, "fields": fields})

    def position(self) -> dict[str, int | str]:
        """Flush to the disk and return the position for a checkpoint.

        While a resumed training still repeats logged steps, this is the position of the first
        entry to come: a training resumed from that checkpoint has to expect it too.
        """
        self.sync()
        first = self._expected.first_offset()
        return {_BYTES: self._size if first is None else first, _LOST: self.lost_lines}

    def resume(self, position: Mapping[str, int | str] | None) -> None:
        """Expect the entries behind a checkpoint's position, or of the whole log, once more.

        Call it before anything is logged.
        """
        offset = int(position.get(_BYTES, 0)) if position else 0
        self._lost_before = int(position.get(_LOST, 0)) if position else 0
        broken = _broken_lines(self.path, offset) if self._size else 0
        if offset > self._size or broken:
            lost = counted(broken, "line") if broken else f"{offset - self._size} bytes"
            self._warn(
                f"{self.path}: {lost} that the checkpoint knows of, gone or damaged; the log lacks"
                " the values in them"
            )
            self._lost_before += max(broken, 1)
            offset = min(offset, self._size)
        self._expected.read(self.path, offset)

    def sync(self) -> None:
        """Flush everything written so far to the disk."""
        self._flush()
        if self._file >= 0:
            try:
                os.fsync(self._file)
            except OSError as error:
                self._note_failure(error)

    def close(self) -> None:
        """Close the file; warn of missing lines and of repeated steps with other values."""
        self.sync()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self.lost_lines:
            self._warn(f"{self.path}: lacks {self._lost_text()}")
        if steps := self._expected.differing:
            self._warn(
                f"{self.path}: training again came to other values in {counted(len(steps), 'step')}"
                f" (the first is step {steps[0]}); the log has the earlier ones"
            )

    def unwritten(self) -> list[Entry]:
        """Return the values that the disk did not take, as far as they are still in memory."""
        return [entry for line in self._waiting if "values" in (entry := json.loads(line))]

    def finish(self) -> None:
        """Close the file and put a copy where people look for it, which no later run changes."""
        self.close()
        if self._shown is None or self._shown == self.path:
            return
        try:
            write_atomically(self._shown, self.path.read_bytes())
        except OSError as error:
            self._warn(f"{self._shown}: not written ({error.strerror}); the log is {self.path}")

    def _warn(self, text: str) -> None:
        if not self._quiet:
            logger.warning(text)

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            open_plain(self.path).close()
        self._unshare()
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = 0
        if os.fstat(file).st_size:
            with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as data:
                self._size = data.rfind(b"\n") + 1
            os.ftruncate(file, self._size)
        self._file = file

    def _unshare(self) -> None:
        """Break hard links to the file: DVC's cache may have one, and must not change."""
        if not self.path.is_file():
            return
        shown = self._shown
        if shown and shown != self.path and shown.exists() and shown.samefile(self.path):
            shown.unlink()
        if self.path.stat().st_nlink > 1:
            write_atomically(self.path, self.path.read_bytes())

    def _show(self) -> None:
        """Link the file to where people look for it; across file systems `finish` copies it."""
        if self._shown is None:
            return
        try:
            self._shown.parent.mkdir(parents=True, exist_ok=True)
            self._shown.unlink(missing_ok=True)
            os.link(self.path, self._shown)
        except OSError as error:
            self._warn(f"{self._shown}: comes at the end ({error.strerror}); follow {self.path}")

    def _open_elsewhere(self, error: OSError) -> None:
        """Write to `shown` if the lasting folder refuses; otherwise wait for room."""
        if self._shown is None:
            self._note_failure(error)
            return
        refused, self.path = self.path, self._shown
        try:
            self._shown.unlink(missing_ok=True)
            self._open()
        except OSError as second:
            self._note_failure(second)
            return
        self._warn(f"{refused}: cannot be written ({error.strerror}); the log is {self.path} alone")

    def _write(self, entry: Entry) -> None:
        line = (json.dumps(json_safe(entry), ensure_ascii=False, default=str) + "\n").encode()
        # Compared as it is read back: a tuple is a list in JSON, a path is text.
        if self._expected.take(json.loads(line)):
            return
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        self._flush()
        while self._waiting_bytes > _MAX_WAITING_BYTES:
            self._waiting_bytes -= len(self._waiting[0])
            self._dropped_steps.append(_step(json.loads(self._waiting.popleft()), -1))

    def _flush(self) -> None:
        """Write the waiting lines in order, as far as the disk takes them."""
        while self._waiting:
            try:
                self._append(self._waiting[0])
            except OSError as error:
                self._note_failure(error)
                return
            self._waiting_bytes -= len(self._waiting.popleft())
        if self._failed:
            self._failed = False
            lacks = f"it lacks {self._lost_text()}" if self.lost_lines else "nothing is missing"
            self._warn(f"{self.path}: written again; {lacks}")

    def _append(self, line: bytes) -> None:
        if self._file < 0:
            self._open()
        written = os.write(self._file, line)
        if written < len(line):
            os.ftruncate(self._file, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += written

    def _lost_text(self) -> str:
        waiting = (_step(json.loads(line), -1) for line in self._waiting)
        steps = [step for step in (*self._dropped_steps, *waiting) if step >= 0]
        which = f" (steps {min(steps)} to {max(steps)})" if steps else ""
        return f"{counted(self.lost_lines, 'line')}{which}"

    def _note_failure(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            self._warn(
                f"{self.path}: cannot be written ({error.strerror}); training goes on, lines are"
                " kept and written when there is room"
            )


def _now() -> float:
    """Return seconds since 1970, rounded to the milliseconds that MLflow keeps."""
    return round(time.time(), 3)
