"""Draw boxes with class names and scores on images; contact sheets and detections use this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

# Okabe and Ito (2008), as in `runkey.plots.style`. White in place of black, which vanishes on dark
# photographs; white lines have a dark outline.
_CLASS_COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00"),
    *("#CC79A7", "#56B4E9", "#FFFFFF", "#F0E442"),
)
_INK, _PAPER = "#222222", "#FFFFFF"
LABEL_SIZE = 11
"""Font size of labels on contact sheets, pixels."""
_MAX_LABELS = 10
"""An image with more boxes shows fewer labels, which would cover what they name."""
_LABEL_OF_IMAGE = 0.028
"""Font size of labels as a fraction of a whole image's short side."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the picture."""


@dataclass(frozen=True, slots=True)
class LabelledBox:
    """A box on an image, with its class and score."""

    box_xywh: tuple[float, float, float, float]
    """In pixels of the image."""
    colour: str
    name: str
    """Of the class."""
    score: float | None = None
    is_crowd: bool = False
    """A crowd region is drawn dashed."""
    is_labelled: bool = True
    """Whether name and score are written."""


def class_colour(index: int) -> str:
    """Return the colour of a class; of more than eight classes, some share one."""
    return _CLASS_COLOURS[index % len(_CLASS_COLOURS)]


def printable(text: str, instead: str) -> str:
    """Return `text`, or `instead` if it is blank or the font lacks a letter of it."""
    return text if text.strip() and _letters().issuperset(map(ord, text)) else instead


def label_fewer(boxes: list[LabelledBox], always: str | None = None) -> list[LabelledBox]:
    """Of many boxes, label those of the colour `always`, and the largest of each class."""
    if len(boxes) <= _MAX_LABELS:
        return boxes

    def area(box: LabelledBox) -> float:
        return box.box_xywh[2] * box.box_xywh[3]

    largest = {box.name: area(box) for box in sorted(boxes, key=area)}
    return [
        replace(box, is_labelled=box.colour == always or area(box) == largest[box.name])
        for box in boxes
    ]


def place_label(
    width: float,
    box: Box,
    frame: Box,
    labels: Sequence[Box],
    boxes: Sequence[Box] = (),
    size: int = LABEL_SIZE,
) -> Box | None:
    """Find a place for a label of `width` pixels at a box, inside the frame of the image.

    `size` is that of its font. Return None if other `labels` take all places; of those left, choose
    the one that covers least of the image's `boxes`.
    """
    height = size + 4
    left, top, right, bottom = box
    places = []
    for x, y in (
        (left - 1, top - height - 1),
        (left - 1, bottom + 2),
        (right + 1 - width, top - height - 1),
        (right + 1 - width, bottom + 2),
        (right + 3, top - 1),
        (left - 2 - width, top - 1),
        (left - 1, top - 1),
    ):
        x, y = min(max(round(x), frame[0]), frame[2] - width), round(y)
        place = (x, y, x + width, y + height)
        if x >= frame[0] and y >= frame[1] and y + height <= frame[3]:
            places.append(place)
    free = [p for p in places if not any(_shared_area(p, label) for label in labels)]

    def hidden(place: Box) -> float:
        return sum(_shared_area(place, b) / max(1, _shared_area(b, b)) for b in boxes)

    return min(free, key=hidden, default=None)


def draw_boxes(image: NDArray[np.uint8], boxes: Sequence[LabelledBox]) -> Image.Image:
    """Draw labelled boxes into a copy of an image [H, W, 3]; lines and letters fit its size."""
    picture = Image.fromarray(image)
    size = max(LABEL_SIZE, round(_LABEL_OF_IMAGE * min(picture.size)))
    shown = [replace(box, name=printable(box.name, "?")) for box in boxes]
    frame = (0.0, 0.0, float(picture.width), float(picture.height))
    placed = []
    for box in shown:
        left, top, width, height = box.box_xywh
        placed.append(((left, top, left + width, top + height), box))
    paint_boxes(ImageDraw.Draw(picture), placed, frame, size)
    return picture


def paint_boxes(
    draw: ImageDraw.ImageDraw,
    placed: Sequence[tuple[Box, LabelledBox]],
    frame: Box,
    size: int = LABEL_SIZE,
) -> None:
    """Paint boxes at their places inside a frame, the small ones on top, with their labels."""
    placed = sorted(placed, key=lambda pair: -_shared_area(pair[0], pair[0]))
    width = max(2, size // 6)
    for place, box in placed:
        _outline(draw, place, box, width)
    labels: list[Box] = []
    font = find_font(size)
    for place, box in placed:
        text = box.name if box.score is None else f"{box.name} {box.score:.2f}"
        length = font.getlength(text) + 6
        at = place_label(length, place, frame, labels, [one for one, _ in placed], size)
        if box.is_labelled and at:
            labels.append(at)
            draw.rectangle((at[0], at[1], at[2] - 1, at[3] - 1), fill=box.colour)
            is_light = ImageColor.getcolor(box.colour, "L") > 140  # type: ignore[operator]
            ink = _INK if is_light else _PAPER
            draw.text((at[0] + 3, at[1] + 1), text, fill=ink, font=font)


def _outline(draw: ImageDraw.ImageDraw, place: Box, box: LabelledBox, width: int) -> None:
    """Draw lines of colour within a dark line, so that they show on any background."""
    left, top, right, bottom = map(round, place)
    if box.is_crowd:
        for x in range(left, right, 8):
            for y in (top, bottom):
                draw.line((x, y, min(x + 4, right), y), fill=box.colour, width=width)
        for y in range(top, bottom, 8):
            for x in (left, right):
                draw.line((x, y, x, min(y + 4, bottom)), fill=box.colour, width=width)
        return
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=_INK)
    draw.rectangle((left, top, right, bottom), outline=box.colour, width=width)


def _shared_area(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


@cache
def find_font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which has more alphabets than Pillow's own font; `size` in pixels."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    path = str(fonts / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"))
    # Every Pillow has the basic layout; another one moves letters from machine to machine.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _letters() -> frozenset[int]:
    return frozenset(FT2Font(str(find_font(12).path)).get_charmap())
