"""All pictures of a training: learning rate, clipping, loss and AP, speed, the machine.

write_training_plots(Path("logs/train.jsonl"), Path("plots"))
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runkey.plots.events import mark_events
from runkey.plots.gradients import gradient_norm
from runkey.plots.log import TrainingLog, read_log
from runkey.plots.losses import loss_and_ap
from runkey.plots.samples import SAMPLES, read_samples
from runkey.plots.steps import marker, step_axis
from runkey.plots.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    PALE,
    drawing,
    legend,
    say_nothing_yet,
)
from runkey.plots.system import machine


def write_training_plots(log: Path, out: Path) -> list[Path]:
    """Draw all pictures of a training into a folder.

    Args:
        log: logs/train.jsonl, finished or not; the samples of the machine lie beside it.
        out: the folder; made if it is not there.

    Returns:
        The written files.

    Raises:
        DataError: there is no log.
    """
    content = read_log(log)
    return [
        loss_and_ap(content, out / "loss_and_ap.png"),
        learning_rate(content, out / "learning_rate.png"),
        gradient_norm(content, out / "gradient_norm.png"),
        throughput(content, out / "throughput.png"),
        machine(read_samples(log.with_name(SAMPLES)), out / "machine.png"),
    ]


def learning_rate(log: TrainingLog, path: Path) -> Path:
    """Learning rate over optimizer steps, with warm-up shaded and drops marked."""
    steps, rates = log.of_steps("train/lr")
    with drawing(path, panels=1, height=3.4) as (figure, (axes,)):
        axes.set_title("Learning rate")
        if not len(steps):
            say_nothing_yet(axes)
            return path
        axes.plot(steps, rates, color=BLUE, marker=marker(steps), markersize=4)
        warm = _warmup_end(steps, rates)
        if warm:
            axes.axvspan(0, warm, color=PALE, zorder=0, label=f"warm-up, about {warm:,.0f} steps")
        for place, factor in _drops(rates):
            axes.axvline(steps[place], color=ORANGE, linestyle=":", linewidth=1.4)
            axes.annotate(
                f"x {factor:.2g}",
                (steps[place], rates[place - 1]),
                (4, -2),
                color=BLACK,
                textcoords="offset points",
                fontsize=9,
                va="top",
            )
        axes.set_ylabel("rate per step")
        axes.set_ylim(bottom=0, top=(np.nanmax(rates, initial=0) or 1) * 1.08)
        axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")
        step_axis(axes, log)
        legend(axes)
        mark_events(figure, (axes,), log)
    return path


def throughput(log: TrainingLog, path: Path) -> Path:
    """Images per second, and the share of time in which training waited for data."""
    with drawing(path, panels=2, height=2.4) as (figure, (speed, wait)):
        speed.set_title("Training speed")
        wait.set_title("Waiting for data")
        for axes, name, factor, colour, label in (
            (speed, "train/images_per_second", 1, BLUE, "images per second"),
            (wait, "train/data_wait_share", 100, ORANGE, "share of the time, %"),
        ):
            steps, values = log.of_steps(name)
            if not np.isfinite(values).any():
                say_nothing_yet(axes)
                continue
            values = values * factor
            middle = float(np.nanmedian(values))
            axes.plot(steps, values, color=colour, marker=marker(steps), markersize=4)
            axes.axhline(
                middle, color=GREY, linestyle="--", linewidth=1.2, label=f"median {middle:.1f}"
            )
            axes.set_ylabel(label)
            axes.set_ylim(0, max(1.0, float(np.nanmax(values)) * 1.15))
            legend(axes)
        if log.steps:
            step_axis(wait, log)
            mark_events(figure, (speed,), log)
    return path


def _warmup_end(steps: NDArray[np.float64], rates: NDArray[np.float64]) -> float | None:
    """The step at which the rate stops rising, if it rises at the start; None if it does not."""
    rising = np.diff(rates) > 0
    if not len(rising) or not rising[0]:
        return None
    return float(steps[int(np.argmin(rising)) if not rising.all() else -1])


def _drops(rates: NDArray[np.float64]) -> list[tuple[int, float]]:
    """Places at which a rate that was level falls at once to less than 0.7 of it, with the factor.

    A smooth decay is level nowhere, however steep it is between two logged steps.
    """
    places = range(2, len(rates))
    return [
        (i, rates[i] / rates[i - 1])
        for i in places
        if rates[i] < 0.7 * rates[i - 1] and np.isclose(rates[i - 1], rates[i - 2], rtol=1e-3)
    ]
