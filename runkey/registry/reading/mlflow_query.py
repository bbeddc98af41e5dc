"""A `Query` in the language of MLflow's search, as far as that goes.

What is asked of the server may let more runs through than are meant, never fewer.
"""

from __future__ import annotations

import json
import math
from itertools import product

from runkey.identity.record import KEY
from runkey.registry.reading.query import Condition, Query

_ATTRIBUTES = {
    "run": "attributes.run_id",
    "name": "attributes.run_name",
    "status": "attributes.status",
    "started": "attributes.start_time",
    "ended": "attributes.end_time",
}
_SORTED_THERE = ("run", "name", "status", "started", "ended")


def filters(query: Query) -> list[tuple[str, bool]]:
    """Filters whose answers together hold every run that is meant.

    Returns:
        Each with whether it lets through only what is meant.
    """
    choices = [_terms(condition) for condition in query.conditions]
    exact = all(is_exact for _, is_exact in choices)
    key = f"tags.{KEY} LIKE '{query.prefix}%'"
    combinations = product(*(terms for terms, _ in choices))
    return [(" AND ".join([key, *filter(None, terms)]), exact) for terms in combinations]


def order_by(query: Query) -> tuple[str, ...] | None:
    """The order; None if the server cannot sort so (parameters would be sorted as text)."""
    direction = "DESC" if query.descending else "ASC"
    if query.sort.kind == "metrics" and "`" not in query.sort.name:
        return (f"metrics.`{query.sort.name}` {direction}",)
    if query.sort.kind == "run" and query.sort.name in _SORTED_THERE:
        return (f"{_ATTRIBUTES[query.sort.name]} {direction}",)
    return None


def _terms(condition: Condition) -> tuple[list[str], bool]:
    """Terms, one of which every run fulfils that fulfils the condition; whether only such do."""
    kind, name = condition.field.kind, condition.field.name
    if "`" in name or any(mark in condition.value for mark in "'\"\\`"):
        return [""], False
    if kind == "metrics":
        return _number_term(f"metrics.`{name}`", condition)
    if kind == "run" and name in ("started", "ended"):
        return _number_term(_ATTRIBUTES[name], condition)
    if kind == "run" and name not in _ATTRIBUTES:
        return [""], False
    column = _ATTRIBUTES[name] if kind == "run" else f"{kind}.`{name}`"
    if condition.operator == "~":
        # % and _ stand for other characters there.
        literal = not any(mark in condition.value for mark in "%_")
        return [f"{column} ILIKE '%{condition.value}%'"], literal
    if condition.operator == "=" and condition.number is None:
        return [f"{column} = '{condition.value}'"], True
    if condition.operator == "=":
        return [f"{column} = '{text}'" for text in _spellings(condition)], True
    return [""], False


def _number_term(column: str, condition: Condition) -> tuple[list[str], bool]:
    value = condition.number
    if value is None or not math.isfinite(value) or condition.operator == "~":
        return [""], False
    text = repr(int(value) if value.is_integer() else value)
    return [f"{column} {condition.operator} {text}"], True


def _spellings(condition: Condition) -> list[str]:
    """The texts that runs record a number as, and the one that was typed."""
    value = condition.number
    assert value is not None
    texts = {condition.value, json.dumps(value)}
    if value.is_integer():
        texts.add(json.dumps(int(value)))
    return sorted(texts)
