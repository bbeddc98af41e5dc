"""The lines of a log: read back, and recognised when a resumed training logs them again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
