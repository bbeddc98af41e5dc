"""What a training shows while it runs: text beside its bar, and a line or two per epoch."""

from __future__ import annotations

from collections.abc import Mapping

from runkey.units import format_seconds


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
    return format_seconds(seconds).replace("min", "m").replace(" ", "")
