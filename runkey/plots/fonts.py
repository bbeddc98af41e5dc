"""The font of all pictures, and names in letters that it has.

DejaVu Sans comes with matplotlib: Latin, Greek, Cyrillic, Arabic, Hebrew and more, but no Chinese,
Japanese or Korean.  A name with other letters would come out as empty boxes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import ImageFont


@cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans for drawing with PIL; `size` in pixels."""
    # The basic layout is in every PIL; another would move letters from machine to machine.
    layout = ImageFont.Layout.BASIC
    return ImageFont.truetype(str(_path(bold=bold)), size, layout_engine=layout)


def drawable(name: str, instead: str) -> str:
    """`name`, or `instead` if the font lacks a letter of it."""
    letters = _letters()
    return name if name.strip() and all(ord(letter) in letters for letter in name) else instead


@cache
def _letters() -> frozenset[int]:
    return frozenset(FT2Font(str(_path(bold=False))).get_charmap())


def _path(*, bold: bool) -> Path:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
