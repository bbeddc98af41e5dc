"""What the guard remembers: plain numbers, saved with every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NORMS_KEPT = 100
"""Gradient norms that a report shows."""


@dataclass
class Skip:
    """A step that changed nothing, since its loss or gradients were not finite."""

    step: int
    """Its number, from 1."""
    image_ids: list[int]
    """COCO ids of its images."""
    lr: float
    values: dict[str, float]
    """By metric name: losses and gradient norms."""
    faults: list[str]
    """What the matching found."""


@dataclass
class Rollback:
    """Training taken back to an anchor."""

    at: int
    """Steps done then."""
    to: int
    """Step of the anchor."""
    reason: str


@dataclass
class GuardState:
    """All that decisions go by, so that an interrupted training takes the same ones."""

    skips: list[Skip] = field(default_factory=list)
    """Those that count, since the last time that training was taken back; the latest few."""
    scaler_skips: int = 0
    """Steps that fp16's loss scaler skipped while it looked for its factor; they do not count."""
    rollbacks: list[Rollback] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """The latest finite ones, the last one last."""
    norms: list[float] = field(default_factory=list)
    """Gradient norms of the latest steps, finite or not, the last one last."""
    spikes: int = 0
    """Losses far above the others."""
    last_spike: int | None = None
    """Step of the latest one."""

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> GuardState:
        """Continue from what `dataclasses.asdict` gave."""
        nested = {
            "skips": [Skip(**skip) for skip in plain["skips"]],
            "rollbacks": [Rollback(**rollback) for rollback in plain["rollbacks"]],
        }
        return cls(**{**plain, **nested})
