"""Questions about runs: conditions, order, limit.

    Query(conditions=(parse_condition("AP>0.6", known),), sort=find_field("lr", known), limit=20)

A library answers them by `find`; what a question means is defined here, once for both libraries,
and as far as that goes in the language of MLflow's search.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import product
from operator import eq, ge, gt, le, lt, ne
from sqlite3 import Connection
from typing import Literal, get_args

from runkey.errors import RegistryError
from runkey.identity.key import ANY_KEY
from runkey.identity.record import KEY, SPLIT, LoggedRun, Record, Status

Kind = Literal["run", "params", "metrics", "tags"]
Value = str | float | None

ATTRIBUTES = ("key", "run", "name", "status", "started", "ended", "seconds")
"""Attributes of every run; times in milliseconds since 1970, seconds from start to end."""
NAMES = {"AP": "eval/AP", "AP50": "eval/AP50", "AP75": "eval/AP75"}
"""Short names of metrics in commands."""
TAGS = (
    "decision",
    "device",
    "host",
    "micro_batch",
    "precision",
    "reproduction_of",
    "snapshot",
    SPLIT,
)
"""Tags that need no `tags.` before their name."""
# A value that begins with another operator is a mistake, such as `AP=>0.6` or `AP==0.6`.
_CONDITION = re.compile(r"\s*([\w\-. :/]+?)\s*(>=|<=|!=|=|>|<|~)\s*([^\s=<>!~].*?)\s*")
_LENGTHS = {"key": 68, "run": 32}
"""Characters of a whole key and of a whole MLflow id."""
_TIMES = ("started", "ended")
_COMPARE = {"=": eq, "!=": ne, "<": lt, "<=": le, ">": gt, ">=": ge}


@dataclass(frozen=True)
class Field:
    """A value that runs have."""

    kind: Kind
    name: str
    """One of `ATTRIBUTES` for a run, else MLflow's name."""

    def of(self, run: LoggedRun) -> Value:
        """Return its value in a run, or None."""
        if self.kind == "run":
            return _attribute(run, self.name)
        if self == _SPLIT:
            return run.split
        values: dict[str, str] | dict[str, float] = getattr(run, self.kind)
        return values.get(self.name)


STARTED, RUN = Field("run", "started"), Field("run", "run")
_SPLIT = Field("tags", SPLIT)
"""Older runs have no such tag: their results are of val."""


@dataclass(frozen=True)
class Condition:
    """A condition on one value of a run."""

    field: Field
    operator: str
    """One of = != < <= > >= and ~ (contains, ignoring case)."""
    value: str

    def holds(self, value: Value) -> bool:
        """Return True if a run with that value fulfils it; without a value none does."""
        if value is None:
            return False
        if self.operator == "~":
            return self.value.lower() in str(value).lower()
        left, right = number(value), number(self.value)
        if left is not None and right is not None:
            return bool(_COMPARE[self.operator](left, right))
        if self.operator in ("=", "!="):
            return bool(_COMPARE[self.operator](str(value), self.value))
        return False


@dataclass(frozen=True)
class Query:
    """A question about the runs of a store."""

    prefix: str = ANY_KEY
    """Prefix of the keys."""
    conditions: tuple[Condition, ...] = ()
    sort: Field = STARTED
    descending: bool = True
    """Either way runs without a value come last, and equal ones newest first."""
    limit: int | None = None

    @property
    def fields(self) -> tuple[Field, ...]:
        """The values that `choose` needs of each run."""
        return (STARTED, RUN, self.sort, *(condition.field for condition in self.conditions))

    def holds(self, value: Callable[[Field], Value]) -> bool:
        """Return True if a run with these values fulfils all conditions."""
        return all(condition.holds(value(condition.field)) for condition in self.conditions)


def choose[T](items: Iterable[T], query: Query, value: Callable[[T, Field], Value]) -> list[T]:
    """Return the items that a query selects, in its order; `value` returns an item's field."""
    kept = [item for item in items if query.holds(partial(value, item))]
    kept.sort(key=lambda item: (-(number(value(item, STARTED)) or 0), str(value(item, RUN))))
    rows = [(value(item, query.sort), item) for item in kept]  # newest first
    absent = [item for found, item in rows if found is None]
    present = [(number(found), str(found), item) for found, item in rows if found is not None]
    if any(as_number is None for as_number, _, _ in present):
        present.sort(key=lambda row: row[1], reverse=query.descending)
    else:
        absent = [item for as_number, _, item in present if as_number != as_number] + absent  # NaN
        present = [row for row in present if row[0] == row[0]]
        present.sort(key=lambda row: row[0] or 0.0, reverse=query.descending)
    return ([item for _, _, item in present] + absent)[: query.limit]


def select(database: Connection, query: Query) -> tuple[list[dict[Field, Value]], list[str]]:
    """Read what `choose` needs of every run in the cache whose key begins with the prefix.

    Returns:
        The values of each run, and the MLflow ids of those whose values are damaged, left out.
    """
    kinds = sorted({field.kind for field in query.fields} - {"run"})
    columns = [
        f"CASE WHEN json_valid({field.kind}) THEN json_extract({field.kind}, ?) END"
        if field.kind != "run"
        else field.name.replace("seconds", "(ended - started) / 1000")
        for field in query.fields
    ]
    # json_extract and json_type of what is no JSON would end the query for all runs.
    whole = [
        f"CASE WHEN json_valid({kind}) THEN json_type({kind}) = 'object' ELSE 0 END"
        for kind in kinds
    ]
    columns = [
        f"COALESCE({column}, 'val')" if field == _SPLIT else column
        for column, field in zip(columns, query.fields, strict=True)
    ]
    names = [f'$."{field.name}"' for field in query.fields if field.kind != "run"]
    rows = database.execute(
        f"SELECT {', '.join([*columns, ' AND '.join(whole) or '1'])} FROM runs"
        " WHERE key >= ? AND key < ?",
        (*names, query.prefix, f"{query.prefix}~"),
    )
    found: list[dict[Field, Value]] = []
    damaged: list[str] = []
    for *values, is_whole in rows:
        row = dict(zip(query.fields, values, strict=True))
        if is_whole:
            found.append(row)
        else:
            damaged.append(str(row[RUN]))
    return found, damaged


def value_of(record: Record, field: Field) -> Value:
    """Return the value of a field of a run, for `choose`."""
    return field.of(record.run)


def find_field(name: str, known: Callable[[], Sequence[LoggedRun]]) -> Field:
    """Return the value that a user means by a name, which is looked up in some `known` runs.

    It names an attribute of a run, a metric, a parameter or a tag.  The last part of a parameter
    will do (`epochs`); `params.`, `metrics.` or `tags.` before it says which it is.  RegistryError
    if no name, or more than one, ends so.
    """
    if (field := _fixed_field(name)) is not None:
        return field
    names = {kind: {n for run in known() for n in getattr(run, kind)} for kind in _KINDS}
    for kind in _KINDS:
        if name in names[kind]:
            return Field(kind, name)
    ends = sorted(
        n for kind in _KINDS for n in names[kind] if re.search(rf"[./]{re.escape(name)}$", n)
    )
    if len(ends) == 1:
        return find_field(ends[0], known)
    if ends:
        raise RegistryError(f"{name}: {', '.join(ends[:6])} end so; say which")
    if not known() or "/" in name:
        return Field("metrics" if "/" in name else "params", name)
    leaves = {n.rpartition(".")[2] for n in names["params"]}
    from difflib import get_close_matches

    near = get_close_matches(name, [*ATTRIBUTES, *NAMES, *leaves, *set().union(*names.values())])
    hint = f"; like it: {', '.join(near)}" if near else "; `runkey show KEY --all` lists the names"
    raise RegistryError(f"{name}: no run has a value of that name{hint}")


def _fixed_field(name: str) -> Field | None:
    """Return the value that a name means in every store; None if it depends on the runs."""
    if name in ATTRIBUTES:
        return Field("run", name)
    for kind in _KINDS:
        if name.startswith(f"{kind}."):
            return Field(kind, name.removeprefix(f"{kind}."))
    if name in NAMES:
        return Field("metrics", NAMES[name])
    return Field("tags", name) if name in TAGS else None


def parse_condition(text: str, known: Callable[[], Sequence[LoggedRun]]) -> Condition:
    """Parse a condition such as `lr=5e-05`, `eval/AP>0.6`, `name~warm`; RegistryError if none."""
    match = _CONDITION.fullmatch(text)
    if not match:
        raise RegistryError(
            f"{text}: not a condition; one is NAME=VALUE, with = != < <= > >= or ~ (contains)"
        )
    name, comparison, value = match.groups()
    field = find_field(name, known)
    if field.kind == "run" and field.name in _TIMES:
        value = str(_milliseconds(text, value))
    elif field == Field("run", "status") and comparison != "~":
        value = value.upper()
        if value not in get_args(Status):
            dead = "; a DEAD run is RUNNING to MLflow" if value == "DEAD" else ""
            raise RegistryError(f"{text}: not one of {', '.join(get_args(Status))}{dead}")
    elif field.kind == "run" and comparison[-1] == "=" and len(value) < _LENGTHS.get(field.name, 0):
        raise RegistryError(f"{text}: no whole {field.name}; {field.name}~{value} finds a part")
    is_number = field.kind == "metrics" or field.name == "seconds"
    compares = comparison[0] in "<>" or (is_number and comparison != "~")
    # NaN fulfils no comparison.
    if compares and ((limit := number(value)) is None or math.isnan(limit)):
        raise RegistryError(f"{text}: {comparison} compares numbers; {value!r} is none")
    return Condition(field, comparison, value)


def number(value: Value) -> float | None:
    """Return a value as a number, or None."""
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


_KINDS: tuple[Literal["metrics", "params", "tags"], ...] = ("metrics", "params", "tags")


def _attribute(run: LoggedRun, name: str) -> Value:
    if name == "started":
        return float(run.started_ms)
    if name in ("ended", "seconds"):
        if run.ended_ms is None:
            return None
        return float(run.ended_ms) if name == "ended" else (run.ended_ms - run.started_ms) / 1000
    return {"key": run.key, "run": run.run_id, "name": run.name, "status": run.status}[name]


def _milliseconds(text: str, value: str) -> int:
    """Convert a local day or time, or milliseconds, to milliseconds since 1970."""
    if value.isdigit() and len(value) > 8:
        return int(value)
    try:
        return round(datetime.fromisoformat(value).astimezone().timestamp() * 1000)
    except ValueError:
        raise RegistryError(f"{text}: not a time; write 2026-11-22 or 2026-11-22T14:30") from None


# --- the language of MLflow's search

_ATTRIBUTES = {
    "run": "attributes.run_id",
    "name": "attributes.run_name",
    "status": "attributes.status",
    "started": "attributes.start_time",
    "ended": "attributes.end_time",
}


def filters(query: Query) -> list[tuple[str, bool]]:
    """Return filters whose answers together hold every run of the query.

    With each comes True if its answer holds no other run.
    """
    choices = [_terms(condition) for condition in query.conditions]
    exact = all(is_exact for _, is_exact in choices)
    key = f"tags.{KEY} LIKE '{query.prefix}%'"
    combinations = product(*(terms for terms, _ in choices))
    return [(" AND ".join([key, *filter(None, terms)]), exact) for terms in combinations]


def order_by(query: Query) -> tuple[str, ...] | None:
    """Return the order; None if the server cannot sort so (it sorts parameters as text)."""
    column = _column(query.sort) if query.sort.kind in ("metrics", "run") else None
    return (f"{column} {'DESC' if query.descending else 'ASC'}",) if column else None


def _column(field: Field) -> str | None:
    if field.kind == "run":
        return _ATTRIBUTES.get(field.name)
    return None if "`" in field.name else f"{field.kind}.`{field.name}`"


def _terms(condition: Condition) -> tuple[list[str], bool]:
    """Return terms, one of which holds for every run of the condition; and if only for such."""
    field, value, column = condition.field, number(condition.value), _column(condition.field)
    if column is None or field == _SPLIT or any(mark in condition.value for mark in "'\"\\`"):
        return [""], False
    if field.kind == "metrics" or field in map(partial(Field, "run"), _TIMES):
        if value is None or not math.isfinite(value) or condition.operator == "~":
            return [""], False
        text = repr(int(value) if value.is_integer() else value)
        return [f"{column} {condition.operator} {text}"], True
    if condition.operator == "~":
        # % and _ are wildcards there.
        literal = not any(mark in condition.value for mark in "%_")
        return [f"{column} ILIKE '%{condition.value}%'"], literal
    if condition.operator != "=":
        return [""], False
    texts = {condition.value}
    if value is not None:  # as a run may record it
        texts |= {json.dumps(value), json.dumps(int(value) if value.is_integer() else value)}
    return [f"{column} = '{text}'" for text in sorted(texts)], True
