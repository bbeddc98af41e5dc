"""The look of every figure: one palette, one width; the same bytes for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from runkey.files import write_atomically
from runkey.inference.draw import BLACK as BLACK
from runkey.inference.draw import BLUE as BLUE
from runkey.inference.draw import CYCLE as CYCLE
from runkey.inference.draw import GREEN as GREEN
from runkey.inference.draw import ORANGE as ORANGE
from runkey.inference.draw import PURPLE as PURPLE
from runkey.inference.draw import SKY as SKY
from runkey.inference.draw import VERMILLION as VERMILLION
from runkey.inference.draw import YELLOW as YELLOW
from runkey.plots.log import Series

if TYPE_CHECKING:
    import pandas as pd

GREY = "#8A8A8A"
PALE = "#EEF1F4"

_SETTINGS = Path(__file__).with_name("figures.mplstyle")
_DPI = 100
_EMPTY = "nothing logged yet"


@contextmanager
def drawing(
    path: Path, *titles: str, height: float = 3.0, columns: int = 1, empty: str = _EMPTY
) -> Iterator[list[Any]]:
    """Yield the panels of a figure, below each other, and save it when the block ends.

    Args:
        path: .png or .svg; its folder is made.
        titles: of the panels, which share the horizontal axis.
        height: of one panel, in inches; the figure is 9 inches (900 pixels) wide.
        columns: of panels.
        empty: what panels show instead of empty frames if none has data.
    """
    rows = len(titles) // columns
    with matplotlib.rc_context(fname=_SETTINGS):
        figure = Figure(figsize=(9, height * rows + 0.5), dpi=_DPI, layout="constrained")
        panels = list(figure.subplots(rows, columns, sharex="col", squeeze=False).ravel())
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(title)
        yield panels
        if not any(axes.has_data() or axes.texts for axes in panels):
            for axes in panels:
                show_empty(axes, empty)
        if path.suffix == ".svg":
            # Neither date nor version in the file, whose bytes depend on the numbers alone.
            data = io.BytesIO()
            figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None})
            write_atomically(path, data.getvalue())
        else:
            write_atomically(path, _small_png(figure))


def _small_png(figure: Figure) -> bytes:
    """Render a PNG of at most 256 colours, which takes a quarter of the bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")  # type: ignore[no-untyped-call]
    # An octree keeps the colours of lines and text; a median cut changes them.
    reduced = image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    data = io.BytesIO()
    reduced.save(data, "PNG", optimize=True)
    return data.getvalue()


def write_table(path: Path, table: pd.DataFrame, digits: str | None = "%.6g") -> Path:
    """Write a CSV table that `dvc plots show` and `dvc plots diff` draw."""
    write_atomically(path, table.to_csv(index=False, float_format=digits, lineterminator="\n"))
    return path


def show_empty(axes: Any, text: str = _EMPTY) -> None:
    """Write in a panel that has no data."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def cut(text: str, length: int) -> str:
    """Shorten a text to `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def plot(axes: Any, series: Series, colour: str, label: str | None = None, **look: Any) -> None:
    """Plot a curve, with dots while it has few points: a single one needs one."""
    look = {"marker": "o" if len(series[0]) <= 60 else "", "markersize": 4} | look
    axes.plot(*series, color=colour, label=label, **look)


def whole_numbers(axes: Any) -> None:
    """Put the ticks of the horizontal axis on whole numbers, with separated thousands."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def plain_log_scale(axes: Any) -> None:
    """Make the vertical axis logarithmic, with ticks at 1, 2, 5, 10, ... as plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend(axes: Any) -> None:
    """Place the legend in one line above the panel, right of its title."""
    if handles := axes.get_legend_handles_labels()[0]:
        look = {"borderaxespad": 0.15, "columnspacing": 1.4, "handlelength": 1.6}
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(handles), **look)


def legend_beside(axes: Any, title: str | None = None) -> None:
    """Place the legend right of the panel, as a list with a title."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title=title, alignment="left")
