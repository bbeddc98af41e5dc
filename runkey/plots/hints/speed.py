"""Rules about what a training waits for, and about memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from runkey.plots.hints.hint import Hint
from runkey.plots.hints.values import FEWEST, median, now, recent
from runkey.plots.log import Point, TrainingLog
from runkey.plots.samples import gpu_names

_HOST_MEMORY = "system/system_memory_usage_percentage"
_GPU_BUSY = "_utilization_percentage"
_GPU_MEMORY = "_memory_usage_percentage"

_LOADER_SHARE = 0.15
_BUSY_PERCENT = 60
_FULL_PERCENT = {"host": 92, "GPU": 97}
_EMPTY_PERCENT = 40


def loader(log: TrainingLog, settings: Mapping[str, Any]) -> Iterator[Hint]:
    """Training waits for data."""
    waits = recent(log, "train/data_wait_share")
    if len(waits) >= FEWEST and (share := float(np.median(waits))) >= _LOADER_SHARE:
        yield Hint(
            "loader",
            f"training waits for data {share:.0%} of its time",
            f"raise {now('runtime.workers', settings)} or {now('runtime.prefetch', settings)};"
            f" or {now('data.cache_gib', settings)}, so that images lie decoded",
        )


def machine(
    log: TrainingLog, settings: Mapping[str, Any], samples: Sequence[Point]
) -> Iterator[Hint]:
    """The host's memory is full, the GPU not busy, the GPU's memory full or empty."""
    last = samples[-60:]
    if len(last) < FEWEST:
        return
    if (full := median(last, [_HOST_MEMORY])) >= _FULL_PERCENT["host"]:
        yield Hint(
            "host_memory",
            f"{full:.0f}% of the host's memory is in use",
            f"lower {now('runtime.workers', settings)} or {now('data.cache_gib', settings)}",
        )
    busy = median(last, gpu_names(last, _GPU_BUSY))
    waits = recent(log, "train/data_wait_share")
    if len(waits) and busy < _BUSY_PERCENT and np.median(waits) < _LOADER_SHARE:
        yield Hint(
            "host",
            f"the GPU is busy {busy:.0f}% of the time though its data is there: the host is slower",
            f"raise {_larger_batch(settings)}, so that each launch does more",
        )
    memory = median(last, gpu_names(last, _GPU_MEMORY))
    if memory >= _FULL_PERCENT["GPU"]:
        yield Hint(
            "gpu_memory",
            f"{memory:.0f}% of the GPU's memory is in use: a larger batch may not fit",
            f"lower {now('training.micro_batch', settings)} or"
            f" {now('memory.budget_gib', settings)}",
        )
    elif memory < _EMPTY_PERCENT:
        yield Hint(
            "gpu_memory",
            f"only {memory:.0f}% of the GPU's memory is in use",
            f"raise {_larger_batch(settings)}, or train a larger model or larger images",
        )


def _larger_batch(settings: Mapping[str, Any]) -> str:
    """What makes forward passes larger: `auto` takes as many images as the step has and fit."""
    names = ["training.batch_size"]
    if settings.get("training.micro_batch") != "auto":
        names.insert(0, "training.micro_batch")
    return " or ".join(now(name, settings) for name in names)
