"""What would save memory: the same training with one parameter changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from runkey.params import Params

Name = Literal["checkpointing", "bf16", "fp32", "smaller images", "grouping", "no grouping"]

_SMALLER = 0.75
_SHORT = 3
"""Lists of more entries are shortened."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of parameters."""

    name: Name
    changes: tuple[tuple[str, Any], ...]
    """Dotted names and values."""

    @property
    def values(self) -> dict[str, Any]:
        """By dotted name."""
        return dict(self.changes)

    def __str__(self) -> str:
        """As params.yaml writes it."""
        return ", ".join(f"{name}: {_yaml(value)}" for name, value in self.changes)


def other_steps(params: Params) -> list[Change]:
    """Changes of the step itself, which must be traced anew."""
    changes = []
    if not params.model.checkpointing:
        changes.append(Change("checkpointing", (("model.checkpointing", True),)))
    if params.training.precision == "off":
        changes.append(Change("bf16", (("training.precision", "bf16"),)))
    else:
        changes.append(Change("fp32", (("training.precision", "off"),)))
    return changes


def other_batches(params: Params) -> list[Change]:
    """Changes of the batches that the same step gets."""
    data = params.data
    sides = tuple(max(1, round(side * _SMALLER)) for side in data.short_sides)
    long_side = max(1, round(data.long_side * _SMALLER))
    smaller = (("data.short_sides", sides), ("data.long_side", long_side))
    grouped = data.group_by_aspect
    return [
        Change("smaller images", smaller),
        Change("no grouping" if grouped else "grouping", (("data.group_by_aspect", not grouped),)),
    ]


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{value[0]}, ..., {value[-1]}]" if len(value) > _SHORT else str(list(value))
    return str(value).lower()
