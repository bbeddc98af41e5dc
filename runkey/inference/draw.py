"""Draw boxes with their class names and scores: on one image, and on sheets of many.

Colours are Okabe and Ito's (2008), distinct with any kind of colour blindness. The font is DejaVu
Sans, which comes with matplotlib; without matplotlib it is Pillow's own, which has fewer alphabets.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

from runkey.files import write_atomically
from runkey.units import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
VERMILLION = "#D55E00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
YELLOW = "#F0E442"
BLACK = "#222222"
CYCLE = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK, YELLOW)
_INK, _PAPER, _BLANK = "#222222", "#FFFFFF", "#DFE3E6"
# Black lines vanish on dark photographs; white ones have a dark outline.
_CLASS_COLOURS = tuple(_PAPER if colour == BLACK else colour for colour in CYCLE)

SHEET_BYTES = 150_000
"""Most bytes of a sheet's file."""
SHEET_IMAGES = 24
"""Most images of a sheet in rows."""
WIDTH, MARGIN, GAP, LINE = 1100, 16, 8, 20
"""Pixels of a sheet: its width, the white edge, between images, of a line of text."""
_ROW_HEIGHT, _MAX_ROWS = 190, 4
_LABEL_SIZE = 11
_MAX_LABELS = 10
"""An image of a sheet with more boxes shows fewer labels, which would cover what they name."""
DRAWN_SIDES = (640, 1600)
"""Least and most pixels of a drawn image's long side; a smaller image is enlarged by a
whole number, a larger one reduced."""
_MAX_DRAWN_LABELS = 40
_LABELS_ON_A_SIDE = 50
"""Letters' heights that the long side of a drawn image holds."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of what is drawn."""


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


class Drawable(Protocol):
    """The n detections of an image, see `runkey.inference.detections.Detections`."""

    # Not that class itself: pictures are drawn again when the code changes that this file imports.
    @property
    def boxes_xyxy(self) -> NDArray[np.float32]: ...  # noqa: D102
    @property
    def scores(self) -> NDArray[np.float32]: ...  # noqa: D102
    @property
    def labels(self) -> NDArray[np.int64]: ...  # noqa: D102
    @property
    def names(self) -> list[str]: ...  # noqa: D102
    @property
    def image_size(self) -> tuple[int, int]: ...  # noqa: D102


def draw_detections(picture: Image.Image, found: Drawable) -> Image.Image:
    """Draw detections into a copy of their image, whose long side becomes one of `DRAWN_SIDES`.

    `picture` is the image, of any size: boxes are scaled from that of the detections.
    """
    low, high = DRAWN_SIDES
    long_side = max(picture.size)
    if long_side < low:
        # By a whole number, so that the pixels of a small image stay recognisable.
        factor = -(-low // long_side)
        image = picture.resize((picture.width * factor, picture.height * factor))
    else:
        image = fitted(picture, high)
    canvas = Canvas(image.copy() if image is picture else image)
    height, width = found.image_size
    scale = (canvas.image.width / width, canvas.image.height / height)
    size = max(_LABEL_SIZE, round(max(canvas.image.size) / _LABELS_ON_A_SIDE))
    frame = (0.0, 0.0, float(canvas.image.width), float(canvas.image.height))
    boxes = label_fewer(detected_boxes(found), None, _MAX_DRAWN_LABELS)
    canvas.draw_boxes(boxes, scale, frame, size)
    return canvas.image


def detected_boxes(found: Drawable) -> list[LabelledBox]:
    """Return detections as boxes to be drawn, coloured by class."""
    return [
        LabelledBox((x1, y1, x2 - x1, y2 - y1), class_colour(label), class_text(name, label), score)
        for (x1, y1, x2, y2), score, label, name in zip(
            found.boxes_xyxy.tolist(),
            found.scores.tolist(),
            found.labels.tolist(),
            found.names,
            strict=True,
        )
    ]


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """Shrink an image so that its long side has at most `side` pixels."""
    scale = side / max(picture.size)
    if scale >= 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2)


def class_colour(index: int) -> str:
    """Return the colour of a class; of more than eight classes, some share one."""
    return _CLASS_COLOURS[index % len(_CLASS_COLOURS)]


def class_text(name: str, index: int) -> str:
    """Return the name of a class, or its index if the font lacks a letter of the name."""
    return printable(name, f"class {index}")


def printable(text: str, instead: str) -> str:
    """Return `text`, or `instead` if it is blank or the font lacks a letter of it."""
    return text if text.strip() and _letters().issuperset(map(ord, text)) else instead


def label_fewer(
    boxes: list[LabelledBox], always: str | None, most: int = _MAX_LABELS
) -> list[LabelledBox]:
    """Of more than `most` boxes, label those of the colour `always`, and the largest of each class.

    Of the others colour and place are seen, and no label covers them.
    """
    if len(boxes) <= most:
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
    height: int = _LABEL_SIZE + 4,
) -> Box | None:
    """Find a place for a label of `width` pixels at a box, inside the frame of the image.

    Return None if other `labels` take all places; of those left, choose the one that covers least
    of the image's `boxes`.
    """
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


class Canvas:
    """A picture on which boxes and text are drawn."""

    def __init__(self, image: Image.Image) -> None:
        """Args: image: RGB; it is drawn on."""
        self.image = image
        self._draw = ImageDraw.Draw(image)

    def write(
        self, at: tuple[float, float], text: str, size: int, *, bold: bool = False, ink: str = _INK
    ) -> float:
        """Write a line with its top left corner at `at`; return where it ends, in pixels."""
        font = _font(size, bold=bold)
        self._draw.text(at, text, fill=ink, font=font)
        return at[0] + font.getlength(text)

    def draw_boxes(
        self,
        boxes: Sequence[LabelledBox],
        scale: tuple[float, float],
        frame: Box,
        label_size: int = _LABEL_SIZE,
    ) -> None:
        """Draw the boxes of an image that fills `frame` at that scale, the small ones on top.

        `label_size` is the height of the letters in pixels, which the width of the lines follows.
        """
        line = max(2, round(label_size / 8))
        placed = [(_scaled(box.box_xywh, scale, frame), box) for box in boxes]
        placed.sort(key=lambda pair: -_shared_area(pair[0], pair[0]))
        for place, box in placed:
            self._outline(place, box, line)
        labels: list[Box] = []
        others = [place for place, _ in placed]
        for place, box in placed:
            if not box.is_labelled:
                continue
            text = box.name if box.score is None else f"{box.name} {box.score:.2f}"
            width = _font(label_size).getlength(text) + 6
            at = place_label(width, place, frame, labels, others, label_size + 4)
            if at:
                labels.append(at)
                self._draw.rectangle((at[0], at[1], at[2] - 1, at[3] - 1), fill=box.colour)
                is_light = ImageColor.getcolor(box.colour, "L") > 140  # type: ignore[operator]
                ink = _INK if is_light else _PAPER
                self.write((at[0] + 3, at[1] + 1), text, label_size, ink=ink)

    def _outline(self, place: Box, box: LabelledBox, line: int) -> None:
        """Draw pixels of colour within a dark line, so that they show on any background."""
        left, top, right, bottom = map(round, place)
        if box.is_crowd:
            for x in range(left, right, 8):
                for y in (top, bottom):
                    self._draw.line((x, y, min(x + 4, right), y), fill=box.colour, width=2)
            for y in range(top, bottom, 8):
                for x in (left, right):
                    self._draw.line((x, y, x, min(y + 4, bottom)), fill=box.colour, width=2)
            return
        self._draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=_INK)
        self._draw.rectangle((left, top, right, bottom), outline=box.colour, width=line)


class Sheet(Canvas):
    """A white picture that grows from images, boxes and text."""

    def __init__(self, height: int) -> None:
        super().__init__(Image.new("RGB", (WIDTH, height), _PAPER))

    def write_legend(self, y: float, entries: Sequence[tuple[str, str]]) -> float:
        """Write (colour, text) pairs from the left margin on; return where they end."""
        x = float(MARGIN)
        for colour, text in entries:
            self._draw.rectangle((x, y, x + 12, y + 12), fill=colour, outline=_INK)
            x = self.write((x + 18, y - 2), text, 12) + 18
        return x

    def draw_image(
        self,
        picture: Image.Image,
        frame: Box,
        boxes: Sequence[LabelledBox],
        size: tuple[int, int] | None = None,
    ) -> None:
        """Fit an image into a frame and draw its boxes.

        `size` is the (width, height) that the boxes are in; None: the picture's.
        """
        left, top, right, bottom = frame
        scale = min((right - left) / picture.width, (bottom - top) / picture.height)
        shown = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        x = round((left + right - shown[0]) / 2)
        y = round((top + bottom - shown[1]) / 2)
        self._draw.rectangle((left, top, right - 1, bottom - 1), fill=_BLANK)
        self.image.paste(picture.resize(shown, Image.Resampling.BICUBIC, reducing_gap=2), (x, y))
        width, height = size or picture.size
        factors = (scale * picture.width / width, scale * picture.height / height)
        self.draw_boxes(boxes, factors, (x, y, x + shown[0], y + shown[1]))

    def save(self, path: Path) -> Path:
        """Write a JPEG of at most `SHEET_BYTES`: lower its quality first, then its size."""
        image = self.image
        while True:
            for quality in range(88, 50, -6):
                data = io.BytesIO()
                image.save(data, "JPEG", quality=quality, optimize=True)
                if data.tell() <= SHEET_BYTES:
                    write_atomically(path, data.getvalue())
                    return path
            image = ImageOps.scale(image, 0.85, Image.Resampling.LANCZOS)


@dataclass(frozen=True, slots=True)
class SheetImage:
    """An image of a sheet; it is loaded only when it is drawn."""

    size: tuple[int, int]
    """Width and height that the boxes are in."""
    load: Callable[[], Image.Image]
    boxes: list[LabelledBox]


def draw_rows(
    path: Path,
    total: int,
    title: str,
    classes: Iterable[tuple[int, str]],
    objects: Counter[int],
    images: Sequence[SheetImage],
) -> Path:
    """Draw a sheet of images in rows, with a title and the classes' colours, as a JPEG.

    Args:
        path: of the file.
        total: how many images there are; the title begins with how many of them are shown.
        title: what follows there.
        classes: (index, name) in the order of the legend.
        objects: how many objects of each class the legend says.
        images: those that fit are drawn.
    """
    legend = _legend(classes, objects)
    top = MARGIN + 26 + LINE * len(legend) + GAP
    rows = _rows(images)
    sheet = Sheet(top + sum(height + GAP for _, height in rows) + MARGIN - GAP)
    shown = sum(len(row) for row, _ in rows)
    some = f"{shown:,} of " if shown < total else ""
    title = f"{some}{counted(f'{total:,}', 'image')}{title}"
    sheet.write((MARGIN, MARGIN - 4), title, 16, bold=True)
    for number, line in enumerate(legend):
        sheet.write_legend(MARGIN + 24 + LINE * number, line)
    for row, height in rows:
        left = float(MARGIN)
        for one in row:
            frame = (left, top, left + _aspect(one) * height, top + height)
            sheet.draw_image(one.load(), frame, one.boxes, one.size)
            left = frame[2] + GAP
        top += height + GAP
    return sheet.save(path)


def _legend(
    classes: Iterable[tuple[int, str]], counts: Counter[int]
) -> list[list[tuple[str, str]]]:
    """Return at most two lines of (colour, text); the last entry counts those that do not fit."""
    lines: list[list[tuple[str, str]]] = [[]]
    x = float(MARGIN)
    entries = list(classes)
    for number, (index, name) in enumerate(entries):
        text = f"{shorten(name, 160, 12)} {counts[index]:,}"
        width = 18 + _font(12).getlength(text) + 18
        is_full = x + width > WIDTH - MARGIN - (120 if len(lines) == 2 else 0)
        if is_full and len(lines) == 2:
            lines[-1].append((_BLANK, f"and {len(entries) - number} more"))
            break
        if is_full:
            lines.append([])
            x = float(MARGIN)
        lines[-1].append((class_colour(index), text))
        x += width
    return lines


def _rows(images: Sequence[SheetImage]) -> list[tuple[list[SheetImage], int]]:
    """Break images into full rows with the height of each; the last row may stay short."""
    rows: list[tuple[list[SheetImage], int]] = []
    row: list[SheetImage] = []
    for image in images:
        row.append(image)
        space = WIDTH - 2 * MARGIN - GAP * (len(row) - 1)
        height = space / sum(map(_aspect, row))
        if height <= _ROW_HEIGHT:
            rows.append((row, int(height)))
            row = []
    if row:
        rows.append((row, _ROW_HEIGHT))
    return rows[:_MAX_ROWS]


def _aspect(image: SheetImage) -> float:
    """Return width / height of an image's frame, which is limited for very long images."""
    return min(max(image.size[0] / image.size[1], 0.4), 3.0)


def _scaled(box_xywh: Box, scale: tuple[float, float], frame: Box) -> Box:
    """Return a box in pixels of the canvas, cut off at the frame, at least some pixels large."""
    left, top, width, height = box_xywh
    x, y = frame[:2]
    return (
        min(max(x + scale[0] * left, frame[0]), frame[2] - 4),
        min(max(y + scale[1] * top, frame[1]), frame[3] - 4),
        max(min(x + scale[0] * (left + width), frame[2] - 2), frame[0] + 2),
        max(min(y + scale[1] * (top + height), frame[3] - 2), frame[1] + 2),
    )


def _shared_area(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


@cache
def _font_folder() -> Path | None:
    try:
        import matplotlib
    except ImportError:
        return None
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return DejaVu Sans, which has more alphabets than Pillow's own font; `size` in pixels."""
    if (folder := _font_folder()) is None:
        return ImageFont.load_default(size)
    path = str(folder / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"))
    # Every Pillow has the basic layout; another one moves letters from machine to machine.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _letters() -> frozenset[int]:
    """Code points of the font's letters."""
    if (folder := _font_folder()) is None:
        return frozenset(range(32, 127))
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(folder / "DejaVuSans.ttf")).get_charmap())


def shorten(text: str, width: float, size: int) -> str:
    """Cut a line at its end so that it fits into `width` pixels."""
    shorter = (text[:end] + "…" for end in range(len(text) - 1, -1, -1))
    fitting = (line for line in chain([text], shorter) if _font(size).getlength(line) <= width)
    return next(fitting, "…")
