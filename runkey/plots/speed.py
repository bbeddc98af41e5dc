"""AP against milliseconds of the ways to run a trained model, from a `SpeedReport`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runkey.identity.key import short_key
from runkey.inference.speed import AS_EVALUATED, SpeedReport
from runkey.plots import style

_RUNTIMES = {
    "torch": ("torch, eager", style.BLUE),
    "compiled": ("torch.compile", style.SKY),
    "onnx": ("ONNX Runtime", style.ORANGE),
    "openvino": ("OpenVINO", style.GREEN),
    "tensorrt": ("TensorRT", style.PURPLE),
}
_MARKERS = {"fp32": "o", "bf16": "s", "fp16": "D", "int8": "^"}


def draw_frontier(report: SpeedReport, path: Path) -> Path:
    """Draw every choice, and number those that no other one beats in both AP and time.

    Colours are runtimes, markers number formats. The list beside the panel names the numbered
    choices, and the model as it is evaluated.
    """
    clock = "wall" if report.on_gpu else "processor"
    title = f"{short_key(report.key)}: AP and {clock} time of {len(report.measured)} ways to run it"
    with style.drawing(path, title, height=4.6) as (axes,):
        for one in report.measured:
            _, colour = _RUNTIMES[one.choice.runtime]
            marker = _MARKERS[one.choice.precision]
            axes.plot(
                report.ms(one), one.ap, marker, color=colour, markersize=8, markeredgecolor="white"
            )
        best = report.frontier()
        times, scores = [report.ms(one) for one in best], [one.ap for one in best]
        axes.step(times, scores, where="post", color=style.GREY, linewidth=1.2, zorder=0)
        _name_points(axes, report)
        axes.set_xlabel(f"{clock} time, ms an image (batch {report.batch})")
        axes.set_ylabel(f"AP on {report.images} val images")
        axes.set_xlim(0, None)
        axes.margins(y=0.1)
        _legend(axes, report)
    return path


def _name_points(axes: Any, report: SpeedReport) -> None:
    best = report.frontier()
    base = report.base
    lines = []
    for number, one in enumerate([*best, *([] if base in best else [base])], start=1):
        mark = str(number) if one in best else "E"
        axes.annotate(
            mark,
            (report.ms(one), one.ap),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            weight="bold",
        )
        name = "as evaluated" if one.choice == AS_EVALUATED else one.choice.name
        lines.append(f"{mark}  {name}\n     AP {one.ap:.3f}, {report.ms(one):.3g} ms")
    axes.text(
        1.03, 0.0, "\n".join(lines), transform=axes.transAxes, fontsize=8, va="bottom", ha="left"
    )


def _legend(axes: Any, report: SpeedReport) -> None:
    for runtime in dict.fromkeys(one.choice.runtime for one in report.measured):
        label, colour = _RUNTIMES[runtime]
        axes.plot([], [], "o", color=colour, label=label)
    for precision in dict.fromkeys(one.choice.precision for one in report.measured):
        axes.plot([], [], _MARKERS[precision], color=style.GREY, label=precision)
    style.legend_beside(axes)
