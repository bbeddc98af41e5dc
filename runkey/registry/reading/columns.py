"""What `runkey list` shows of a run in each column."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from runkey.identity.record import LoggedRun, Record
from runkey.registry.reading.query import NAMES, Field, Value, find_field, number

COLUMNS = ("key", "when", "status", "AP", "took", "name", "where")
"""Shown when nothing else is asked for."""
RIGHT = ("AP", "took")
"""Those that are flush right."""
_RUN_DIGITS = 4
_DIGEST = re.compile("[0-9a-f]{40,64}")
_DIGEST_DIGITS = 12
_DAY = 86_400.0


def cells(
    records: Sequence[Record], columns: Sequence[str], states: Mapping[str, str], now: float
) -> list[list[str]]:
    """The text of each column of each run.

    Args:
        records: in the order of the rows.
        columns: names in `COLUMNS`, or what `find_field` knows.
        states: status as it is now, by run id.
        now: seconds since 1970.

    Raises:
        RegistryError: a column has no such name.
    """
    known = [record.run for record in records]
    times_seen = Counter(record.key for record in records)
    show = {column: _show(column, known, times_seen, states, now) for column in columns}
    return [[show[column](record) for column in columns] for record in records]


def is_number_column(column: str, rows: Sequence[str]) -> bool:
    """Whether a column looks best flush right."""
    return column in RIGHT or (any(rows) and all(number(c) is not None for c in rows if c))


def ago(started_ms: int, now: float) -> str:
    """When something was, such as `5 min ago`; a day after a day."""
    seconds = max(0.0, now - started_ms / 1000)
    if seconds < _DAY:
        return f"{span(seconds)} ago"
    return time.strftime("%Y-%m-%d", time.localtime(started_ms / 1000))


def span(seconds: float) -> str:
    """A duration in its largest unit: `35 s`, `4 min`, `2.5 h`, `3.1 d`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.3g} h" if seconds < 2 * _DAY else f"{seconds / _DAY:.3g} d"


def size(count: int) -> str:
    """Bytes for people: `310 B`, `1.2 kB`, `45.1 MB`."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 999.5:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def text(value: Value) -> str:
    """A value for people: numbers with 4 digits, nothing for nothing."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else value


def address(record: Record) -> str:
    """What names this run and no other of its key."""
    return f"{record.label}:{record.run.run_id[:_RUN_DIGITS]}"


def average_precision(run: LoggedRun) -> str:
    """COCO AP on the held-out images; in brackets: the last one that training itself measured."""
    if (final := run.metrics.get(NAMES["AP"])) is not None:
        return f"{final:.3f}"
    last = run.metrics.get("val/AP")
    return "" if last is None else f"({last:.3f})"


def _show(
    column: str,
    known: Sequence[LoggedRun],
    times_seen: Counter[str],
    states: Mapping[str, str],
    now: float,
) -> Callable[[Record], str]:
    if column == "key":
        return lambda r: address(r) if times_seen[r.key] > 1 or r.reproduction_of else r.label
    if column == "status":
        return lambda r: states[r.run.run_id]
    if column == "when":
        return lambda r: ago(r.run.started_ms, now)
    if column in _OWN:
        return _OWN[column]
    field = find_field(column, known)
    return lambda r: _plain(r, field)


def _plain(record: Record, field: Field) -> str:
    value = field.of(record.run)
    if field == Field("run", "name"):
        times = record.run.resumed
        remarks = (
            *(("reproduction",) if record.reproduction_of else ()),
            *((f"resumed {times}x",) if times else ()),
        )
        return f"{value} ({', '.join(remarks)})" if remarks else str(value)
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return value[:_DIGEST_DIGITS]
    if field.kind == "run" and field.name in ("started", "ended") and isinstance(value, float):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value / 1000))
    return text(value)


def _took(record: Record) -> str:
    seconds = Field("run", "seconds").of(record.run)
    return span(seconds) if isinstance(seconds, float) else ""


def _where(record: Record) -> str:
    return " ".join(filter(None, (record.run.tags.get(name) for name in ("host", "device"))))


_OWN: dict[str, Callable[[Record], str]] = {
    "AP": lambda record: average_precision(record.run),
    "took": _took,
    "where": _where,
}
