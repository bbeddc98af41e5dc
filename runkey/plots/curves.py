"""Curves of a training: loss and AP, learning rate, gradient norm, speed, the machine.

write_training_plots(Path("logs/train.jsonl"), Path("plots"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from runkey.plots.log import SAMPLES, Point, Series, TrainingLog, gpu_names, read_log, read_samples
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
    marker,
    plain_log_scale,
    show_empty,
    whole_numbers,
)

_CLIPPED = 1.001
"""Norm before / after clipping above which a step was clipped; rounding alone stays below."""


def write_training_plots(log: Path, out: Path) -> list[Path]:
    """Draw all curves of a training.

    Args:
        log: logs/train.jsonl, finished or not; the samples of the machine lie beside it.
        out: the folder; made if it is not there.

    Returns:
        The written files.

    Raises:
        DataError: there is no log.
    """
    training = read_log(log)
    return [
        loss_and_ap(training, out / "loss_and_ap.png"),
        learning_rate(training, out / "learning_rate.png"),
        gradient_norm(training, out / "gradient_norm.png"),
        throughput(training, out / "throughput.png"),
        machine(read_samples(log.with_name(SAMPLES)), out / "machine.png"),
    ]


def loss_and_ap(log: TrainingLog, path: Path) -> Path:
    """Draw training and validation loss over AP, with the best epoch and an early stop marked."""
    with drawing(path, panels=2, height=2.9) as (figure, (losses, scores)):
        losses.set_title("Loss")
        scores.set_title("AP")
        if not (log.steps or log.epochs):
            show_empty((losses, scores))
            return path
        _draw_losses(losses, log)
        if not _draw_scores(scores, log):
            show_empty([scores], "no evaluation yet")
        _mark_best(log, losses, scores)
        legend_beside(losses)
        legend_beside(scores)
        _step_axis(scores, log)
        mark_events(figure, (losses,), log)
    return path


def _draw_losses(axes: Any, log: TrainingLog) -> None:
    """Draw the loss of each logged step, of each epoch and of validation, and their gap."""
    steps, values = log.of_steps("train/loss")
    axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1, label="train, each step")
    _plot(axes, log.of_epochs("train/epoch_loss"), BLUE, "train, epoch mean")
    _plot(axes, log.of_epochs("val/loss"), ORANGE, "validation")
    _draw_gap(axes, log)
    finite = values[np.isfinite(values)]
    if len(finite) > 20:  # a few wild first steps must not flatten the rest
        axes.set_ylim(top=max(float(np.percentile(finite, 98)), float(finite[10:].max())) * 1.1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("loss per object")


def _draw_gap(axes: Any, log: TrainingLog) -> None:
    """Shade the generalisation gap (validation loss - training loss)."""
    steps, gaps = log.of_epochs("val/loss_gap")
    _, losses = log.of_epochs("val/loss")
    if len(gaps) != len(losses) or not np.isfinite(gaps).any():
        return
    at_best = gaps[steps == log.best_step()]
    best = f"{at_best[0]:.3g} at the best epoch,\n" if len(at_best) else ""
    label = f"generalisation gap:\n{best}{gaps[-1]:.3g} at the end"
    axes.fill_between(
        steps, losses - gaps, losses, color=ORANGE, alpha=0.15, linewidth=0, label=label
    )


def _draw_scores(axes: Any, log: TrainingLog) -> bool:
    """Draw AP, AP50 and AP75; return False if there are none."""
    highest = -np.inf
    for name, colour in (("AP50", SKY), ("AP75", GREEN), ("AP", BLUE)):
        steps, values = log.of_epochs(f"val/{name}")
        if np.isfinite(values).any():
            _plot(axes, (steps, values), colour, name)
            highest = max(highest, float(np.nanmax(values)))
    if not np.isfinite(highest):
        return False
    axes.set_ylim(0, min(1.0, max(0.1, 1.15 * highest)))
    axes.set_ylabel("validation AP, 0 to 1")
    return True


def _mark_best(log: TrainingLog, losses: Any, scores: Any) -> None:
    """Mark the best epoch, whose weights are saved, and the wait of early stopping after it."""
    best = log.best_step()
    if best is None:
        return
    per_epoch = log.steps_per_epoch
    label = f"best: epoch {best / per_epoch:.0f}" if per_epoch else f"best: step {best:,}"
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
            label=f"{label},\nAP {at_best[0]:.3f}",
            zorder=5,
        )
    else:
        scores.plot([], [], color=BLACK, linestyle=":", linewidth=1.2, label=label)
    waited = int((steps > best).sum())
    if waited:
        _mark_patience(log, best, float(steps[-1]), waited, (losses, scores))


def _mark_patience(
    log: TrainingLog, best: int, last: float, waited: int, panels: Sequence[Any]
) -> None:
    """Shade the evaluations since the best one, which early stopping counts, and mark a stop."""
    for axes in panels:
        axes.axvspan(best, last, color=PALE, zorder=0)
        if log.stopped_early:
            axes.axvline(last, color=VERMILLION, linewidth=1.4)
    patience = log.events.get("training_start", {}).get("patience")
    count = f"{waited} of {patience}" if patience else str(waited)
    plural = "s" if waited != 1 or patience else ""
    label = f"{count} evaluation{plural}\nwithout improvement"
    if log.stopped_early:
        label = f"early stop: {label}"
        panels[-1].plot([], [], color=VERMILLION, linewidth=1.4, label=label)
    else:
        panels[-1].fill_between([], [], color=PALE, label=label)


def learning_rate(log: TrainingLog, path: Path) -> Path:
    """Draw the learning rate of each parameter group, with warm-up shaded and drops marked."""
    with drawing(path, panels=1, height=3.4) as (figure, (axes,)):
        axes.set_title("Learning rate")
        steps, rates = log.of_steps("train/lr")
        if not len(steps):
            show_empty([axes])
            return path
        groups = sorted({n for p in log.steps for n in p.values if n.startswith("train/lr_")})
        for name, colour in zip(groups, (GREEN, PURPLE, SKY), strict=False):
            _plot(axes, log.of_steps(name), colour, name.removeprefix("train/lr_"))
        _plot(axes, (steps, rates), BLUE, "all other parameters" if groups else None)
        warmup = _warmup_end(steps, rates)
        if warmup:
            axes.axvspan(
                0, warmup, color=PALE, zorder=0, label=f"warm-up, about {warmup:,.0f} steps"
            )
        for place, factor in _rate_drops(rates):
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
        highest = max(np.nanmax(log.of_steps(n)[1], initial=0) for n in ("train/lr", *groups))
        axes.set_ylabel("learning rate")
        axes.set_ylim(bottom=0, top=(highest or 1) * 1.08)
        axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")
        _step_axis(axes, log)
        legend(axes)
        mark_events(figure, (axes,), log)
    return path


def _warmup_end(steps: NDArray[np.float64], rates: NDArray[np.float64]) -> float | None:
    """Return the step at which a rate that rises from the start stops rising."""
    rising = np.diff(rates) > 0
    if not len(rising) or not rising[0]:
        return None
    return float(steps[int(np.argmin(rising)) if not rising.all() else -1])


def _rate_drops(rates: NDArray[np.float64]) -> list[tuple[int, float]]:
    """Return index and factor of each place where a constant rate falls below 0.7 of itself.

    A smooth decay is constant nowhere, however steep it is between two logged steps.
    """
    return [
        (i, rates[i] / rates[i - 1])
        for i in range(2, len(rates))
        if rates[i] < 0.7 * rates[i - 1] and np.isclose(rates[i - 1], rates[i - 2], rtol=1e-3)
    ]


def gradient_norm(log: TrainingLog, path: Path) -> Path:
    """Draw the global gradient norm before and after clipping, and the share of clipped steps."""
    steps, before = log.of_steps("train/grad_norm")
    after_steps, after = log.of_steps("train/grad_norm_clipped")
    with drawing(path, panels=2, height=2.7) as (figure, (norms, shares)):
        norms.set_title("Gradient norm")
        if not len(steps) or len(steps) != len(after_steps):
            show_empty((norms, shares))
            return path
        norms.plot(steps, before, color=VERMILLION, alpha=0.3, linewidth=1)
        _plot(norms, (steps, _running_median(before)), VERMILLION, "before clipping, median of 9")
        _plot(norms, (steps, after), BLUE, "after")
        _draw_threshold(norms, log)
        if (before[np.isfinite(before)] > 0).any():
            plain_log_scale(norms)
        norms.set_ylabel("L2 norm of all gradients")
        legend(norms)

        clipped = before > after * _CLIPPED
        ends, share = _clipped_shares(log, steps, clipped)
        _plot(shares, (ends, 100 * share), GREEN)
        shares.set_title(f"Clipped: {clipped.mean():.0%} of the logged steps")
        shares.set_ylabel("steps clipped, %")
        shares.set_ylim(-4, 104)
        _step_axis(shares, log)
        mark_events(figure, (norms,), log)
    return path


def _draw_threshold(axes: Any, log: TrainingLog) -> None:
    """Draw the clipping threshold that was logged; nothing if norms were not clipped."""
    steps, limits = log.of_steps("train/clip_threshold")
    finite = limits[np.isfinite(limits)]
    if not len(finite):
        return
    low, high = float(finite.min()), float(finite.max())
    label = f"threshold {low:.3g}" + (f" to {high:.3g}" if high > low * _CLIPPED else "")
    axes.plot(steps, limits, color=BLACK, linestyle="--", linewidth=1.2, label=label)


def _clipped_shares(
    log: TrainingLog, steps: NDArray[np.float64], clipped: NDArray[np.bool_]
) -> Series:
    """Return the last step of each epoch, and the share of its logged steps that were clipped."""
    per_epoch = log.steps_per_epoch or float(steps[-1])
    epochs = np.ceil(steps / per_epoch)
    numbers = np.unique(epochs)
    share = np.array([clipped[epochs == epoch].mean() for epoch in numbers])
    return np.minimum(numbers * per_epoch, steps[-1]), share


def _running_median(values: NDArray[np.float64], width: int = 9) -> NDArray[np.float64]:
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.nanmedian(w) if np.isfinite(w).any() else np.nan for w in windows])


def throughput(log: TrainingLog, path: Path) -> Path:
    """Draw images per second, and the share of time in which training waited for data."""
    with drawing(path, panels=2, height=2.4) as (figure, (speed, wait)):
        speed.set_title("Throughput")
        wait.set_title("Waiting for data")
        for axes, name, factor, colour, label in (
            (speed, "train/images_per_second", 1, BLUE, "images per second"),
            (wait, "train/data_wait_share", 100, ORANGE, "share of the time, %"),
        ):
            steps, values = log.of_steps(name)
            if not np.isfinite(values).any():
                show_empty([axes])
                continue
            values = values * factor
            median = float(np.nanmedian(values))
            _plot(axes, (steps, values), colour)
            axes.axhline(
                median, color=GREY, linestyle="--", linewidth=1.2, label=f"median {median:.1f}"
            )
            axes.set_ylabel(label)
            axes.set_ylim(0, max(1.0, float(np.nanmax(values)) * 1.15))
            legend(axes)
        if log.steps:
            _step_axis(wait, log)
            mark_events(figure, (speed,), log)
    return path


def machine(samples: Sequence[Point], path: Path) -> Path:
    """Draw the utilisation of CPU and GPUs, and the memory in use, over time.

    Args:
        samples: as `read_samples` gives them; may be empty.
        path: the picture, PNG.
    """
    with drawing(path, panels=2, height=2.5) as (_, (busy, memory)):
        busy.set_title("CPU and GPU utilisation")
        memory.set_title("Memory in use")
        if not samples:
            show_empty((busy, memory), "no samples of the machine")
            return path
        seconds = np.array([sample.seconds for sample in samples]) - samples[0].seconds
        unit, length = _time_unit(float(seconds[-1]))
        times = seconds / length

        def plot(axes: Any, name: str, factor: float, colour: str, label: str) -> None:
            values = _values(samples, f"system/{name}", factor)
            if np.isfinite(values).any():
                _plot(axes, (times, values), colour, label, size=3)

        plot(busy, "cpu_utilization_percentage", 1, BLUE, "CPU, all cores")
        plot(memory, "system_memory_usage_megabytes", 1e-3, GREY, "host, all processes")
        plot(memory, "process_memory_megabytes", 1e-3, BLACK, "host, this training")
        _plot_gpus(busy, times, samples, "_utilization_percentage", 1)
        _plot_gpus(memory, times, samples, "_memory_usage_megabytes", 1e-3)
        busy.set_ylim(0, 104)
        busy.set_ylabel("utilisation, %")
        memory.set_ylim(bottom=0)
        memory.set_ylabel("GB")
        memory.set_xlabel(f"{unit} since the start")
        memory.set_xlim(0, max(0.1, float(times[-1])) * 1.01)
        legend_beside(busy)
        legend_beside(memory)
    return path


def _plot_gpus(
    axes: Any, times: NDArray[np.float64], samples: Sequence[Point], suffix: str, factor: float
) -> None:
    """Draw a line for each GPU; of more than four, their mean and range."""
    colours = (ORANGE, GREEN, VERMILLION, PURPLE)
    names = gpu_names(samples, suffix)
    values = np.array([_values(samples, name, factor) for name in names])
    if len(names) <= len(colours):
        for gpu, (line, colour) in enumerate(zip(values, colours, strict=False)):
            _plot(axes, (times, line), colour, f"GPU {gpu}", size=3)
        return
    low, high = values.min(axis=0), values.max(axis=0)
    axes.fill_between(times, low, high, color=ORANGE, alpha=0.25, label="lowest to highest")
    _plot(axes, (times, values.mean(axis=0)), ORANGE, f"mean of {len(names)} GPUs", size=3)


def _values(samples: Sequence[Point], name: str, factor: float) -> NDArray[np.float64]:
    return np.array([factor * sample.values.get(name, np.nan) for sample in samples])


def _time_unit(seconds: float) -> tuple[str, int]:
    if seconds < 180:
        return "seconds", 1
    return ("minutes", 60) if seconds < 4 * 3600 else ("hours", 3600)


def _plot(axes: Any, series: Series, colour: str, label: str | None = None, size: int = 4) -> None:
    axes.plot(*series, color=colour, label=label, marker=marker(series[0]), markersize=size)


def _step_axis(axes: Any, log: TrainingLog) -> None:
    """Label the lowest panel with optimizer steps, and with epochs below those."""
    last = max([point.step for point in (*log.steps[-1:], *log.epochs[-1:])], default=1)
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


class _EventStyle(NamedTuple):
    name: str
    plural: str
    marker: str
    colour: str
    is_restart: bool = False
    """Whether training goes on from an earlier state: a line through the panels."""


# Each has a shape and a colour of its own.
_EVENTS = {
    "skipped_step": _EventStyle("skipped step", "skipped steps", "X", VERMILLION),
    "loss_spike": _EventStyle("loss spike", "loss spikes", "^", ORANGE),
    "rollback": _EventStyle("rollback", "rollbacks", "<", BLACK, is_restart=True),
    "gave_up": _EventStyle("gave up", "gave up", "s", BLACK),
    "evaluation_failed": _EventStyle("failed evaluation", "failed evaluations", "v", SKY),
    "split": _EventStyle("batch split", "batch splits", "P", SKY),
    "resumed": _EventStyle("resumed", "resumed", ">", GREEN, is_restart=True),
    "hint": _EventStyle("hint", "hints", "D", PURPLE),
}


def mark_events(figure: Any, panels: Sequence[Any], log: TrainingLog) -> None:
    """Mark a training's events on the lower edge of panels over optimizer steps.

    Args:
        figure: gets a legend above all panels, with the number of events of each kind.
        panels: axes.
        log: of the training.
    """
    handles = []
    for kind, style in _EVENTS.items():
        steps = sorted(log.event_steps.get(kind, ()))
        if not steps:
            continue
        look = {"marker": style.marker, "markersize": 8, "linestyle": "none"}
        for axes in panels:
            for step in steps if style.is_restart else ():
                axes.axvline(step, color=style.colour, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
            # White edges lie below all marks: they would hide marks that stand close.
            for colour, size, order in (("white", 10, 5), (style.colour, 8, 6)):
                axes.plot(
                    steps,
                    [0.0] * len(steps),
                    transform=axes.get_xaxis_transform(),  # x: steps; y: 0 is the lower edge
                    **look | {"markersize": size},
                    color=colour,
                    markeredgewidth=0,
                    clip_on=False,
                    zorder=order,
                )
        label = style.name if len(steps) == 1 else f"{len(steps):,} {style.plural}"
        handles.append(Line2D([], [], color=style.colour, label=label, **look))  # type: ignore[arg-type]
    if handles:
        figure.legend(
            handles=handles,
            loc="outside upper right",
            ncols=min(4, len(handles)),
            columnspacing=1.4,
            handletextpad=0.2,
            borderaxespad=0.15,
        )
