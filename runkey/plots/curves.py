"""All pictures of a training: learning rate, clipping, loss and AP, speed, the machine.

write_training_plots(Path("logs/train.jsonl"), Path("plots"))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from runkey.plots.log import SAMPLES, Point, TrainingLog, gpu_names, read_log, read_samples
from runkey.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    PURPLE,
    SKY,
    VERMILLION,
    drawing,
    legend,
    legend_beside,
    plain_log_scale,
    say_nothing_yet,
    whole_numbers,
)

# The horizontal axis of a training: optimizer steps, and epochs below.


def step_axis(axes: Any, log: TrainingLog) -> None:
    """Optimizer steps below the lowest panel, and epochs below those."""
    last = max([p.step for p in (*log.steps[-1:], *log.epochs[-1:])], default=1)
    axes.set_xlim(0, max(1, last) * 1.02)
    axes.set_xlabel("optimizer step")
    whole_numbers(axes)
    per_epoch = log.steps_per_epoch
    if per_epoch:
        below = axes.secondary_xaxis(
            "bottom", functions=(lambda step: step / per_epoch, lambda epoch: epoch * per_epoch)
        )
        below.set_xlabel("epoch")
        below.spines["bottom"].set_position(("outward", 38))
        whole_numbers(below)


def marker(steps: NDArray[np.float64]) -> str:
    """Dots while there are few points; a single one would not show at all without."""
    return "o" if len(steps) <= 60 else ""


# What happened on the way, marked on the curves: steps skipped, rollbacks, resumes, hints.


@dataclass(frozen=True, slots=True)
class _Kind:
    one: str
    many: str
    marker: str
    colour: str
    across: bool = False
    """Whether a line goes through the panels: what comes after it is another training."""


# Told apart by shape as well as by colour.
_KINDS = {
    "skipped_step": _Kind("skipped step", "skipped steps", "X", VERMILLION),
    "loss_spike": _Kind("loss spike", "loss spikes", "^", ORANGE),
    "rollback": _Kind("rollback", "rollbacks", "<", BLACK, across=True),
    "gave_up": _Kind("gave up", "gave up", "s", BLACK),
    "evaluation_failed": _Kind("failed evaluation", "failed evaluations", "v", SKY),
    "split": _Kind("batch split", "batch splits", "P", SKY),
    "resumed": _Kind("resumed", "resumed", ">", GREEN, across=True),
    "hint": _Kind("hint", "hints", "D", PURPLE),
}
_SIZE = 8


def mark_events(figure: Any, panels: Sequence[Any], log: TrainingLog) -> None:
    """Mark a training's events on the lower edge of panels over optimizer steps, if there are any.

    Args:
        figure: gets a line above all panels that names the marks, with how many there are.
        panels: axes.
        log: of the training.
    """
    handles = []
    for name, kind in _KINDS.items():
        steps = log.places.get(name)
        if not steps:
            continue
        for axes in panels:
            _mark(axes, sorted(steps), kind)
        label = kind.one if len(steps) == 1 else f"{len(steps):,} {kind.many}"
        handles.append(_handle(kind, label))
    if handles:
        figure.legend(
            handles=handles,
            loc="outside upper right",
            ncols=min(4, len(handles)),
            columnspacing=1.4,
            handletextpad=0.2,
            borderaxespad=0.15,
        )


def _mark(axes: Any, steps: Sequence[int], kind: _Kind) -> None:
    if kind.across:
        for step in steps:
            axes.axvline(step, color=kind.colour, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    # Edges below all marks: those of marks that stand close would hide them.
    for colour, size, order in (("white", _SIZE + 2, 5), (kind.colour, _SIZE, 6)):
        axes.plot(
            steps,
            [0.0] * len(steps),
            transform=axes.get_xaxis_transform(),  # steps across, the panel's edge below
            color=colour,
            marker=kind.marker,
            markersize=size,
            markeredgewidth=0,
            linestyle="none",
            clip_on=False,
            zorder=order,
        )


def _handle(kind: _Kind, label: str) -> Line2D:
    return Line2D(
        [],
        [],
        color=kind.colour,
        marker=kind.marker,
        markersize=_SIZE,
        linestyle="none",
        label=label,
    )


# Losses and AP of a training, with the weights that were kept and an early stop.


def loss_and_ap(log: TrainingLog, path: Path) -> Path:
    """Train and validation loss, and AP, with the best epoch and the stop marked."""
    with drawing(path, panels=2, height=2.9) as (figure, (losses, scores)):
        losses.set_title("Loss")
        scores.set_title("AP")
        if not (log.steps or log.epochs):
            for axes in (losses, scores):
                say_nothing_yet(axes)
            return path
        _draw_losses(losses, log)
        if not _draw_scores(scores, log):
            say_nothing_yet(scores, "no evaluation yet")
        _mark_best_and_stop(log, losses, scores)
        legend_beside(losses)
        legend_beside(scores)
        step_axis(scores, log)
        mark_events(figure, (losses,), log)
    return path


def _draw_losses(axes: Any, log: TrainingLog) -> None:
    steps, values = log.of_steps("train/loss")
    axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1, label="train, a step")
    for name, colour, label in (
        ("train/epoch_loss", BLUE, "train, mean of the epoch"),
        ("val/loss", ORANGE, "held-out images"),
    ):
        steps, means = log.of_epochs(name)
        if len(steps):
            axes.plot(steps, means, color=colour, marker=marker(steps), markersize=4, label=label)
    _draw_gap(axes, log)
    # A few wild first steps would press all the rest flat.
    finite = values[np.isfinite(values)]
    if len(finite) > 20:
        axes.set_ylim(top=max(float(np.percentile(finite, 98)), float(finite[10:].max())) * 1.1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("loss, per object")


def _draw_gap(axes: Any, log: TrainingLog) -> None:
    """What separates the two losses: the generalisation gap, in numbers at two places."""
    steps, gaps = log.of_epochs("val/loss_gap")
    _, held_out = log.of_epochs("val/loss")
    if len(gaps) != len(held_out) or not np.isfinite(gaps).any():
        return
    label = f"gap: {gaps[-1]:.3g} at the end"
    at_best = gaps[steps == log.best_step()]
    if len(at_best):
        label = f"gap: {at_best[0]:.3g} where kept,\n{gaps[-1]:.3g} at the end"
    axes.fill_between(
        steps, held_out - gaps, held_out, color=ORANGE, alpha=0.15, linewidth=0, label=label
    )


def _draw_scores(axes: Any, log: TrainingLog) -> bool:
    highest = math.nan
    for name, colour, label in (
        ("val/AP50", SKY, "AP50"),
        ("val/AP75", GREEN, "AP75"),
        ("val/AP", BLUE, "AP"),
    ):
        steps, values = log.of_epochs(name)
        if np.isfinite(values).any():
            axes.plot(steps, values, color=colour, marker=marker(steps), markersize=4, label=label)
            highest = np.nanmax([highest, *values])
    drawn = math.isfinite(highest)
    if drawn:
        axes.set_ylim(0, min(1.0, max(0.1, 1.15 * highest)))
        axes.set_ylabel("AP of held-out images, 0 to 1")
    return drawn


def _mark_best_and_stop(log: TrainingLog, losses: Any, scores: Any) -> None:
    """A line at the weights that were kept, and what early stopping waited for after them."""
    best = log.best_step()
    if best is None:
        return
    per_epoch = log.steps_per_epoch
    where = f"epoch {best / per_epoch:.0f}" if per_epoch else f"step {best:,}"
    steps, values = log.of_epochs("val/AP")
    at_best = values[steps == best]
    for axes in (losses, scores):
        axes.axvline(best, color=BLACK, linewidth=1.2, linestyle=":")
    if at_best.size and np.isfinite(at_best[0]):
        scores.plot(
            [best],
            at_best[:1],
            color=VERMILLION,
            marker="*",
            markersize=14,
            linestyle="none",
            label=f"kept: {where},\nAP {at_best[0]:.3f}",
            zorder=5,
        )
    else:
        scores.plot([], [], color=BLACK, linestyle=":", linewidth=1.2, label=f"kept: {where}")
    _mark_waiting(log, best, losses, scores)


def _mark_waiting(log: TrainingLog, best: int, losses: Any, scores: Any) -> None:
    """Shade the evaluations since the best one, which early stopping counts, and mark a stop."""
    steps, _ = log.of_epochs("val/AP")
    waited = int((steps > best).sum())
    if not waited:
        return
    last = float(steps[-1])
    for axes in (losses, scores):
        axes.axvspan(best, last, color=PALE, zorder=0)
        if log.stopped_early:
            axes.axvline(last, color=VERMILLION, linewidth=1.4)
    patience = log.events.get("training_start", {}).get("patience")
    allowed = f" of {patience}" if patience else ""
    plural = "s" * (waited != 1 or bool(patience))
    label = f"{waited}{allowed} evaluation{plural}\nwithout improvement"
    if log.stopped_early:
        scores.plot([], [], color=VERMILLION, linewidth=1.4, label=f"stopped: {label}")
    else:
        scores.fill_between([], [], color=PALE, label=label)


# Gradient norms before and after clipping, and the share that is clipped.


# Rounding makes a clipped norm differ a little from the norm; clipping makes it differ more.
_CLIPPED = 1.001


def gradient_norm(log: TrainingLog, path: Path) -> Path:
    """Joint gradient norm before and after clipping, and the share of steps that were clipped."""
    steps, before = log.of_steps("train/grad_norm")
    after_steps, after = log.of_steps("train/grad_norm_clipped")
    with drawing(path, panels=2, height=2.7) as (figure, (norms, shares)):
        norms.set_title("Gradient norm and clipping")
        if not len(steps) or len(steps) != len(after_steps):
            for axes in (norms, shares):
                say_nothing_yet(axes)
            return path
        clipped = before > after * _CLIPPED
        norms.plot(steps, before, color=VERMILLION, alpha=0.3, linewidth=1)
        norms.plot(
            steps,
            _smooth(before),
            color=VERMILLION,
            label="before clipping, median of 9",
            marker=marker(steps),
            markersize=4,
        )
        norms.plot(
            steps,
            after,
            color=BLUE,
            label="after",
            marker=marker(steps),
            markersize=4,
        )
        _draw_threshold(norms, log)
        if (before[np.isfinite(before)] > 0).any():
            plain_log_scale(norms)
        norms.set_ylabel("2-norm of all gradients")
        legend(norms)

        share_steps, share = _share_by_epoch(log, steps, clipped)
        shares.plot(share_steps, 100 * share, color=GREEN, marker=marker(share_steps), markersize=4)
        shares.set_title(f"Clipped: {clipped.mean():.0%} of the logged steps")
        shares.set_ylabel("steps clipped, %")
        shares.set_ylim(-4, 104)
        step_axis(shares, log)
        mark_events(figure, (norms,), log)
    return path


def _draw_threshold(axes: Any, log: TrainingLog) -> None:
    """The largest norm that was let through, where norms are clipped: a line, or a curve."""
    steps, limits = log.of_steps("train/clip_threshold")
    finite = limits[np.isfinite(limits)]
    if not len(finite):
        return
    least, most = float(finite.min()), float(finite.max())
    moves = most > least * _CLIPPED
    label = f"threshold {least:.3g} to {most:.3g}" if moves else f"threshold {least:.3g}"
    axes.plot(steps, limits, color=BLACK, linestyle="--", linewidth=1.2, label=label)


def _share_by_epoch(
    log: TrainingLog, steps: NDArray[np.float64], clipped: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share of the logged steps that were clipped, in each epoch, at the epoch's end."""
    per_epoch = log.steps_per_epoch or float(steps[-1])
    epochs = np.ceil(steps / per_epoch)
    which = np.unique(epochs)
    share = np.array([clipped[epochs == epoch].mean() for epoch in which])
    return np.minimum(which * per_epoch, steps[-1]), share


def _smooth(values: NDArray[np.float64], width: int = 9) -> NDArray[np.float64]:
    """Running median; shorter windows at the ends."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.nanmedian(w) if np.isfinite(w).any() else np.nan for w in windows])


# How busy the machine was: _CPU, GPUs and memory over time, from logs/system.jsonl.


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
