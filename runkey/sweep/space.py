"""The points of a sweep: a grid, a list in a file, random ones, or what Optuna's TPE proposes."""

from __future__ import annotations

import csv
import io
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runkey.errors import ParamsError
from runkey.files import FormatError, read_text
from runkey.params.load import as_text, parse_yaml

Point = dict[str, Any]
"""Values by dotted name."""
MOST_POINTS = 10_000


@dataclass(frozen=True)
class Choices:
    """Some values of a parameter: `lr=1e-4,3e-4`."""

    values: tuple[Any, ...]

    def draw(self, rng: random.Random) -> Any:
        """Return a random value."""
        return rng.choice(self.values)


@dataclass(frozen=True)
class Range:
    """A range of a parameter: `lr=log:1e-5:1e-3`, `model.dropout=uniform:0:0.3`, `n=int:1:8`."""

    kind: str
    low: float
    high: float

    def draw(self, rng: random.Random) -> float | int:
        """Return a random value, ends included; 4 digits, so that it can be read and typed."""
        if self.kind == "int":
            return rng.randint(int(self.low), int(self.high))
        if self.kind == "log":
            return rounded(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return rounded(rng.uniform(self.low, self.high))


Space = dict[str, Choices | Range]
"""What each parameter may be, by dotted name."""
KINDS = ("log", "uniform", "int")


def rounded(value: float) -> float:
    """Round to 4 digits."""
    return float(f"{value:.4g}")


def parse_space(changes: Sequence[str]) -> Space:
    """Return what `-S NAME=...` options allow; ParamsError names the faulty one."""
    space: Space = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not (name and equals and text):
            raise ParamsError(f"-S {change}: not NAME=VALUES, such as lr=1e-4,3e-4")
        if name in space:
            raise ParamsError(f"-S {change}: {name} is given twice")
        kind, _, rest = text.partition(":")
        space[name] = _range(change, kind, rest) if kind in KINDS else _choices(change, text)
    return space


def _choices(change: str, text: str) -> Choices:
    try:
        # YAML's own list: commas inside brackets and quotes do not separate values.
        values = parse_yaml(f"[{text}]")
    except FormatError as error:
        raise ParamsError(f"-S {change}: the values are {error}") from None
    if not values:
        raise ParamsError(f"-S {change}: holds no value")
    return Choices(tuple({as_text(value): value for value in values}.values()))


def _range(change: str, kind: str, text: str) -> Range:
    try:
        low, high = (float(part) for part in text.split(":"))
        whole = kind != "int" or (low.is_integer() and high.is_integer())
        if not (low < high and math.isfinite(high - low) and whole and (kind != "log" or low > 0)):
            raise ValueError
    except ValueError:
        example = {"log": "log:1e-5:1e-3", "uniform": "uniform:0:0.3", "int": "int:1:8"}[kind]
        raise ParamsError(f"-S {change}: not a range such as {example}") from None
    return Range(kind, low, high)


def grid(space: Space) -> list[Point]:
    """Return all combinations; ParamsError if a parameter has a range, or there are too many."""
    for name, allowed in space.items():
        if isinstance(allowed, Range):
            raise ParamsError(f"-S {name}={allowed.kind}:...: a range needs --random N or --tpe N")
    lists = [one.values for one in space.values() if isinstance(one, Choices)]
    if (count := math.prod(map(len, lists))) > MOST_POINTS:
        raise ParamsError(f"the grid has {count:,} of at most {MOST_POINTS:,} points")
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*lists)]


def draw_points(space: Space, count: int, seed: int) -> list[Point]:
    """Return `count` random points, the same ones for the same seed."""
    rng = random.Random(seed)
    return [{name: one.draw(rng) for name, one in space.items()} for _ in range(count)]


def read_points(file: Path) -> list[Point]:
    """Read a list of points: YAML (a list of maps) or CSV (a column for each parameter)."""
    try:
        text = read_text(file)
        rows = list(_csv_rows(text)) if file.suffix.lower() == ".csv" else parse_yaml(text)
    except FileNotFoundError:
        raise ParamsError(f"{file}: not found") from None
    except FormatError as error:
        raise ParamsError(f"{file}: {error}") from None
    if not isinstance(rows, list) or not rows or not all(r and isinstance(r, dict) for r in rows):
        raise ParamsError(f"{file}: not a list of points, such as `- {{lr: 1.0e-4, seed: 0}}`")
    return [{str(name): value for name, value in row.items()} for row in rows]


def _csv_rows(text: str) -> Iterator[Point]:
    for row in csv.DictReader(io.StringIO(text), strict=True):
        if None in row or None in row.values():
            raise FormatError("a row has more or fewer cells than the first one")
        yield {name.strip(): parse_yaml(value) for name, value in row.items()}


def as_changes(point: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a point as `NAME=VALUE` texts for `-S`."""
    return tuple(f"{name}={as_text(value)}" for name, value in point.items())


def describe_space(space: Space) -> dict[str, Any]:
    """Return a space for JSON, and for the key of a search."""
    return {name: asdict(one) for name, one in space.items()}
