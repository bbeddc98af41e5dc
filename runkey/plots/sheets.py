"""Contact sheets: images with their boxes and class names, and ground truth beside detections."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

from runkey.data.index import ClassName, ImageRecord
from runkey.evaluation.per_image import ImageScore, Judgement, rank_images
from runkey.files import write_atomically
from runkey.plots.style import BLACK, BLUE, CYCLE, GREY, VERMILLION
from runkey.units import counted

MAX_BYTES = 150_000
RIGHT, WRONG = BLUE, VERMILLION
_INK, _PAPER, _BLANK = "#222222", "#FFFFFF", "#DFE3E6"
# Black lines vanish on dark photographs; white ones have a dark outline.
_CLASS_COLOURS = tuple(_PAPER if colour == BLACK else colour for colour in CYCLE)
_WIDTH, _MARGIN, _GAP, _LINE = 1100, 16, 8, 20
_ROW_HEIGHT, _MAX_ROWS, _MAX_IMAGES = 190, 4, 24
_LABEL_SIZE = 11
_MAX_LABELS = 10
"""An image with more boxes shows fewer labels, which would cover what they name."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the sheet."""


def contact_sheet(
    records: list[ImageRecord], classes: list[ClassName], data_folder: Path, path: Path
) -> Path:
    """Draw images of a split, evenly chosen, with their ground truth, as a JPEG.

    `ImageRecord.file` is relative to `data_folder`.
    """
    count = min(_MAX_IMAGES, len(records))
    rows = _rows([records[i * len(records) // count] for i in range(count)])
    objects = Counter(label for record in records for _, label, _ in record.objects())
    legend = _legend(classes, objects)
    top = _MARGIN + 26 + _LINE * len(legend) + _GAP
    sheet = _Sheet(top + sum(height + _GAP for _, height in rows) + _MARGIN - _GAP)
    shown = sum(len(row) for row, _ in rows)
    title = f"{shown:,} of {counted(f'{len(records):,}', 'image')}"
    title += f" · {counted(f'{objects.total():,}', 'object')}"
    title += f" · {counted(f'{len(classes):,}', 'class')}"
    sheet.write((_MARGIN, _MARGIN - 4), title, 16, bold=True)
    for number, line in enumerate(legend):
        sheet.write_legend(_MARGIN + 24 + _LINE * number, line)
    for row, height in rows:
        left = float(_MARGIN)
        for record in row:
            frame = (left, top, left + _aspect(record) * height, top + height)
            sheet.draw_image(_load(record, data_folder), frame, class_boxes(record, classes))
            left = frame[2] + _GAP
        top += height + _GAP
    return sheet.save(path)


def detection_sheet(
    judged: Judgement,
    classes: list[ClassName],
    data_folder: Path,
    path: Path,
    *,
    best: bool,
    images: int = 8,
) -> Path:
    """Draw the best or the worst images, ground truth beside detections, as a JPEG.

    Images are ranked by F1 at IoU 0.5 (`runkey.evaluation.per_image`). Detections below the score
    at which the F1 of the whole split is largest are not drawn.
    """
    chosen = rank_images(judged.images, best=best)[:images]
    width = (_WIDTH - 4 * _MARGIN - 2 * _GAP) // 4
    aspects = [score.record.width / score.record.height for score in chosen] or [4 / 3]
    height = round(width / float(np.clip(np.median(aspects), 0.7, 2.0)))
    block = height + 24 + _MARGIN
    head = _MARGIN + 26 + _LINE + _GAP
    sheet = _Sheet(head + max(1, -(-len(chosen) // 2)) * block)
    _write_head(sheet, judged, f"The {len(chosen)} {'best' if best else 'worst'}")
    for number, score in enumerate(chosen):
        left = _MARGIN + (number % 2) * (2 * width + _GAP + 2 * _MARGIN)
        top = head + (number // 2) * block
        sheet.write((left, top), _shorten(_caption(score), 2 * width + _GAP, 12), 12)
        picture = _load(score.record, data_folder)
        sides = (truth_boxes(score, classes), detection_boxes(score, classes))
        for x, boxes in zip((left, left + width + _GAP), sides, strict=True):
            sheet.draw_image(picture, (x, top + 20, x + width, top + 20 + height), boxes)
    return sheet.save(path)


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


def class_boxes(record: ImageRecord, classes: list[ClassName]) -> list[LabelledBox]:
    """Return the ground truth of an image, coloured by class."""
    return _label_fewer(_truth(record, classes, list(map(class_colour, record.labels))), None)


def truth_boxes(score: ImageScore, classes: list[ClassName]) -> list[LabelledBox]:
    """Return the ground truth of an evaluated image, coloured by found or missed."""
    colours = [RIGHT if found else WRONG for found in score.found]
    return _label_fewer(_truth(score.record, classes, colours), WRONG)


def detection_boxes(score: ImageScore, classes: list[ClassName]) -> list[LabelledBox]:
    """Return the detections in an evaluated image, coloured by right or wrong."""
    boxes = [
        LabelledBox(d.box_xywh, RIGHT if d.right else WRONG, class_name(classes[d.label]), d.score)
        for d in score.shown
    ]
    return _label_fewer(boxes, WRONG)


def class_colour(index: int) -> str:
    """Return the colour of a class; of more than eight classes, some share one."""
    return _CLASS_COLOURS[index % len(_CLASS_COLOURS)]


def class_name(one: ClassName) -> str:
    """Return the name of a class, or its category id if the font lacks a letter of the name."""
    return printable(one.name, f"class {one.id}")


def printable(text: str, instead: str) -> str:
    """Return `text`, or `instead` if it is blank or the font lacks a letter of it."""
    return text if text.strip() and _letters().issuperset(map(ord, text)) else instead


def _truth(record: ImageRecord, classes: list[ClassName], colours: list[str]) -> list[LabelledBox]:
    names = [class_name(classes[label]) for label in record.labels]
    return [
        LabelledBox(box, GREY if crowd else colour, name + " (crowd)" * crowd, is_crowd=crowd)
        for box, name, crowd, colour in zip(
            record.boxes_xywh, names, record.crowd, colours, strict=True
        )
    ]


def _label_fewer(boxes: list[LabelledBox], always: str | None) -> list[LabelledBox]:
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
    width: float, box: Box, frame: Box, labels: Sequence[Box], boxes: Sequence[Box] = ()
) -> Box | None:
    """Find a place for a label of `width` pixels at a box, inside the frame of the image.

    Return None if other `labels` take all places; of those left, choose the one that covers least
    of the image's `boxes`.
    """
    height = _LABEL_SIZE + 4
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


class _Sheet:
    """A white picture that grows from images, boxes and text."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (_WIDTH, height), _PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def write(
        self, at: tuple[float, float], text: str, size: int, *, bold: bool = False, ink: str = _INK
    ) -> float:
        """Write a line with its top left corner at `at`; return where it ends, in pixels."""
        font = _font(size, bold=bold)
        self._draw.text(at, text, fill=ink, font=font)
        return at[0] + font.getlength(text)

    def write_legend(self, y: float, entries: Sequence[tuple[str, str]]) -> float:
        """Write (colour, text) pairs from the left margin on; return where they end."""
        x = float(_MARGIN)
        for colour, text in entries:
            self._draw.rectangle((x, y, x + 12, y + 12), fill=colour, outline=_INK)
            x = self.write((x + 18, y - 2), text, 12) + 18
        return x

    def draw_image(self, picture: Image.Image, frame: Box, boxes: Sequence[LabelledBox]) -> None:
        """Fit an image into a frame and draw its boxes, the small ones on top."""
        left, top, right, bottom = frame
        scale = min((right - left) / picture.width, (bottom - top) / picture.height)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        x = round((left + right - size[0]) / 2)
        y = round((top + bottom - size[1]) / 2)
        self._draw.rectangle((left, top, right - 1, bottom - 1), fill=_BLANK)
        self.image.paste(picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2), (x, y))
        placed = [(_scaled(box.box_xywh, scale, x, y, frame), box) for box in boxes]
        placed.sort(key=lambda pair: -_shared_area(pair[0], pair[0]))
        for place, box in placed:
            self._outline(place, box)
        labels: list[Box] = []
        for place, box in placed:
            text = box.name if box.score is None else f"{box.name} {box.score:.2f}"
            width = _font(_LABEL_SIZE).getlength(text) + 6
            at = place_label(width, place, frame, labels, [one for one, _ in placed])
            if box.is_labelled and at:
                labels.append(at)
                self._draw.rectangle((at[0], at[1], at[2] - 1, at[3] - 1), fill=box.colour)
                is_light = ImageColor.getcolor(box.colour, "L") > 140  # type: ignore[operator]
                ink = _INK if is_light else _PAPER
                self.write((at[0] + 3, at[1] + 1), text, _LABEL_SIZE, ink=ink)

    def _outline(self, place: Box, box: LabelledBox) -> None:
        """Draw two pixels of colour within a dark line, so that they show on any background."""
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
        self._draw.rectangle((left, top, right, bottom), outline=box.colour, width=2)

    def save(self, path: Path) -> Path:
        """Write a JPEG of at most `MAX_BYTES`: lower its quality first, then its size."""
        image = self.image
        while True:
            for quality in range(88, 50, -6):
                data = io.BytesIO()
                image.save(data, "JPEG", quality=quality, optimize=True)
                if data.tell() <= MAX_BYTES:
                    write_atomically(path, data.getvalue())
                    return path
            image = ImageOps.scale(image, 0.85, Image.Resampling.LANCZOS)


def _write_head(sheet: _Sheet, judged: Judgement, title: str) -> None:
    scores = judged.images
    title = f"{title} of {counted(f'{len(scores):,}', 'image')}"
    end = sheet.write((_MARGIN, _MARGIN - 4), title, 16, bold=True)
    sheet.write((end + 10, _MARGIN - 2), "ground truth left, detections right", 13)
    right = sum(score.right for score in scores)
    total = 2 * right + sum(score.false + score.missed for score in scores)
    y = _MARGIN + 24
    meanings = [(RIGHT, "true positive"), (WRONG, "false positive, or missed object")]
    end = sheet.write_legend(y, meanings)
    which = f"detections of score {judged.threshold:.2f} and above (largest F1 of all images: "
    which += f"{2 * right / total if total else 1:.2f}); match: same class, IoU 0.5"
    sheet.write((end, y - 2), which, 12)


def _caption(score: ImageScore) -> str:
    name = printable(Path(score.record.file).name, f"image {score.record.id}")
    return (
        f"F1 {score.f1:.2f} · {score.right} of {score.objects} found · "
        f"{counted(score.false, 'false positive')} · {name}"
    )


def _legend(classes: list[ClassName], counts: Counter[int]) -> list[list[tuple[str, str]]]:
    """Return at most two lines of (colour, text); the last entry counts those that do not fit."""
    lines: list[list[tuple[str, str]]] = [[]]
    x = float(_MARGIN)
    for number, one in enumerate(classes):
        text = f"{_shorten(class_name(one), 160, 12)} {counts[one.index]:,}"
        width = 18 + _font(12).getlength(text) + 18
        is_full = x + width > _WIDTH - _MARGIN - (120 if len(lines) == 2 else 0)
        if is_full and len(lines) == 2:
            lines[-1].append((_BLANK, f"and {len(classes) - number} more"))
            break
        if is_full:
            lines.append([])
            x = float(_MARGIN)
        lines[-1].append((class_colour(one.index), text))
        x += width
    return lines


def _rows(records: list[ImageRecord]) -> list[tuple[list[ImageRecord], int]]:
    """Break images into full rows with the height of each; the last row may stay short."""
    rows: list[tuple[list[ImageRecord], int]] = []
    row: list[ImageRecord] = []
    for record in records:
        row.append(record)
        room = _WIDTH - 2 * _MARGIN - _GAP * (len(row) - 1)
        height = room / sum(map(_aspect, row))
        if height <= _ROW_HEIGHT:
            rows.append((row, int(height)))
            row = []
    if row:
        rows.append((row, _ROW_HEIGHT))
    return rows[:_MAX_ROWS]


def _aspect(record: ImageRecord) -> float:
    """Return width / height of an image's frame, which is limited for very long images."""
    return min(max(record.width / record.height, 0.4), 3.0)


def _load(record: ImageRecord, data_folder: Path) -> Image.Image:
    from runkey.data.decode import decode_rgb  # imports torch, which a report does without

    pixels = decode_rgb(
        data_folder / record.file, record.rotate, record.mirror, record.intensity_range
    )
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _scaled(box_xywh: Box, scale: float, x: float, y: float, frame: Box) -> Box:
    """Return a box in pixels of the sheet, cut off at the frame, at least some pixels large."""
    left, top, width, height = box_xywh
    return (
        min(max(x + scale * left, frame[0]), frame[2] - 4),
        min(max(y + scale * top, frame[1]), frame[3] - 4),
        max(min(x + scale * (left + width), frame[2] - 2), frame[0] + 2),
        max(min(y + scale * (top + height), frame[3] - 2), frame[1] + 2),
    )


def _shared_area(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


@cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which has more alphabets than Pillow's own font; `size` in pixels."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    path = str(fonts / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"))
    # Every Pillow has the basic layout; another one moves letters from machine to machine.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _letters() -> frozenset[int]:
    return frozenset(FT2Font(str(_font(12).path)).get_charmap())


def _shorten(text: str, width: float, size: int) -> str:
    """Cut a line at its end so that it fits into `width` pixels."""
    shorter = (text[:end] + "…" for end in range(len(text) - 1, -1, -1))
    fitting = (line for line in chain([text], shorter) if _font(size).getlength(line) <= width)
    return next(fitting, "…")
