"""The figure behind a picture, so that tests can look at its lines and labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure


def figure_of(draw: Callable[..., Any], *content: object, folder: Path) -> Figure:
    """Draw as SVG, which matplotlib saves itself, and keep what it saves."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        draw(*content, folder / "drawn.svg")
    (figure,) = saved
    return figure


def labels_of(axes: Any, first_word: str = "") -> list[str]:
    """Labels in the legend that begin so."""
    return [text for text in axes.get_legend_handles_labels()[1] if text.startswith(first_word)]
