"""Lineage: which run's weights a run was started from, and which runs were started from its own.

    for line in draw(family(library, find_run(library, "rk2-1d0c"))): say(line)

The relation is the hash of the weights, which is in the child's key, so a run cannot be its own
ancestor. A run records it (`StartedFrom`); of older runs it is read from key.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runkey.errors import RegistryError
from runkey.files import parse_json
from runkey.identity.initial_weights import recorded_with, weights_of
from runkey.identity.key import FILE_PARAMS, short_key
from runkey.identity.pinned_weights import pinned_of
from runkey.identity.record import KEY_JSON, STARTED_WEIGHTS, Record, StartedFrom
from runkey.registry.library import Library, LocalLibrary, canonical, find_run
from runkey.registry.query import Condition, Field, Query
from runkey.registry.show import Row, average_precision, data_label, split_of

_HASHED = re.compile(r"sha256:([0-9a-f]{64})")
_NO_FILE = ("null", "none", "imagenet")
"""`NO_FILE` as MLflow has it."""


def started_from(
    keyed: Mapping[str, Any], params: Mapping[str, Any], cache: Path | None
) -> StartedFrom | None:
    """Return what a training begins with; its parent is found by the hash of the weights.

    Args:
        keyed: parameters as the key has them: a file's hash in place of its name.
        params: parameters as params.yaml has them; empty: not known.
        cache: of the runs in the store, see `runkey.paths.records`; None: no store.
    """
    name, weights = initial_weights(keyed)
    if not weights:
        return None
    runs: list[Record] = []
    with suppress(RegistryError):
        runs = recorded_with(weights, cache) if cache else []
    # Several runs may have the same weights: the one that is named, else the oldest.
    digits = str(params.get(name, "")).rpartition("-")[2] or "-"
    named = [run for run in runs if run.key.partition("-")[2].startswith(digits)]
    chosen = canonical(named or runs) if runs else None
    return StartedFrom(param=name, weights=weights, key=chosen.key if chosen else None)


def initial_weights(keyed: Mapping[str, Any]) -> tuple[str, str]:
    """Return the parameter that names initial weights and their sha256; empty texts if none."""
    for name in reversed(FILE_PARAMS):  # with init_from, backbone_weights is not read
        if match := _HASHED.match(str(keyed.get(name))):
            return name, match[1]
    return "", ""


def origin(library: Library, record: Record) -> StartedFrom | None:
    """Return what a run was started from, also of runs that did not record it yet."""
    if found := record.started_from:
        return found
    values = {name: record.run.params.get(name, _NO_FILE[0]) for name in FILE_PARAMS}
    named = [name for name in reversed(FILE_PARAMS) if values[name] not in _NO_FILE]
    if not named:
        return None
    with suppress(RegistryError, ValueError, KeyError, OSError):
        with library.open_file(library.with_details(record), KEY_JSON) as file:
            keyed = parse_json(file.read())["preimages"]["params"]
        return started_from(keyed, values, library.path)
    with suppress(RegistryError, IndexError):  # without its key.json: by the key that it names
        parent = find_run(library, values[named[0]])
        return StartedFrom(param=named[0], weights=weights_of(parent)[0], key=parent.key)
    return None


def parent_of(library: Library, began: StartedFrom) -> Record | None:
    """Return the run that wrote some weights; None if it is not in the library."""
    runs = map(library.with_details, library.matching(began.key)) if began.key else ()
    found = [run for run in runs if began.weights in weights_of(run)]
    found = found or recorded_with(began.weights, library.path)
    return canonical(found) if found else None


def children(library: Library, record: Record) -> list[Record]:
    """Return the runs that were started from a run's weights, one of each key, oldest first."""
    weights = weights_of(record)
    if isinstance(library, LocalLibrary):
        asked = [
            tuple(Condition(Field("params", name), "!=", none) for none in _NO_FILE)
            for name in FILE_PARAMS
        ]
    else:  # to ask a server for all runs would take long
        asked = [(Condition(Field("tags", STARTED_WEIGHTS), "=", one),) for one in weights]
    queries = [Query(conditions=conditions, descending=False) for conditions in asked]
    found: dict[str, list[Record]] = {}
    for child in (one for query in queries for one in library.find(query)):
        began = origin(library, child)
        is_own = began and began.weights in weights and began.key in (None, record.key)
        if is_own and child.key != record.key and child not in found.get(child.key, ()):
            found.setdefault(child.key, []).append(child)
    return list(map(canonical, found.values()))


def rows(library: Library, record: Record) -> Iterator[Row]:
    """Yield rows for `runkey show`: the parent, and the runs that continue this one."""
    if began := origin(library, record):
        parent = parent_of(library, began)
        text = _about(parent) if parent else _missing(began)
        yield "started from", f"{text} ({began.param})"
    for index, child in enumerate(children(library, record)):
        yield "" if index else "continued by", _about(child)


def _about(record: Record) -> str:
    run, ap = record.run, average_precision(record.run)
    score = f"AP {ap}" if ap else run.status.lower()
    score += " on test" if split_of(run) == "test" else ""
    return f"{record.label}  {score}  data {data_label(run)}  {run.name}".rstrip()


def _missing(began: StartedFrom) -> str:
    if began.key is None:
        row = pinned_of(began.weights)
        return row.about if row else f"{began.label} of no recorded run"
    short = short_key(began.key)
    return f"{short}: missing here; `runkey fetch {short}` looks on the team's server"


# --- the tree of a run's relatives


@dataclass
class Relative:
    """A run in a family, with the runs that were started from it."""

    label: str
    """Short key, or the hash of weights that no run wrote."""
    text: str
    """The line that is shown."""
    record: Record | None
    """None: missing."""
    is_asked: bool = False
    children: list[Relative] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        run = self.record and self.record.run
        return {
            "key": run.key if run else None,
            "label": self.label,
            "run_id": run.run_id if run else None,
            "name": run.name if run else None,
            "AP": run.metrics.get("eval/AP") if run else None,
            "split": run.split if run else None,
            "data": run.parts["data"] if run else None,
            "is_asked": self.is_asked,
            "children": [child.as_dict() for child in self.children],
        }


def family(library: Library, record: Record) -> Relative:
    """Return the oldest known ancestor of a run, with all that descend from it."""
    top, seen = record, {record.key}
    while began := origin(library, top):
        parent = parent_of(library, began)
        if parent is None:
            known = _descend(library, top, record.key, set())
            return Relative(began.label, _missing(began), None, children=[known])
        if parent.key in seen:  # records that somebody forged
            break
        top = parent
        seen.add(top.key)
    return _descend(library, top, record.key, set())


def _descend(library: Library, record: Record, asked: str, seen: set[str]) -> Relative:
    seen.add(record.key)
    found = Relative(record.label, _about(record), record, is_asked=record.key == asked)
    for child in children(library, record):
        if child.key not in seen:
            found.children.append(_descend(library, library.with_details(child), asked, seen))
    return found


def draw(top: Relative) -> Iterator[str]:
    """Yield the lines of a tree; the run that was asked for is marked."""
    yield f"{top.text}{'  <- this run' if top.is_asked else ''}"
    for index, child in enumerate(top.children):
        is_last = index == len(top.children) - 1
        for number, line in enumerate(draw(child)):
            stem = ("`- " if is_last else "|- ") if number == 0 else ("   " if is_last else "|  ")
            yield stem + line
