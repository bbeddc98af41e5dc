"""Progress of a training: a bar on a terminal, and a line or two per epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from runkey.progress import progress, want_bars

Display = Callable[[int, int, str], None]
"""Shows the optimizer steps done, the current epoch (from 1) and the latest values."""


@contextmanager
def open_display(total_steps: int, epochs: int, *, wanted: bool) -> Iterator[Display]:
    """Show a progress bar until the block ends; nothing where there is no terminal.

    Lines printed meanwhile appear above it. It counts the optimizer steps of the whole training.
    """
    want_bars(wanted)
    done = 0
    # Each epoch logs a line of its own.
    with progress("train", total_steps, lines=False) as steps:

        def update(step: int, epoch: int, text: str) -> None:
            nonlocal done
            steps.advance(step - done, text, f"epoch {epoch}/{epochs}")
            done = step

        yield update


def bar_text(values: Mapping[str, float], seconds_left: float) -> str:
    """Format throughput, loss, gradient norm, rate, data wait and time left in one short line."""
    return "  ".join([*pace_parts(values, "train/loss"), f"left {clock(seconds_left)}"])


def epoch_line(
    epoch: int,
    epochs: int,
    values: Mapping[str, float],
    seconds_left: float,
    *,
    watched: str,
    is_best: bool,
) -> str:
    """Format an epoch's log line, and one more below it if it was evaluated.

    `watched` names the metric that decides on the best weights; `epoch` counts from 1.
    """
    start = f"epoch {epoch:{len(str(epochs))}d}/{epochs}"
    parts = [start, *pace_parts(values, "train/epoch_loss"), f"left {clock(seconds_left)}"]
    shown = [
        f"{name} {values[name]:.4g}{' (best)' if is_best and name == watched else ''}"
        for name in values
        if name in (watched, "val/AP", "val/AP50", "val/loss")
    ]
    return "\n".join("  ".join(line) for line in (parts, [" " * len(start), *shown]) if line[1:])


def pace_parts(values: Mapping[str, float], loss_name: str) -> list[str]:
    """Format the values that are there: `loss 3.21`, `grad 0.41`, ..."""
    shown = {
        loss_name: "loss {:.4g}",
        "train/grad_norm": "grad {:.3g}",
        "train/lr": "lr {:.2e}",
        "train/images_per_second": "{:.1f} img/s",
        "train/data_wait_share": "wait {:.0%}",
    }
    return [form.format(values[name]) for name, form in shown.items() if name in values]


def clock(seconds: float) -> str:
    """Format a duration: `41s`, `2m10s`, `3h05m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
