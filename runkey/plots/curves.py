"""Four pictures of a training: learning rate, gradient clipping, loss and AP, speed.

write_training_plots(Path("logs/train.jsonl"), Path("plots"))
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.plots.log import TrainingLog, read_log
from runkey.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    SKY,
    VERMILLION,
    drawing,
    legend,
    plain_log_scale,
    say_nothing_yet,
    whole_numbers,
)

# Rounding makes a clipped norm differ a little from the norm; clipping makes it differ more.
_CLIPPED = 1.001


def write_training_plots(log: Path, out: Path) -> list[Path]:
    """Draw all pictures of a training into a folder.

    Args:
        log: logs/train.jsonl, finished or not.
        out: the folder; made if it is not there.

    Returns:
        The written files.

    Raises:
        DataError: there is no log.
    """
    content = read_log(log)
    return [
        learning_rate(content, out / "learning_rate.png"),
        gradient_norm(content, out / "gradient_norm.png"),
        loss_and_ap(content, out / "loss_and_ap.png"),
        throughput(content, out / "throughput.png"),
    ]


def learning_rate(log: TrainingLog, path: Path) -> Path:
    """Learning rate over optimizer steps, with warm-up shaded and drops marked."""
    steps, rates = log.of_steps("train/lr")
    with drawing(path, panels=1, height=3.4) as (_, (axes,)):
        axes.set_title("Learning rate")
        if not len(steps):
            say_nothing_yet(axes)
            return path
        axes.plot(steps, rates, color=BLUE, marker=_marker(steps), markersize=4)
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
        _step_axis(axes, log)
        legend(axes)
    return path


def gradient_norm(log: TrainingLog, path: Path) -> Path:
    """Joint gradient norm before and after clipping, and the share of steps that were clipped."""
    steps, before = log.of_steps("train/grad_norm")
    after_steps, after = log.of_steps("train/grad_norm_clipped")
    with drawing(path, panels=2, height=2.7) as (_, (norms, shares)):
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
            marker=_marker(steps),
            markersize=4,
        )
        norms.plot(
            steps,
            after,
            color=BLUE,
            label="after",
            marker=_marker(steps),
            markersize=4,
        )
        threshold = _threshold(after, clipped)
        if threshold:
            norms.axhline(
                threshold,
                color=BLACK,
                linestyle="--",
                linewidth=1.2,
                label=f"threshold {threshold:.3g}",
            )
        if (before[np.isfinite(before)] > 0).any():
            plain_log_scale(norms)
        norms.set_ylabel("2-norm of all gradients")
        legend(norms)

        share_steps, share = _share_by_epoch(log, steps, clipped)
        shares.plot(
            share_steps, 100 * share, color=GREEN, marker=_marker(share_steps), markersize=4
        )
        shares.set_title(f"Clipped: {clipped.mean():.0%} of the logged steps")
        shares.set_ylabel("steps clipped, %")
        shares.set_ylim(-4, 104)
        _step_axis(shares, log)
    return path


def loss_and_ap(log: TrainingLog, path: Path) -> Path:
    """Train and validation loss, and AP, with the best epoch and the stop marked."""
    with drawing(path, panels=2, height=2.9) as (_, (losses, scores)):
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
        legend(losses)
        legend(scores)
        _step_axis(scores, log)
    return path


def throughput(log: TrainingLog, path: Path) -> Path:
    """Images per second, and the share of time in which training waited for data."""
    with drawing(path, panels=2, height=2.4) as (_, (speed, wait)):
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
            axes.plot(steps, values, color=colour, marker=_marker(steps), markersize=4)
            axes.axhline(
                middle, color=GREY, linestyle="--", linewidth=1.2, label=f"median {middle:.1f}"
            )
            axes.set_ylabel(label)
            axes.set_ylim(0, max(1.0, float(np.nanmax(values)) * 1.15))
            legend(axes)
        if log.steps:
            _step_axis(wait, log)
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
            axes.plot(steps, means, color=colour, marker=_marker(steps), markersize=4, label=label)
    # A few wild first steps would press all the rest flat.
    finite = values[np.isfinite(values)]
    if len(finite) > 20:
        axes.set_ylim(top=max(float(np.percentile(finite, 98)), float(finite[10:].max())) * 1.1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("loss, per object")


def _draw_scores(axes: Any, log: TrainingLog) -> bool:
    highest = math.nan
    for name, colour, label in (
        ("val/AP50", SKY, "AP50"),
        ("val/AP75", GREEN, "AP75"),
        ("val/AP", BLUE, "AP"),
    ):
        steps, values = log.of_epochs(name)
        if np.isfinite(values).any():
            axes.plot(steps, values, color=colour, marker=_marker(steps), markersize=4, label=label)
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
            label=f"kept: {where}, AP {at_best[0]:.3f}",
            zorder=5,
        )
    else:
        scores.plot([], [], color=BLACK, linestyle=":", linewidth=1.2, label=f"kept: {where}")
    if log.stopped_early and log.epochs:
        last = log.epochs[-1].step
        waited = int(((steps > best) & (steps <= last)).sum())
        for axes in (losses, scores):
            axes.axvspan(best, last, color=PALE, zorder=0)
            axes.axvline(last, color=VERMILLION, linewidth=1.4)
        scores.plot(
            [], [], color=VERMILLION, linewidth=1.4, label=f"stopped: {waited} without improvement"
        )


def _step_axis(axes: Any, log: TrainingLog) -> None:
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


def _marker(steps: NDArray[np.float64]) -> str:
    """Dots while there are few points; a single one would not show at all without."""
    return "o" if len(steps) <= 60 else ""


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


def _threshold(after: NDArray[np.float64], clipped: NDArray[np.bool_]) -> float | None:
    """The threshold of clipping by norm: all clipped norms are equal to it; None if not."""
    norms = after[clipped & np.isfinite(after)]
    if not len(norms) or np.ptp(norms) > 0.01 * norms.max():
        return None
    return float(np.median(norms))


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
