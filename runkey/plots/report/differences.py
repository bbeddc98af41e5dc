"""What differs between runs, and nothing that does not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runkey.identity.closure import code_rule
from runkey.identity.key import PARTS
from runkey.plots.report.source import Run
from runkey.plots.report.tables import (
    SCORES,
    Table,
    environment,
    only_differing,
    shown,
    span,
)

_SHORT = 12
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Differences:
    """Tables with a column for each run; empty ones where nothing differs."""

    parts: Table
    """Of the key."""
    parameters: Table
    code: Table
    """Files by their hashes."""
    packages: Table
    environment: Table
    scores: Table
    classes: Table
    """AP of each class."""

    @property
    def same_key(self) -> bool:
        """Whether all runs have the same key."""
        return not self.parts.rows


def differences(runs: Sequence[Run]) -> Differences:
    """Compare runs, at least two; the others are told against the first."""
    heads = ("", *(run.label for run in runs))
    names = sorted({name for run in runs for name in run.params})
    parameters = [[name, *(run.params.get(name, "not set") for run in runs)] for name in names]
    parts = [[part, *(run.parts.get(part, "")[:_SHORT] for run in runs)] for part in PARTS]
    return Differences(
        parts=Table(heads, only_differing(parts)),
        parameters=Table(heads, only_differing(parameters)),
        code=Table(heads, _code(runs)),
        packages=Table(heads, _maps(runs, _packages)),
        environment=Table(heads, only_differing(_environments(runs))),
        scores=Table(heads, [_took(runs), *_numbers(runs, _summary, SCORES)], numbers=True),
        classes=Table(heads, _numbers(runs, _per_class, _class_names(runs)), numbers=True),
    )


def _maps(runs: Sequence[Run], of: Callable[[Run], Mapping[str, str]]) -> list[Sequence[str]]:
    """A row for each name whose values differ; nothing if a run does not say."""
    maps = [of(run) for run in runs]
    if not all(maps):
        return []
    names = sorted({name for one in maps for name in one})
    return only_differing([name, *(one.get(name, "not there") for one in maps)] for name in names)


def _code(runs: Sequence[Run]) -> list[Sequence[str]]:
    """A row for each file that differs; hashes by different rules cannot be compared."""
    parts = [run.preimage("code") for run in runs]
    rules = [code_rule(part) for part in parts]
    if all(parts) and len(set(rules)) > 1:
        return [["rule of the hashes", *rules]]
    return _maps(runs, _files)


def _files(run: Run) -> Mapping[str, str]:
    return {name: text[:_SHORT] for name, text in run.preimage("code").get("files", {}).items()}


def _packages(run: Run) -> Mapping[str, str]:
    """Version and build by name."""
    packages = run.preimage("environment").get("packages", ())
    return {name: f"{version} {build}" for name, version, build, *_ in packages}


def _environments(runs: Sequence[Run]) -> list[list[str]]:
    tables = [{row[0]: _short(row[1]) for row in environment(run).rows} for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    return [[name, *(table.get(name, "") for table in tables)] for name in names]


def _short(text: str) -> str:
    """Commits cut to what people compare."""
    return text[:_SHORT] if _COMMIT.fullmatch(text) else text


def _took(runs: Sequence[Run]) -> list[str]:
    return ["took", *("" if run.seconds is None else span(run.seconds) for run in runs)]


def _numbers(
    runs: Sequence[Run], of: Callable[[Run], Mapping[str, Any]], names: Sequence[str]
) -> list[list[str]]:
    """A row for each name that any run has; from the second run on with the change."""
    values = [of(run) for run in runs]
    return [
        [name, *_cells([found.get(name) for found in values])]
        for name in names
        if any(found.get(name) is not None for found in values)
    ]


def _cells(values: Sequence[Any]) -> list[str]:
    first = values[0]
    cells = [shown(first)]
    for value in values[1:]:
        both = isinstance(first, (int, float)) and isinstance(value, (int, float))
        cells.append(f"{shown(value)} ({value - first:+.3f})" if both else shown(value))
    return cells


def _summary(run: Run) -> Mapping[str, Any]:
    return run.scores()


def _per_class(run: Run) -> Mapping[str, Any]:
    return {name: c.get("AP") for name, c in run.scores().get("per_class", {}).items()}


def _class_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in _per_class(run)))
