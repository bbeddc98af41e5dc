"""Curves and tables of a training: loss and AP, learning rate, gradient norm, speed, the machine.

write_training_plots(Path("logs/train.jsonl"), Path("plots"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from runkey.plots import style
from runkey.plots.log import TrainingLog, read_log
from runkey.units import counted

_CLIPPED = 1.001
"""Norm before / after clipping above which a step was clipped; rounding alone stays below."""
_MAX_ROWS = 2000  # of a table: more than the pixels of a screen only make DVC's page slow
_TABLES = {
    "steps": {
        "train/lr": "lr",
        "train/loss": "loss",
        "train/grad_norm": "grad_norm",
        "train/grad_norm_clipped": "grad_norm_clipped",
    },
    "epochs": {"train/epoch_loss": "train_loss"},
    "evaluations": {"val/loss": "val_loss", "val/AP": "AP", "val/AP50": "AP50"},
}
"""Columns by metric of each table."""


def write_training_plots(log: Path, out: Path) -> list[Path]:
    """Draw all curves of a log, finished or not; the samples of the machine lie beside it."""
    training = read_log(log)
    drawn = (loss_and_ap, learning_rate, gradient_norm, throughput, machine)
    return [draw(training, out / f"{draw.__name__}.png") for draw in drawn]


def write_plot_tables(log: Path, out: Path) -> list[Path]:
    """Write steps.csv, epochs.csv and evaluations.csv of a training, for `dvc plots`.

    Points that lack a value which others have are left out, so that epochs without an evaluation
    have no row in evaluations.csv: DVC draws an empty cell as zero.
    """
    training = read_log(log)
    some = training.steps[:: max(1, -(-len(training.steps) // _MAX_ROWS))]
    of_steps = pd.Index([point.step for point in some], name="step")
    steps = pd.DataFrame([point.values for point in some], of_steps)
    epochs = pd.DataFrame([point.values for point in training.epochs])
    counted = pd.Series(range(1, len(epochs) + 1), dtype=float)
    of_epochs = epochs.get("train/epoch", counted).fillna(counted).round().astype(int)
    epochs.index = pd.Index(of_epochs, name="epoch")
    written = []
    for name, columns in _TABLES.items():
        points = steps if name == "steps" else epochs
        table = points.reindex(columns=list(columns)).rename(columns=columns)
        logged = table.columns[table.notna().any()]
        whole = table.dropna(subset=logged) if len(logged) else table.iloc[:0]
        written.append(style.write_table(out / f"{name}.csv", whole.reset_index()))
    return written


def loss_and_ap(log: TrainingLog, path: Path) -> Path:
    """Draw training and validation loss over AP, with the best epoch and an early stop marked."""
    with style.drawing(path, "Loss", "AP", height=2.9) as (losses, scores):
        if not (log.steps or log.epochs):
            return path
        _draw_losses(losses, log)
        _draw_scores(scores, log)
        _mark_best(log, losses, scores)
        style.legend_beside(losses)
        style.legend_beside(scores)
        _step_axis(scores, log)
        mark_events(losses, log)
    return path


def _draw_losses(axes: Any, log: TrainingLog) -> None:
    steps, values = log.series("train/loss")
    axes.plot(steps, values, color=style.BLUE, alpha=0.3, linewidth=1, label="train, each step")
    style.plot(axes, log.series("train/epoch_loss"), style.BLUE, "train, epoch mean")
    style.plot(axes, log.series("val/loss"), style.ORANGE, "validation")
    evaluated, gaps = log.series("val/loss_gap")
    _, losses = log.series("val/loss")
    if len(gaps) == len(losses) and np.isfinite(gaps).any():
        at_best = gaps[evaluated == log.best_step()]
        places = [f"{at_best[0]:.3g} at the best epoch"] if len(at_best) else []
        is_last = bool(places) and evaluated[-1] == log.best_step()
        places.append("the last" if is_last else f"{gaps[-1]:.3g} at the end")
        label = "generalisation gap:\n" + ",\n".join(places)
        look: dict[str, Any] = {"color": style.ORANGE, "alpha": 0.15, "linewidth": 0}
        axes.fill_between(evaluated, losses - gaps, losses, label=label, **look)
    finite = values[np.isfinite(values)]
    if len(finite) > 20:  # a few wild first steps must not flatten the rest
        axes.set_ylim(top=max(float(np.percentile(finite, 98)), float(finite[10:].max())) * 1.1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("loss per object")


def _draw_scores(axes: Any, log: TrainingLog) -> None:
    for name, colour in (("AP50", style.SKY), ("AP75", style.GREEN), ("AP", style.BLUE)):
        series = log.series(f"val/{name}")
        if np.isfinite(series[1]).any():
            style.plot(axes, series, colour, name)
    if axes.lines:
        top = min(1.0, max(0.1, 1.15 * axes.dataLim.y1))
        axes.set(ylim=(0, top), ylabel="validation AP, 0 to 1")
    else:
        style.show_empty(axes, "no evaluation yet")


def _mark_best(log: TrainingLog, losses: Any, scores: Any) -> None:
    """Mark the best epoch, whose weights are saved, and the wait of early stopping after it."""
    best = log.best_step()
    if best is None:
        return
    per_epoch = log.steps_per_epoch
    label = f"best: epoch {best / per_epoch:.0f}" if per_epoch else f"best: step {best:,}"
    steps, values = log.series("val/AP")
    at_best = values[steps == best]
    waited = int((steps > best).sum())
    # Early stopping counts the evaluations since the best one.
    stopped = waited and "early stop" in str(log.last_event("training_end").get("reason", ""))
    for axes in (losses, scores):
        axes.axvline(best, color=style.BLACK, linewidth=1.2, linestyle=":")
        if waited:
            axes.axvspan(best, steps[-1], color=style.PALE, zorder=0)
        if stopped:
            axes.axvline(steps[-1], color=style.VERMILLION, linewidth=1.4)
    if at_best.size and np.isfinite(at_best[0]):
        star: dict[str, Any] = {"marker": "*", "markersize": 14, "linestyle": "none", "zorder": 5}
        label += f",\nAP {at_best[0]:.3f}"
        scores.plot([best], at_best[:1], color=style.VERMILLION, label=label, **star)
    else:
        scores.plot([], [], color=style.BLACK, linestyle=":", linewidth=1.2, label=label)
    patience = log.last_event("training_start").get("patience")
    count = f"{waited} of {patience}" if patience else str(waited)
    label = f"{counted(count, 'evaluation')}\nwithout improvement"
    if stopped:
        scores.plot([], [], color=style.VERMILLION, linewidth=1.4, label=f"early stop: {label}")
    elif waited:
        scores.fill_between([], [], color=style.PALE, label=label)


def learning_rate(log: TrainingLog, path: Path) -> Path:
    """Draw the learning rate of each parameter group, with warm-up shaded and drops marked."""
    with style.drawing(path, "Learning rate", height=3.4) as (axes,):
        steps, rates = log.series("train/lr")
        if not len(steps):
            return path
        groups = sorted({n for p in log.steps for n in p.values if n.startswith("train/lr_")})
        for name, colour in zip(groups, (style.GREEN, style.PURPLE, style.SKY), strict=False):
            style.plot(axes, log.series(name), colour, name.removeprefix("train/lr_"))
        style.plot(axes, (steps, rates), style.BLUE, "all other parameters" if groups else None)
        rising = np.diff(rates) > 0
        if len(rising) and rising[0]:
            warmup = steps[-1 if rising.all() else int(np.argmin(rising))]
            label = f"warm-up, about {counted(f'{warmup:,.0f}', 'step')}"
            axes.axvspan(0, warmup, color=style.PALE, zorder=0, label=label)
        # A constant rate that falls; a smooth decay is constant nowhere, however steep.
        for place in range(2, len(rates)):
            before, rate = rates[place - 1 : place + 1]
            if rate < 0.7 * before and np.isclose(before, rates[place - 2], rtol=1e-3):
                axes.axvline(steps[place], color=style.ORANGE, linestyle=":", linewidth=1.4)
                look: dict[str, Any] = {"color": style.BLACK, "fontsize": 9, "va": "top"}
                at = (steps[place], before)
                text = f"x {rate / before:.2g}"
                axes.annotate(text, at, (4, -2), textcoords="offset points", **look)
        highest = max(np.nanmax(log.series(n)[1], initial=0) for n in ("train/lr", *groups))
        axes.set(ylabel="learning rate", ylim=(0, (highest or 1) * 1.08))
        axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")
        _step_axis(axes, log)
        style.legend(axes)
        mark_events(axes, log)
    return path


def gradient_norm(log: TrainingLog, path: Path) -> Path:
    """Draw the global gradient norm before and after clipping, and the share of clipped steps."""
    steps, before = log.series("train/grad_norm")
    after_steps, after = log.series("train/grad_norm_clipped")
    with style.drawing(path, "Gradient norm", "", height=2.7) as (norms, shares):
        if not len(steps) or len(steps) != len(after_steps):
            return path
        norms.plot(steps, before, color=style.VERMILLION, alpha=0.3, linewidth=1)
        median = pd.Series(before).rolling(9, center=True, min_periods=1).median()
        style.plot(
            norms, (steps, median.to_numpy()), style.VERMILLION, "before clipping, median of 9"
        )
        style.plot(norms, (steps, after), style.BLUE, "after")
        limit_steps, limits = log.series("train/clip_threshold")
        if (finite := limits[np.isfinite(limits)]).size:  # norms were clipped
            low, high = float(finite.min()), float(finite.max())
            label = f"threshold {low:.3g}" + (f" to {high:.3g}" if high > low * _CLIPPED else "")
            norms.plot(
                limit_steps, limits, color=style.BLACK, linestyle="--", linewidth=1.2, label=label
            )
        if (before[np.isfinite(before)] > 0).any():
            style.plain_log_scale(norms)
        norms.set_ylabel("L2 norm of all gradients")
        style.legend(norms)

        clipped = before > after * _CLIPPED
        per_epoch = log.steps_per_epoch or float(steps[-1])
        share = pd.Series(100.0 * clipped).groupby(np.ceil(steps / per_epoch)).mean()
        ends = np.minimum(share.index.to_numpy() * per_epoch, steps[-1])
        style.plot(shares, (ends, share.to_numpy()), style.GREEN)
        shares.set(title=f"Clipped: {clipped.mean():.0%} of the logged steps")
        shares.set(ylabel="steps clipped, %", ylim=(-4, 104))
        _step_axis(shares, log)
        mark_events(norms, log)
    return path


def throughput(log: TrainingLog, path: Path) -> Path:
    """Draw images per second, and the share of time in which training waited for data."""
    titles = ("Throughput", "Waiting for data")
    with style.drawing(path, *titles, height=2.4) as (speed, wait):
        for axes, name, factor, colour, label in (
            (speed, "train/images_per_second", 1, style.BLUE, "images per second"),
            (wait, "train/data_wait_share", 100, style.ORANGE, "share of the time, %"),
        ):
            steps, values = log.series(name)
            if not np.isfinite(values).any():
                style.show_empty(axes)
                continue
            values = values * factor
            style.plot(axes, (steps, values), colour)
            median = float(np.nanmedian(values))
            look: dict[str, Any] = {"color": style.GREY, "linestyle": "--", "linewidth": 1.2}
            axes.axhline(median, label=f"median {median:.1f}", **look)
            axes.set(ylabel=label, ylim=(0, max(1.0, float(np.nanmax(values)) * 1.15)))
            style.legend(axes)
        if log.steps:
            _step_axis(wait, log)
            mark_events(speed, log)
    return path


def machine(log: TrainingLog, path: Path) -> Path:
    """Draw the utilisation of CPU and GPUs, and the memory in use, over time."""
    titles, empty = ("CPU and GPU utilisation", "Memory in use"), "no samples of the machine"
    with style.drawing(path, *titles, height=2.5, empty=empty) as (busy, memory):
        if not log.samples:
            return path
        samples = pd.DataFrame([sample.values for sample in log.samples])
        seconds = np.array([sample.seconds for sample in log.samples]) - log.samples[0].seconds
        units = (("seconds", 1, 180), ("minutes", 60, 4 * 3600), ("hours", 3600, np.inf))
        unit, length = next((unit, n) for unit, n, most in units if seconds[-1] < most)
        samples.index = pd.Index(seconds / length)
        for axes, name, factor, colour, label in (
            (busy, "cpu_utilization_percentage", 1, style.BLUE, "CPU, all cores"),
            (memory, "system_memory_usage_megabytes", 1e-3, style.GREY, "host, all processes"),
            (memory, "process_memory_megabytes", 1e-3, style.BLACK, "host, this training"),
        ):
            values = samples.get(f"system/{name}")
            if values is not None and values.notna().any():
                style.plot(axes, (samples.index, factor * values), colour, label, markersize=3)
        _plot_gpus(busy, samples.filter(regex="/gpu_.*_utilization_percentage$"))
        _plot_gpus(memory, 1e-3 * samples.filter(regex="/gpu_.*_memory_usage_megabytes$"))
        busy.set(ylim=(0, 104), ylabel="utilisation, %")
        memory.set_ylim(bottom=0)
        memory.set(ylabel="GB", xlabel=f"{unit} since the start")
        memory.set_xlim(0, max(0.1, float(samples.index[-1])) * 1.01)
        style.legend_beside(busy)
        style.legend_beside(memory)
    return path


def _plot_gpus(axes: Any, gpus: pd.DataFrame) -> None:
    """Draw a line for each column, a GPU; of more than four, their mean and range."""
    colours = (style.ORANGE, style.GREEN, style.VERMILLION, style.PURPLE)
    times, values = gpus.index, gpus.sort_index(axis="columns").to_numpy().T
    if len(values) <= len(colours):
        for gpu, (line, colour) in enumerate(zip(values, colours, strict=False)):
            style.plot(axes, (times, line), colour, f"GPU {gpu}", markersize=3)
        return
    low, high = values.min(axis=0), values.max(axis=0)
    axes.fill_between(times, low, high, color=style.ORANGE, alpha=0.25, label="lowest to highest")
    style.plot(
        axes,
        (times, values.mean(axis=0)),
        style.ORANGE,
        f"mean of {len(values)} GPUs",
        markersize=3,
    )


def _step_axis(axes: Any, log: TrainingLog) -> None:
    """Label the lowest panel with optimizer steps, and with epochs below those."""
    axes.set(xlim=(0, max(1, log.last_step) * 1.02), xlabel="optimizer step")
    style.whole_numbers(axes)
    per_epoch = log.steps_per_epoch
    if per_epoch:
        below = axes.secondary_xaxis(
            "bottom", functions=(lambda step: step / per_epoch, lambda epoch: epoch * per_epoch)
        )
        below.set_xlabel("epoch")
        below.spines["bottom"].set_position(("outward", 38))
        style.whole_numbers(below)


# Name, marker and colour; each has a shape and a colour of its own.
_EVENTS = {
    "skipped_step": ("skipped step", "X", style.VERMILLION),
    "loss_spike": ("loss spike", "^", style.ORANGE),
    "rollback": ("rollback", "<", style.BLACK),
    "gave_up": ("gave up", "s", style.BLACK),
    "evaluation_failed": ("failed evaluation", "v", style.SKY),
    "split": ("batch split", "P", style.SKY),
    "resumed": ("resumed", ">", style.GREEN),
    "hint": ("hint", "D", style.PURPLE),
}
_RESTARTS = ("rollback", "resumed")
"""Training goes on from an earlier state: a line through the panel."""


def _times(count: int, name: str) -> str:
    """Such as `3 hints`, but `3 resumed`."""
    many = f"{count:,}"
    return f"{many} {name}" if name in ("gave up", "resumed") else counted(many, name)


def mark_events(axes: Any, log: TrainingLog) -> None:
    """Mark a training's events on the lower edge of a panel over optimizer steps.

    A legend above all panels has the number of events of each kind.
    """
    handles = []
    for kind, (name, shape, colour) in _EVENTS.items():
        found = (events for name, events in log.events.items() if name.split(".")[0] == kind)
        logged = [event.get("step") for events in found for event in events]
        steps = sorted({step for step in logged if isinstance(step, int)})
        if not steps:
            continue
        for step in steps if kind in _RESTARTS else ():
            axes.axvline(step, color=colour, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        look: dict[str, Any] = {"marker": shape, "linestyle": "none"}
        # x: steps; y: 0 is the lower edge.
        place = {"transform": axes.get_xaxis_transform(), "clip_on": False, "markeredgewidth": 0}
        # White edges lie below all marks: they would hide marks that stand close.
        for fill, size, order in (("white", 10, 5), (colour, 8, 6)):
            mark = {"color": fill, "markersize": size, "zorder": order}
            axes.plot(steps, [0.0] * len(steps), **look, **place, **mark)
        label = name if len(steps) == 1 else _times(len(steps), name)
        handles.append(Line2D([], [], color=colour, label=label, markersize=8, **look))
    if handles:
        look = {"columnspacing": 1.4, "handletextpad": 0.2, "borderaxespad": 0.15}
        look |= {"loc": "outside upper right", "ncols": min(4, len(handles))}
        axes.figure.legend(handles=handles, **look)
