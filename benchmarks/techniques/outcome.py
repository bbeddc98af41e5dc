"""What came of a run: numbers from its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runkey.params import load_params
from runkey.plots.hints import EVENT, find_hints
from runkey.plots.log import TrainingLog, read_log

PRESET = Path(__file__).resolve().parents[2] / "presets" / "sample.yaml"

METRICS = (
    "train/lr", "train/grad_norm", "train/images_per_second", "train/data_wait_share",
    "train/epoch_loss", "val/loss", "val/AP",
)  # fmt: skip
MOST_POINTS = {"train/lr": 130}
"""Of a curve; 60 of others: drops of the rate are to be steep."""
WARM = 0.2
"""Share of a run's points left out of its median speed: caches and compilers warm up."""


def outcome(folder: Path) -> dict[str, Any]:
    """All numbers of a run that tables show; what a failed run did not get to is not there."""
    found: dict[str, Any] = {"AP": None}
    for name in ("train", "evaluate"):
        path = folder / "metrics" / f"{name}.json"
        if path.exists():
            found |= json.loads(path.read_text(encoding="utf-8"))
    log = folder / "logs" / "train.jsonl"
    if log.exists():
        found |= _of_log(read_log(log))
    found["memory"] = _memory(folder)
    return found


def curves(folder: Path) -> dict[str, list[list[float | None]]]:
    """Epochs and values by metric, thinned, for the pictures."""
    log = read_log(folder / "logs" / "train.jsonl")
    per_epoch = log.steps_per_epoch or 1.0
    found: dict[str, list[list[float | None]]] = {}
    for name in METRICS:
        steps, values = log.series(name)
        every = max(1, -(-len(steps) // MOST_POINTS.get(name, 60)))
        found[name] = [
            [round(float(step) / per_epoch, 3), float(f"{value:.4g}")]
            for step, value in list(zip(steps, values, strict=True))[::every]
            if np.isfinite(value)
        ]
    return found


def hints(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """What the run is told by today's rules, epoch by epoch, by kind."""
    params = load_params(PRESET).flat(runtime=True) | settings
    log, told = TrainingLog(), dict[str, str]()
    text = (folder / "logs" / "train.jsonl").read_text(encoding="utf-8")
    for entry in map(json.loads, text.splitlines()):
        if not str(entry.get("event", "")).startswith(EVENT):
            log.add(entry)
        if "train/epoch_loss" in entry.get("values", {}):
            for hint in find_hints(log, params):
                told.setdefault(hint.kind, f"epoch {len(log.epochs)}: {hint.seen}")
    return told


def _of_log(log: TrainingLog) -> dict[str, Any]:
    end = log.last_event("training_end")
    _, norm = log.series("train/grad_norm")
    _, clipped = log.series("train/grad_norm_clipped")
    skipped = _last(log, "train/skipped_steps")
    return {
        "reason": end.get("reason"),
        "best_AP": _extreme(log, "val/AP", np.nanmax),
        "steps": end.get("steps"),
        "grad_norm": _median(log, "train/grad_norm"),
        "clipped_share": _share(clipped < norm * 0.999),
        "images_per_second": _median(log, "train/images_per_second"),
        "data_wait_share": _median(log, "train/data_wait_share"),
        "loss_gap": _last(log, "val/loss_gap"),
        "val_loss_last": _last(log, "val/loss"),
        "val_loss_least": _extreme(log, "val/loss", np.nanmin),
        "train_loss_last": _last(log, "train/epoch_loss"),
        "skipped_steps": end.get("skipped_steps", skipped),
        "events": {kind: len(events) for kind, events in log.events.items()},
    }


def _share(which: Any) -> float | None:
    return round(float(np.mean(which)), 3) if len(which) else None


def _median(log: TrainingLog, name: str) -> float | None:
    _, values = log.series(name)
    values = values[int(len(values) * WARM) :]
    return round(float(np.nanmedian(values)), 4) if np.isfinite(values).any() else None


def _last(log: TrainingLog, name: str) -> float | None:
    _, values = log.series(name)
    return round(float(values[-1]), 4) if len(values) and np.isfinite(values[-1]) else None


def _extreme(log: TrainingLog, name: str, pick: Callable[[Any], Any]) -> float | None:
    """The least or the largest finite value."""
    _, values = log.series(name)
    return round(float(pick(values)), 4) if np.isfinite(values).any() else None


def _memory(folder: Path) -> list[str]:
    """What the profile stage predicted and measured, in its words."""
    path = folder / "profile_memory.log"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in lines if line.startswith(("predicted", "measured"))]
