"""A run beside its repeat: the same bits, or numbers that are as near as they can be.

Two runs of one key on one kind of witness give the same weights, bit for bit.  On another device,
micro-batch, number of threads or packages sums are rounded in another order, and training makes
more of the difference with every step: only the results can be near each other then.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runkey.errors import RegistryError

AP_TOLERANCE = 0.02
"""Absolute, of numbers in 0..1 such as AP and AR.  Other seeds of the sample give AP 0.655 to 0.668
(benchmarks/results/pipeline.md); another order of rounding changes no more than another seed."""
LOSS_TOLERANCE = 0.05
"""Relative, of losses, which have no upper bound."""
_WEIGHTS = ("model/weights.safetensors", "model/weights.pt")  # the latter in runs of runkey 0.1
IDENTICAL = (*_WEIGHTS, "evaluation/predictions.json")
"""Files that are compared by their bits: what was trained, and what it sees on the held-out images.
The others hold times and names."""
_COMPARED = re.compile(r"eval/(?!loss_)")
"""Numbers of the evaluation; of the loss its sum."""
CLASS = (
    "device",
    "micro_batch",
    "world_size",
    "threads",
    "precision",
    "interpreter",
    "package_differences",
)
"""What of a witness makes its class."""


@dataclass(frozen=True)
class Number:
    """A metric of both runs."""

    name: str
    first: float
    repeat: float

    @property
    def limit(self) -> float:
        """How far apart they may be, absolute."""
        if "loss" in self.name:
            return LOSS_TOLERANCE * max(abs(self.first), abs(self.repeat))
        return AP_TOLERANCE

    @property
    def is_near(self) -> bool:
        """Whether they are within the tolerance; NaN never is."""
        return abs(self.first - self.repeat) <= self.limit


@dataclass(frozen=True)
class SameFile:
    """A file of both runs that should be the same."""

    path: str
    first: str | None
    """Hex sha256; None: the run has no such file."""
    repeat: str | None

    @property
    def is_same(self) -> bool:
        """Whether both have it, with the same bits."""
        return self.first == self.repeat and self.first is not None


@dataclass(frozen=True)
class Verdict:
    """What a comparison of a run and its repeat found."""

    class_differences: tuple[str, ...]
    """Such as `threads 1 | 2`; empty: the same witness class."""
    files: tuple[SameFile, ...]
    numbers: tuple[Number, ...]

    @property
    def same_class(self) -> bool:
        """Whether bit-identical results are due."""
        return not self.class_differences

    @property
    def identical(self) -> bool:
        """Whether all files are the same bits."""
        return all(file.is_same for file in self.files)

    @property
    def within_tolerance(self) -> bool:
        """Whether there are numbers, and all are near."""
        return bool(self.numbers) and all(number.is_near for number in self.numbers)

    @property
    def holds(self) -> bool:
        """Whether the repeat gave what it should."""
        return self.identical or (not self.same_class and self.within_tolerance)

    @property
    def line(self) -> str:
        """The verdict in words."""
        if self.identical:
            return "reproduced: bit-identical weights and predictions"
        if self.same_class:
            changed = ", ".join(file.path for file in self.files if not file.is_same)
            near = "within" if self.within_tolerance else "outside"
            return (
                f"NOT reproduced: {changed} differ on the same kind of machine ({near} tolerance)"
            )
        if self.within_tolerance:
            return "reproduced within tolerance, on another kind of machine"
        far = ", ".join(number.name for number in self.numbers if not number.is_near)
        return f"NOT reproduced: {far or 'no number'} within tolerance"

    def as_dict(self) -> dict[str, Any]:
        """For the record of the first run: plain values."""
        return {
            "same_class": self.same_class,
            "class_differences": list(self.class_differences),
            "identical": self.identical,
            "within_tolerance": self.within_tolerance,
            "reproduced": self.holds,
            "files": {file.path: [file.first, file.repeat] for file in self.files},
            "metrics": {n.name: [_finite(n.first), _finite(n.repeat)] for n in self.numbers},
        }


@dataclass(frozen=True)
class Side:
    """One of the two runs, as far as it is compared."""

    witness: Mapping[str, Any]
    hashes: Mapping[str, str]
    """Hex sha256 by path."""
    metrics: Mapping[str, float]
    """By MLflow's names; those of the evaluation count."""


def compare_runs(first: Side, repeat: Side) -> Verdict:
    """Compare a run with its repeat.

    Raises:
        RegistryError: the first has no weights recorded, so nothing can be said.
    """
    if not any(path in first.hashes for path in _WEIGHTS):
        raise RegistryError(f"{_WEIGHTS[0]}: the run recorded none, so there is nothing to compare")
    known = [path for path in IDENTICAL if path in first.hashes]
    # NaN: the data have no object of that size, in either run.
    names = sorted(n for n, v in first.metrics.items() if _COMPARED.match(n) and math.isfinite(v))
    return Verdict(
        tuple(_class_differences(first.witness, repeat.witness)),
        tuple(SameFile(p, first.hashes[p], repeat.hashes.get(p)) for p in known),
        tuple(
            Number(name, first.metrics[name], repeat.metrics.get(name, float("nan")))
            for name in names
        ),
    )


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def _class_differences(first: Mapping[str, Any], repeat: Mapping[str, Any]) -> list[str]:
    differing = [name for name in CLASS if first.get(name) != repeat.get(name)]
    return [f"{name} {_told(first.get(name))} | {_told(repeat.get(name))}" for name in differing]


def _told(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} of other versions"
    return str(value)
