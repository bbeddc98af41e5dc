"""Losses and AP of a training, with the weights that were kept and an early stop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from runkey.plots.events import mark_events
from runkey.plots.log import TrainingLog
from runkey.plots.steps import marker, step_axis
from runkey.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PALE,
    SKY,
    VERMILLION,
    drawing,
    legend_beside,
    say_nothing_yet,
)


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
