"""The log that is always written: one JSON object a line, whole after a crash.

    {"step": 10, "time": 1763815420.1, "values": {"train/loss": 1.5}}
    {"time": 1763815421.7, "event": "early_stop", "fields": {"step": 120, "epoch": 12}}

Numbers that JSON does not have (nan, inf) are written as strings, which `float()` reads back.

An interrupted training's log goes on where it ended.  The steps since its last checkpoint are
trained again and come to the same values; they are recognised, and the first lines stay, with
their times.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# The lines of a log: read back, and recognised when a resumed training logs them again.


Entry = dict[str, Any]
"""Values, `{"step": 10, "time": .., "values": {..}}`, or an event, `{"time": .., "event": ..,
"fields": {..}}`."""

ALWAYS_NEW = ("resumed",)
"""Events that are never one that was logged before: the second time is a second one."""
_WALL_TIME = ("seconds", "per_second", "data_wait_share")
"""Ends of the names of values that tell how fast the machine was: no two runs agree on them."""


def read_jsonl(path: Path) -> Iterator[Entry]:
    """The objects of a log, without lines that a crash or a full disk cut short."""
    with path.open("rb") as file:
        for line in file:
            if (entry := parse_line(line)) is not None:
                yield entry


def parse_line(line: bytes) -> Entry | None:
    """The entry in a line; None: it was cut short, or is something else."""
    try:
        entry = json.loads(line)
        is_whole = ("values" in entry and "step" in entry) or (
            "event" in entry and "fields" in entry
        )
        return entry if is_whole and "time" in entry else None
    except (ValueError, TypeError):
        return None


def time_ms(entry: Entry) -> int:
    """When an entry was made, in milliseconds since 1970: the timestamp of its points in MLflow."""
    return round(float(entry["time"]) * 1000)


class ExpectedEntries:
    """Entries that lie in the log already and that a resumed training will make again.

    Values are recognised by their step and names, events by kind and fields.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[int, tuple[str, ...]], tuple[int, dict[str, Any]]] = {}
        self._events: dict[str, list[tuple[int, int | None]]] = {}
        self._step = 0
        self.differing: list[int] = []
        """Steps at which values came again with other numbers."""

    @classmethod
    def read(cls, path: Path, offset: int) -> ExpectedEntries:
        """Those of the log's lines that begin at `offset` or later."""
        expected = cls()
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                expected.add(parse_line(line) or {}, offset)
                offset += len(line)
        return expected

    def add(self, entry: Entry, offset: int) -> None:
        """Expect the entry whose line begins at `offset`."""
        if "event" in entry:
            if entry["event"] not in ALWAYS_NEW:
                place = offset, entry["fields"].get("step")
                self._events.setdefault(_event_name(entry), []).append(place)
        elif "values" in entry:
            self._values[_place(entry)] = offset, entry["values"]

    def take(self, entry: Entry) -> bool:
        """Whether the entry is one of those expected; it is expected no more then."""
        if "event" in entry:
            name = _event_name(entry)
            places = self._events.pop(name, [])
            if places[1:]:
                self._events[name] = places[1:]
            return bool(places)
        self._step = entry["step"]
        _, before = self._values.pop(_place(entry), (0, None))
        if before is not None and _without_pace(before) != _without_pace(entry["values"]):
            self.differing.append(entry["step"])
        return before is not None

    def first(self) -> int | None:
        """Where the first entry that is still expected begins; None: none is.

        What has not come by its step does not come: `runtime.log_every` is another one now, or the
        entry told of the machine.
        """
        values = (offset for (step, _), (offset, _) in self._values.items() if step >= self._step)
        places = (place for places in self._events.values() for place in places)
        events = (offset for offset, step in places if step is None or step >= self._step)
        return min((*values, *events), default=None)


def _place(entry: Entry) -> tuple[int, tuple[str, ...]]:
    return entry["step"], tuple(sorted(entry["values"]))


def _event_name(entry: Entry) -> str:
    return json.dumps([entry["event"], _without_pace(entry.get("fields", {}))], sort_keys=True)


def _without_pace(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not name.endswith(_WALL_TIME)}


_BYTES, _LOST = "log_bytes", "log_lost_lines"
_MOST_WAITING_BYTES = 64 << 20
"""Of lines that a full disk did not take: a hundred thousand, hours of training."""


class JsonlLog:
    """Appends to a JSONL file, line by line, whatever its disk does.  Nothing here raises."""

    def __init__(self, path: Path, say: Callable[[str], None], shown: Path | None = None) -> None:
        """Open `path` to go on with it; its folder is made, and a line that is cut short goes.

        Args:
            path: the file, in a folder that outlives the process.
            say: told once, in one line, if the file can no longer be written (disk full).
            shown: where people look for it: a link to `path` until `finish` makes a copy.
        """
        self.path = path
        self.say = say
        self._shown = shown
        self._file = -1
        self._size = 0
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._gone: list[int] = []
        self._gone_before = 0
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
        """Lines that the file lacks."""
        return self._gone_before + len(self._gone) + len(self._waiting)

    def log(self, values: Mapping[str, float], step: int) -> int | None:
        """Write the values of one step.

        Returns:
            The line's time in milliseconds since 1970; None if the step's line is there already.
        """
        return self._write({"step": step, "time": _now(), "values": _plain(values)})

    def event(self, kind: str, **fields: object) -> int | None:
        """Write something that happened, such as `early_stop`; returns what `log` returns."""
        return self._write({"time": _now(), "event": kind, "fields": _plain(fields)})

    def position(self) -> dict[str, int | str]:
        """Where the log is now, for a checkpoint; what is before it is on the disk.

        Of a training that has not yet come again to where it was interrupted, this is before the
        entries that are still expected: the next one after it has to expect them as well.
        """
        self.sync()
        first = self._expected.first()
        return {_BYTES: self._size if first is None else first, _LOST: self.lost_lines}

    def resume(self, position: Mapping[str, int | str] | None) -> None:
        """Expect what lies behind a checkpoint's position to come again; None: the whole log.

        Comes before anything is logged.
        """
        offset = int(position.get(_BYTES, 0)) if position else 0
        self._gone_before = int(position.get(_LOST, 0)) if position else 0
        if offset > self._size:
            self.say(
                f"{self.path}: {offset - self._size} of the {offset} bytes that the checkpoint"
                " knows of are gone; the log lacks the values in them"
            )
            offset = self._size
        with contextlib.suppress(FileNotFoundError):
            self._expected = ExpectedEntries.read(self.path, offset)

    def sync(self) -> None:
        """Return when what was written is on the disk."""
        self._flush()
        if self._file >= 0:
            try:
                os.fsync(self._file)
            except OSError as error:
                self._note(error)

    def close(self) -> None:
        """Close the file; say what it lacks, and whether steps that came again were the same."""
        self.sync()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self.lost_lines:
            self.say(f"{self.path}: lacks {self._lacks()}")
        if steps := self._expected.differing:
            self.say(
                f"{self.path}: {len(steps)} steps that were trained again came to other values"
                f" (the first is step {steps[0]}); the log has the earlier ones"
            )

    def unwritten(self) -> list[Entry]:
        """The values that the disk did not take, as far as they are remembered."""
        return [entry for line in self._waiting if "values" in (entry := json.loads(line))]

    def finish(self) -> None:
        """Close the file and put a copy where people look for it, which no later run changes."""
        self.close()
        if self._shown is None or self._shown == self.path:
            return
        temporary = self._shown.with_name(f".{self._shown.name}.{os.getpid()}")
        try:
            shutil.copyfile(self.path, temporary)
            temporary.replace(self._shown)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            self.say(f"{self._shown}: not written ({error.strerror}); the log is {self.path}")

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._unshare()
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = _whole_bytes(file)
        if self._size < os.fstat(file).st_size:
            os.ftruncate(file, self._size)
        self._file = file

    def _unshare(self) -> None:
        """A file that something else links to, DVC's cache perhaps, is not to be changed."""
        both = self._shown and self._shown.exists() and self.path.exists()
        if self._shown and both and self._shown.samefile(self.path) and self._shown != self.path:
            self._shown.unlink()
        if self.path.is_file() and self.path.stat().st_nlink > 1:
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            shutil.copyfile(self.path, temporary)
            temporary.replace(self.path)

    def _show(self) -> None:
        """Link the file to where people look for it; across file systems it comes at the end."""
        if self._shown is None:
            return
        try:
            self._shown.parent.mkdir(parents=True, exist_ok=True)
            self._shown.unlink(missing_ok=True)
            os.link(self.path, self._shown)
        except OSError as error:
            self.say(f"{self._shown}: comes at the end ({error.strerror}); follow {self.path}")

    def _open_elsewhere(self, error: OSError) -> None:
        """Write where people look, if the lasting folder refuses; else wait for room."""
        if self._shown is None:
            self._note(error)
            return
        place, self.path = self.path, self._shown
        try:
            self._shown.unlink(missing_ok=True)
            self._open()
        except OSError as second:
            self._note(second)
            return
        self.say(f"{place}: cannot be written ({error.strerror}); the log is {self.path} alone")

    def _write(self, entry: Entry) -> int | None:
        line = (json.dumps(entry, ensure_ascii=False, default=str) + "\n").encode()
        # As it will be read back: a tuple is a list in JSON, a path is text.
        if self._expected.take(json.loads(line)):
            return None
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        self._flush()
        while self._waiting_bytes > _MOST_WAITING_BYTES:
            self._waiting_bytes -= len(self._waiting[0])
            self._gone.append(_step(self._waiting.popleft()))
        return time_ms(entry)

    def _flush(self) -> None:
        """Write the lines that wait, in order, as far as the disk takes them."""
        while self._waiting:
            try:
                self._append(self._waiting[0])
            except OSError as error:
                self._note(error)
                return
            self._waiting_bytes -= len(self._waiting.popleft())
        if self._failed:
            self._failed = False
            lacks = f"it lacks {self._lacks()}" if self.lost_lines else "nothing is missing"
            self.say(f"{self.path}: written again; {lacks}")

    def _append(self, line: bytes) -> None:
        if self._file < 0:
            self._open()
        written = os.write(self._file, line)
        if written < len(line):
            os.ftruncate(self._file, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += written

    def _lacks(self) -> str:
        steps = [step for step in (*self._gone, *map(_step, self._waiting)) if step >= 0]
        which = f" (steps {min(steps)} to {max(steps)})" if steps else ""
        return f"{self.lost_lines} line{'s' * (self.lost_lines != 1)}{which}"

    def _note(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            self.say(
                f"{self.path}: cannot be written ({error.strerror}); training goes on, lines are"
                " kept and written when there is room"
            )


def _whole_bytes(file: int) -> int:
    """Bytes up to the end of a file's last whole line."""
    end = os.fstat(file).st_size
    while end:
        begin = max(end - 65536, 0)
        if (last := os.pread(file, end - begin, begin).rfind(b"\n")) >= 0:
            return begin + last + 1
        end = begin
    return 0


def _step(line: bytes) -> int:
    """The step of a line; -1: an event that has none."""
    entry = json.loads(line)
    return int(entry.get("step", entry.get("fields", {}).get("step", -1)))


def _now() -> float:
    """Seconds since 1970, to the millisecond."""
    return round(time.time(), 3)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
