"""The whole of params.yaml."""

from __future__ import annotations

from typing import Any

from runkey.params.base import Rate, Section, Seed
from runkey.params.data import Data
from runkey.params.model import Model
from runkey.params.training import Evaluate, Memory, Optimizer, Runtime, Schedule, Training


class Params(Section):
    """params.yaml, checked, with defaults filled in."""

    lr: Rate
    """Peak learning rate of AdamW, per step.  At the top for `dvc exp run -S lr=5e-5`."""
    seed: Seed
    """Start of every random choice: weights, order, augmentation, dropout."""
    data: Data = Data()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    training: Training = Training()
    memory: Memory = Memory()
    evaluate: Evaluate = Evaluate()
    runtime: Runtime = Runtime()

    def flat(self, *, runtime: bool = False) -> dict[str, Any]:
        """Every value under its dotted name (`model.loss.l1`); `runtime.*` only when asked for."""
        flat = _flatten(self.model_dump(mode="json"))
        return {k: v for k, v in flat.items() if runtime or not k.startswith("runtime.")}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
