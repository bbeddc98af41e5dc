"""How busy the machine was: _CPU, GPUs and memory over time, from logs/system.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.plots.log import Point
from runkey.plots.samples import gpu_names
from runkey.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    drawing,
    legend_beside,
    say_nothing_yet,
)

_CPU = "system/cpu_utilization_percentage"
_MEMORY = "system/system_memory_usage_megabytes"
_PROCESS_MEMORY = "system/process_memory_megabytes"
_GPU_BUSY = "_utilization_percentage"
_GPU_MEMORY = "_memory_usage_megabytes"
_GPU_COLOURS = (ORANGE, GREEN, VERMILLION, PURPLE)


def machine(samples: Sequence[Point], path: Path) -> Path:
    """Draw utilisation of CPU and GPUs, and memory in use, over the training's time.

    Args:
        samples: as `read_samples` gives them; there may be none.
        path: the picture, PNG.
    """
    with drawing(path, panels=2, height=2.5) as (_, (busy, memory)):
        busy.set_title("CPU and GPU utilisation")
        memory.set_title("Memory in use")
        if not samples:
            for axes in (busy, memory):
                say_nothing_yet(axes, "the machine was not sampled")
            return path
        seconds = np.array([sample.seconds for sample in samples]) - samples[0].seconds
        unit, length = _unit(float(seconds[-1]))
        times = seconds / length
        _line(busy, times, _series(samples, _CPU), BLUE, "CPU, all cores")
        _gpus(busy, times, samples, _GPU_BUSY, 1.0)
        _line(memory, times, _series(samples, _MEMORY, 1e-3), GREY, "host, everything")
        _line(memory, times, _series(samples, _PROCESS_MEMORY, 1e-3), BLACK, "host, this training")
        _gpus(memory, times, samples, _GPU_MEMORY, 1e-3)
        busy.set_ylim(0, 104)
        busy.set_ylabel("busy, %")
        memory.set_ylim(bottom=0)
        memory.set_ylabel("GB")
        memory.set_xlabel(f"{unit} since the start")
        memory.set_xlim(0, max(0.1, float(times[-1])) * 1.01)
        for axes in (busy, memory):
            legend_beside(axes)
    return path


def _unit(seconds: float) -> tuple[str, int]:
    """A unit of time that suits a length, and its seconds."""
    if seconds < 180:
        return "seconds", 1
    return ("minutes", 60) if seconds < 4 * 3600 else ("hours", 3600)


def _gpus(
    axes: Any, times: NDArray[np.float64], samples: Sequence[Point], ending: str, factor: float
) -> None:
    """A line for each GPU; of many, their mean and the range that they lie in."""
    names = gpu_names(samples, ending)
    if len(names) <= len(_GPU_COLOURS):
        for gpu, name in enumerate(names):
            _line(axes, times, _series(samples, name, factor), _GPU_COLOURS[gpu], f"GPU {gpu}")
        return
    values = np.array([_series(samples, name, factor) for name in names])
    low, high = values.min(axis=0), values.max(axis=0)
    axes.fill_between(times, low, high, color=_GPU_COLOURS[0], alpha=0.25, label="least to most")
    _line(axes, times, values.mean(axis=0), _GPU_COLOURS[0], f"{len(names)} GPUs, mean")


def _line(
    axes: Any, times: NDArray[np.float64], values: NDArray[np.float64], colour: str, label: str
) -> None:
    if np.isfinite(values).any():
        marker = "o" if len(values) <= 60 else ""
        axes.plot(times, values, color=colour, label=label, marker=marker, markersize=3)


def _series(samples: Sequence[Point], name: str, factor: float = 1.0) -> NDArray[np.float64]:
    return np.array([factor * sample.values.get(name, np.nan) for sample in samples])
