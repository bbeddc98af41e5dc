"""Boxes and names on images, with PIL."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from runkey.data.index import ClassName, Record
from runkey.evaluation.per_image import ImageScore
from runkey.plots.style import BLACK, BLUE, CYCLE, GREY, VERMILLION

# The font of all pictures, and names in letters that it has.


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


# What is drawn on an image: each box with its colour and its words.


RIGHT, WRONG = BLUE, VERMILLION
# Black lines vanish on dark photographs; white ones do not, having a dark shadow.
CLASS_COLOURS = tuple("#FFFFFF" if colour == BLACK else colour for colour in CYCLE)
MOST_TAGS = 10


@dataclass(frozen=True, slots=True)
class Mark:
    """One box on an image."""

    box_xywh: tuple[float, float, float, float]
    """In pixels of the image."""
    colour: str
    name: str
    """Of the class."""
    score: float | None = None
    dashed: bool = False
    tagged: bool = True
    """Whether name and score are written."""

    @property
    def text(self) -> str:
        """What is written at the box."""
        return self.name if self.score is None else f"{self.name} {self.score:.2f}"

    @property
    def area(self) -> float:
        """Pixels of the image."""
        return self.box_xywh[2] * self.box_xywh[3]


def class_name(c: ClassName) -> str:
    """Its name, or its category id if the font lacks a letter of the name."""
    return drawable(c.name, f"class {c.id}")


def class_colour(index: int) -> str:
    """A class's colour; with more than eight classes, some share one."""
    return CLASS_COLOURS[index % len(CLASS_COLOURS)]


def class_marks(record: Record, classes: list[ClassName]) -> list[Mark]:
    """The truth in the colours of the classes."""
    colours = [class_colour(label) for label in record.labels]
    return _with_fewer_tags(_truth(record, classes, colours), keep=None)


def judged_truth(score: ImageScore, classes: list[ClassName]) -> list[Mark]:
    """The truth in the colours of found and missed."""
    colours = [RIGHT if found else WRONG for found in score.found]
    return _with_fewer_tags(_truth(score.record, classes, colours), keep=WRONG)


def judged_predictions(score: ImageScore, classes: list[ClassName]) -> list[Mark]:
    """The detections in the colours of right and false, with their scores."""
    marks = [
        Mark(
            shown.box_xywh,
            RIGHT if shown.right else WRONG,
            class_name(classes[shown.label]),
            shown.score,
        )
        for shown in score.shown
    ]
    return _with_fewer_tags(marks, keep=WRONG)


def draw_marks(
    canvas: Canvas, marks: list[Mark], place: tuple[float, float, float], frame: Box
) -> None:
    """Draw marks on an image that was pasted at `place`; the small ones come to lie on top.

    Args:
        canvas: the picture.
        marks: of one image.
        place: scale, left and top, as `Canvas.paste` returns them.
        frame: nothing is drawn outside it.
    """
    placed = [(_placed(mark, place, frame), mark) for mark in marks]
    placed.sort(key=lambda pair: -box_area(pair[0]))
    boxes = [box for box, _ in placed]
    for box, mark in placed:
        canvas.outline(box, mark.colour, dashed=mark.dashed)
    for box, mark in placed:
        if mark.tagged:
            canvas.tag(box, frame, mark.text, mark.colour, boxes)


def _with_fewer_tags(marks: list[Mark], keep: str | None) -> list[Mark]:
    """In a crowded image, only the largest box of each class is tagged, and all of colour `keep`.

    More tags would cover what they stand for; the colours tell the rest.
    """
    if len(marks) <= MOST_TAGS:
        return marks
    largest: dict[str, float] = {}
    for mark in marks:
        largest[mark.name] = max(mark.area, largest.get(mark.name, 0.0))
    return [
        replace(mark, tagged=mark.colour == keep or mark.area == largest[mark.name])
        for mark in marks
    ]


def _truth(record: Record, classes: list[ClassName], colours: list[str]) -> list[Mark]:
    marks = []
    for box, label, crowd, colour in zip(
        record.boxes_xywh, record.labels, record.crowd, colours, strict=True
    ):
        name = class_name(classes[label])
        marks.append(
            Mark(box, GREY, f"{name} (crowd)", dashed=True) if crowd else Mark(box, colour, name)
        )
    return marks


def _placed(mark: Mark, place: tuple[float, float, float], frame: Box) -> Box:
    """The box in pixels of the canvas, cut off at the frame, at least some pixels large."""
    scale, x, y = place
    left, top, width, height = mark.box_xywh
    return (
        min(max(x + scale * left, frame[0]), frame[2] - 4),
        min(max(y + scale * top, frame[1]), frame[3] - 4),
        max(min(x + scale * (left + width), frame[2] - 2), frame[0] + 2),
        max(min(y + scale * (top + height), frame[3] - 2), frame[1] + 2),
    )


MAX_BYTES = 150_000
INK = "#222222"
PAPER = "#FFFFFF"
BLANK = "#DFE3E6"
TAG_SIZE = 11

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


class Canvas:
    """A picture that grows from boxes, names and images; tags never cover one another."""

    def __init__(self, width: int, height: int) -> None:
        """A white picture of that many pixels."""
        self.image = Image.new("RGB", (width, height), PAPER)
        self._draw = ImageDraw.Draw(self.image)
        self._tags: list[Box] = []

    def write(
        self, at: tuple[float, float], text: str, size: int = 13, *, bold: bool = False
    ) -> float:
        """Write one line with its top left corner at `at`; returns where it ends, in pixels."""
        self._draw.text(at, text, fill=INK, font=font(size, bold=bold))
        return at[0] + text_width(text, size, bold=bold)

    def chip(self, at: tuple[float, float], colour: str, size: int = 12) -> None:
        """A small square, for a legend."""
        x, y = at
        self._draw.rectangle((x, y, x + size, y + size), fill=colour, outline=INK)

    def paste(self, picture: Image.Image, frame: Box) -> tuple[float, float, float]:
        """Put an image into a frame, as large as it fits, centred.

        Returns:
            Scale, and left and top of the image: its pixel (x, y) is at (left + scale x, ...).
        """
        left, top, right, bottom = frame
        scale = min((right - left) / picture.width, (bottom - top) / picture.height)
        width = max(1, round(picture.width * scale))
        height = max(1, round(picture.height * scale))
        x = round(left + (right - left - width) / 2)
        y = round(top + (bottom - top - height) / 2)
        self._draw.rectangle((left, top, right - 1, bottom - 1), fill=BLANK)
        self.image.paste(
            picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2), (x, y)
        )
        return scale, x, y

    def outline(self, box: Box, colour: str, *, dashed: bool = False) -> None:
        """A box of two pixels' width on a dark shadow, so that it shows on any ground."""
        left, top, right, bottom = (round(v) for v in box)
        right, bottom = max(right, left + 2), max(bottom, top + 2)
        if dashed:
            self._dashes((left, top, right, bottom), colour)
            return
        self._draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=INK)
        self._draw.rectangle((left, top, right, bottom), outline=colour, width=2)

    def tag(self, box: Box, frame: Box, text: str, colour: str, boxes: Sequence[Box] = ()) -> bool:
        """Write `text` at a box, inside the frame, where no other tag is.

        Of the places around the box, the one that covers least of `boxes` is taken.

        Returns:
            False if there was no room, and nothing was written.
        """
        width, height = text_width(text, TAG_SIZE) + 6, TAG_SIZE + 4
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
            inside = place[0] >= frame[0] and place[1] >= frame[1] and place[3] <= frame[3]
            if inside and not any(_shared(place, other) for other in self._tags):
                places.append(place)
        if not places:
            return False
        place = min(places, key=lambda p: sum(_shared(p, b) / max(1, box_area(b)) for b in boxes))
        self._tags.append(place)
        self._draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=colour)
        ink = INK if _is_light(colour) else PAPER
        self._draw.text((place[0] + 3, place[1] + 1), text, fill=ink, font=font(TAG_SIZE))
        return True

    def save(self, path: Path) -> Path:
        """Write a JPEG of at most `MAX_BYTES`; quality gives way first, then size."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(light_jpeg(self.image))
        return path

    def _dashes(self, box: Sequence[int], colour: str) -> None:
        left, top, right, bottom = box
        for start in range(left, right, 8):
            for y in (top, bottom):
                self._draw.line((start, y, min(start + 4, right), y), fill=colour, width=2)
        for start in range(top, bottom, 8):
            for x in (left, right):
                self._draw.line((x, start, x, min(start + 4, bottom)), fill=colour, width=2)


def box_area(box: Box) -> float:
    """Pixels in a box."""
    return (box[2] - box[0]) * (box[3] - box[1])


def text_width(text: str, size: int = 13, *, bold: bool = False) -> float:
    """Width of a line in pixels."""
    return font(size, bold=bold).getlength(text)


def shorten(text: str, width: float, size: int = 13) -> str:
    """Cut a line at its end so that it fits into `width` pixels."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


def light_jpeg(image: Image.Image) -> bytes:
    """A JPEG of at most `MAX_BYTES`."""
    while True:
        for quality in (88, 82, 76, 70, 64, 58, 52):
            content = io.BytesIO()
            image.save(content, "JPEG", quality=quality, optimize=True)
            if content.tell() <= MAX_BYTES:
                return content.getvalue()
        size = (round(image.width * 0.85), round(image.height * 0.85))
        image = image.resize(size, Image.Resampling.LANCZOS)


def _shared(one: Box, other: Box) -> float:
    """Pixels that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _is_light(colour: str) -> bool:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140
