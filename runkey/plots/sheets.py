"""Contact sheets: images with their boxes and class names, and ground truth beside detections."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from runkey.data.index import ClassName, ImageRecord
from runkey.evaluation.per_image import ImageScore, Judgement, rank_images
from runkey.files import write_atomically
from runkey.inference.draw import (
    Box,
    LabelledBox,
    class_colour,
    find_font,
    label_fewer,
    paint_boxes,
    printable,
)
from runkey.plots.style import BLUE, GREY, VERMILLION
from runkey.units import counted

MAX_BYTES = 150_000
RIGHT, WRONG = BLUE, VERMILLION
_INK, _PAPER, _BLANK = "#222222", "#FFFFFF", "#DFE3E6"
_WIDTH, _MARGIN, _GAP, _LINE = 1100, 16, 8, 20
_ROW_HEIGHT, _MAX_ROWS, _MAX_IMAGES = 190, 4, 24


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


def class_boxes(record: ImageRecord, classes: list[ClassName]) -> list[LabelledBox]:
    """Return the ground truth of an image, coloured by class."""
    return label_fewer(_truth(record, classes, list(map(class_colour, record.labels))), None)


def truth_boxes(score: ImageScore, classes: list[ClassName]) -> list[LabelledBox]:
    """Return the ground truth of an evaluated image, coloured by found or missed."""
    colours = [RIGHT if found else WRONG for found in score.found]
    return label_fewer(_truth(score.record, classes, colours), WRONG)


def detection_boxes(score: ImageScore, classes: list[ClassName]) -> list[LabelledBox]:
    """Return the detections in an evaluated image, coloured by right or wrong."""
    boxes = [
        LabelledBox(d.box_xywh, RIGHT if d.right else WRONG, class_name(classes[d.label]), d.score)
        for d in score.shown
    ]
    return label_fewer(boxes, WRONG)


def class_name(one: ClassName) -> str:
    """Return the name of a class, or its category id if the font lacks a letter of the name."""
    return printable(one.name, f"class {one.id}")


def _truth(record: ImageRecord, classes: list[ClassName], colours: list[str]) -> list[LabelledBox]:
    names = [class_name(classes[label]) for label in record.labels]
    return [
        LabelledBox(box, GREY if crowd else colour, name + " (crowd)" * crowd, is_crowd=crowd)
        for box, name, crowd, colour in zip(
            record.boxes_xywh, names, record.crowd, colours, strict=True
        )
    ]


class _Sheet:
    """A white picture that grows from images, boxes and text."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (_WIDTH, height), _PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def write(
        self, at: tuple[float, float], text: str, size: int, *, bold: bool = False, ink: str = _INK
    ) -> float:
        """Write a line with its top left corner at `at`; return where it ends, in pixels."""
        font = find_font(size, bold=bold)
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
        paint_boxes(self._draw, placed, frame)

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
        width = 18 + find_font(12).getlength(text) + 18
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


def _shorten(text: str, width: float, size: int) -> str:
    """Cut a line at its end so that it fits into `width` pixels."""
    shorter = (text[:end] + "…" for end in range(len(text) - 1, -1, -1))
    fitting = (line for line in chain([text], shorter) if find_font(size).getlength(line) <= width)
    return next(fitting, "…")
