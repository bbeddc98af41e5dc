"""The variants of the sample run: what is changed, and which of the guide's pages speak of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BASELINE: dict[str, Any] = {
    "schedule.name": "cosine",
    "model.initial_box": 0.1,
    "training.epochs": 24,
}
"""What the sample's preset was when the results were measured; each variant changes this."""


@dataclass(frozen=True)
class Variant:
    """One change to the sample's parameters."""

    name: str
    """Of its folder."""
    pages: tuple[str, ...]
    """Those of docs/guide that have it in their table."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Parameters by dotted name; what is not named is as in `BASELINE`, then as in
    presets/sample.yaml."""
    seeds: int = 1
    """How many seeds there are at least, from 0 on."""
    device: str = "cpu"

    @property
    def label(self) -> str:
        """What is changed, parameters with their values; without any augmentation in short."""
        left = dict(self.settings)
        parts = []
        if left.items() >= _BARE.items():
            left = {name: value for name, value in left.items() if name not in _BARE}
            parts = ["data.augment.*=0"]
        return ", ".join([*parts, *(f"{name}={_typed(value)}" for name, value in left.items())])


def _typed(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(str(one) for one in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


_ALL = (
    "schedules", "clipping", "early-stopping", "overfitting", "accumulation", "memory",
    "mixed-precision", "data-loading", "nan", "distributed",
)  # fmt: skip
_LONG = {"training.epochs": 72, "schedule.name": "constant"}
_BARE = {
    "data.augment.zoom": 0.0,
    "data.augment.aspect": 0.0,
    "data.augment.shift": 0.0,
    "data.augment.brightness": 0.0,
    "data.augment.contrast": 0.0,
}


def _schedule(name: str, title: str = "", **more: Any) -> Variant:
    settings = {"schedule.name": name} | {f"schedule.{key}": value for key, value in more.items()}
    return Variant(title or name, ("schedules",), settings, seeds=2)


def _clip(name: str, mode: str, lr: float | None = None, **more: Any) -> Variant:
    settings: dict[str, Any] = {} if lr is None else {"lr": lr}
    if mode != "norm":
        settings["optimizer.clip.mode"] = mode
    settings |= {f"optimizer.clip.{key}": value for key, value in more.items()}
    return Variant(name, ("clipping",), settings, seeds=2)


VARIANTS = (
    Variant("baseline", _ALL, seeds=4),
    _schedule("constant"),
    _schedule("step", step_epochs=8, gamma=0.3),
    _schedule("multistep", milestones=[16, 21]),
    _schedule("exponential", gamma=0.85),
    _schedule("onecycle"),
    _schedule("cyclical", cycle_epochs=8.0),
    _schedule("plateau", patience=1, gamma=0.3),
    Variant("no-warmup", ("schedules",), {"schedule.warmup_fraction": 0.0}, seeds=2),
    Variant("lr-5e-5", ("schedules",), {"lr": 5e-5}),
    Variant("lr-5e-4", ("schedules",), {"lr": 5e-4}, seeds=2),
    Variant("lr-3e-3", ("schedules", "clipping"), {"lr": 3e-3}, seeds=2),
    Variant("lr-1e-2", ("schedules", "nan"), {"lr": 1e-2}),
    Variant("lr-1e-1", ("nan",), {"lr": 0.1}),
    Variant(
        "lr-1-fp16",
        ("nan",),
        {
            "lr": 1.0,
            "training.precision": "fp16",
            "schedule.warmup_fraction": 0.0,
            "optimizer.clip.mode": "none",
        },
    ),
    _clip("clip-none", "none"),
    _clip("clip-0.1", "norm", threshold=0.1),
    _clip("clip-17", "norm", threshold=17.0),
    _clip("clip-value", "value", threshold=0.01),
    _clip("clip-percentile", "percentile"),
    _clip("clip-none-lr-3e-3", "none", lr=3e-3),
    Variant("no-augment-stop", ("early-stopping", "overfitting"), _BARE | _LONG),
    Variant(
        "no-augment-loss",
        ("early-stopping",),
        _BARE
        | {
            "training.early_stopping.metric": "val/loss",
            "training.early_stopping.mode": "min",
            "training.early_stopping.patience": 1,
        },
    ),
    Variant(
        "impatient",
        ("early-stopping",),
        {
            "schedule.name": "constant",
            "training.ema_decay": 0.0,
            "training.evaluate_every": 1,
            "training.early_stopping.patience": 2,
        },
    ),
    Variant("no-augment", ("overfitting", "early-stopping"), _BARE, seeds=2),
    Variant("no-ema", ("overfitting",), {"training.ema_decay": 0.0}, seeds=2),
    Variant("dropout", ("overfitting",), {"model.dropout": 0.1}, seeds=2),
    Variant("weight-decay", ("overfitting",), {"optimizer.weight_decay": 0.05}, seeds=2),
    Variant("micro-2", ("accumulation", "memory"), {"training.micro_batch": 2}),
    Variant("batch-32", ("accumulation",), {"training.batch_size": 32}, seeds=2),
    Variant("batch-32-lr", ("accumulation",), {"training.batch_size": 32, "lr": 2e-3}, seeds=2),
    Variant("checkpointing", ("memory",), {"model.checkpointing": True}),
    Variant("bf16", ("mixed-precision",), {"training.precision": "bf16"}),
    *(
        Variant(
            f"uncached-{workers}",
            ("data-loading",),
            {"data.cache_gib": 0.0, "runtime.workers": workers},
        )
        for workers in (0, 1, 2)
    ),
    Variant("cached-2", ("data-loading",), {"runtime.workers": 2}),
    Variant("two-processes", ("distributed",), {"runtime.processes": 2}),
    Variant("gpu", ("mixed-precision", "data-loading"), device="cuda", seeds=3),
    Variant("gpu-fp32", ("mixed-precision",), {"training.precision": "off"}, device="cuda"),
    Variant("gpu-fp16", ("mixed-precision",), {"training.precision": "fp16"}, device="cuda"),
    Variant(
        "gpu-uncached-0",
        ("data-loading",),
        {"data.cache_gib": 0.0, "runtime.workers": 0},
        device="cuda",
    ),
    Variant(
        "gpu-uncached-4",
        ("data-loading",),
        {"data.cache_gib": 0.0, "runtime.workers": 4},
        device="cuda",
    ),
)

BY_NAME = {variant.name: variant for variant in VARIANTS}
