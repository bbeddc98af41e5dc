"""Boxes and names on images, with PIL."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from runkey.plots.fonts import font

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
