"""The report of steps that went wrong: a JSON file in the training's folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runkey.training.guard.state import GuardState

REPORTS = "bad-step-*.json"
"""Pattern of their names."""


def report_name(step: int) -> str:
    """Name of the file about a step and what followed."""
    return f"bad-step-{step}.json"


def make_report(guard: GuardState, *, step: int, reason: str, outcome: str) -> dict[str, Any]:
    """All that is known, as JSON takes it: numbers that are not finite are text (`nan`, `inf`).

    Args:
        guard: at least one of its steps was skipped, or weights are not finite.
        step: steps done.
        reason: what is wrong.
        outcome: what was done about it.
    """
    report = {
        "step": first_bad_step(guard, step),
        "steps_done": step,
        "reason": reason,
        "outcome": outcome,
        "skips": [asdict(skip) for skip in guard.skips],
        "rollbacks": [asdict(rollback) for rollback in guard.rollbacks],
        "scaler_skips": guard.scaler_skips,
        "latest_grad_norms": guard.norms,
        "latest_losses": guard.losses,
        "loss_spikes": guard.spikes,
    }
    plain: dict[str, Any] = json_safe(report)
    return plain


def first_bad_step(guard: GuardState, step: int) -> int:
    """The step to look at: the first of those that count."""
    return guard.skips[0].step if guard.skips else step


def write_report(folder: Path, report: dict[str, Any]) -> Path:
    """Write it; an older report of the same step is replaced.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / report_name(report["step"])
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


def json_safe(value: Any) -> Any:
    """The same, with floats that JSON has no form for as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value
