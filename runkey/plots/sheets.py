"""Sheets of images: what is trained on, and what was detected beside what is there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from runkey.data.decode import decode_rgb
from runkey.data.index import ClassName, Record
from runkey.evaluation.per_image import ImageScore, Judgement, rank_images
from runkey.plots.canvas import (
    BLANK,
    RIGHT,
    WRONG,
    Canvas,
    class_colour,
    class_marks,
    class_name,
    draw_marks,
    drawable,
    judged_predictions,
    judged_truth,
    shorten,
    text_width,
)

WIDTH = 1100
MARGIN = 16
GAP = 8
ROW_HEIGHT = 190
MOST_ROWS = 4
MOST_IMAGES = 24


def contact_sheet(
    records: list[Record], classes: list[ClassName], data_folder: Path, out: Path
) -> Path:
    """Draw images of a split, evenly chosen, with their boxes and class names, as a JPEG.

    Args:
        records: the split.
        classes: all classes.
        data_folder: what `Record.file` is relative to.
        out: the picture; its folder is made.

    Raises:
        DataError: an image is gone since `prepare` checked it.
    """
    rows = _rows(_evenly(records, MOST_IMAGES))
    shown = sum(len(row) for row, _ in rows)
    counts = Counter(
        label for r in records for label, crowd in zip(r.labels, r.crowd, strict=True) if not crowd
    )
    title = (
        f"{shown:,} of {len(records):,} images · {counts.total():,} objects · "
        f"{len(classes):,} class{'es' if len(classes) != 1 else ''}"
    )
    legend = _legend_lines(classes, counts)
    head = MARGIN + 26 + 20 * len(legend) + GAP
    height = head + sum(height + GAP for _, height in rows) + MARGIN - GAP
    canvas = Canvas(WIDTH, height)
    canvas.write((MARGIN, MARGIN - 4), title, 16, bold=True)
    for number, line in enumerate(legend):
        for x, colour, text in line:
            y = MARGIN + 24 + 20 * number
            canvas.chip((x, y), colour)
            canvas.write((x + 18, y - 2), text, 12)
    top = head
    for row, row_height in rows:
        left = float(MARGIN)
        for record in row:
            right = left + _aspect(record) * row_height
            frame = (left, top, right, top + row_height)
            place = canvas.paste(_picture(record, data_folder), frame)
            draw_marks(canvas, class_marks(record, classes), place, frame)
            left = right + GAP
        top += row_height + GAP
    return canvas.save(out)


def detection_sheet(
    judged: Judgement,
    classes: list[ClassName],
    data_folder: Path,
    out: Path,
    *,
    best: bool,
    images: int = 8,
) -> Path:
    """Draw the best or the worst images, truth beside prediction, as a JPEG.

    Images are judged by F1 at IoU 0.5 (`runkey.evaluation.per_image`); detections below the score
    at which the F1 of the whole split is largest are not drawn.

    Args:
        judged: the evaluated split.
        classes: all classes.
        data_folder: what `Record.file` is relative to.
        out: the picture; its folder is made.
        best: the best images first, else the worst.
        images: how many.

    Raises:
        DataError: an image is gone since `prepare` checked it.
    """
    chosen = rank_images(judged.images, best=best)[:images]
    tile_width = (WIDTH - 2 * MARGIN - 2 * GAP - 2 * MARGIN) // 4
    aspects = [r.record.width / r.record.height for r in chosen] or [4 / 3]
    tile_height = round(tile_width / min(max(float(np.median(aspects)), 0.7), 2.0))
    block = tile_height + 24 + MARGIN
    head = MARGIN + 26 + 20 + GAP
    canvas = Canvas(WIDTH, head + max(1, -(-len(chosen) // 2)) * block)
    _sheet_head(canvas, judged, best=best, shown=len(chosen))
    for number, score in enumerate(chosen):
        left = MARGIN + (number % 2) * (2 * tile_width + GAP + 2 * MARGIN)
        top = head + (number // 2) * block
        caption = shorten(_caption(score), 2 * tile_width + GAP, 12)
        canvas.write((left, top), caption, 12)
        picture = _picture(score.record, data_folder)
        for x, marks in (
            (left, judged_truth(score, classes)),
            (left + tile_width + GAP, judged_predictions(score, classes)),
        ):
            frame = (x, top + 20, x + tile_width, top + 20 + tile_height)
            draw_marks(canvas, marks, canvas.paste(picture, frame), frame)
    return canvas.save(out)


def _sheet_head(canvas: Canvas, judged: Judgement, *, best: bool, shown: int) -> None:
    scores = judged.images
    title = f"The {shown} {'best' if best else 'worst'} of {len(scores):,} images"
    end = canvas.write((MARGIN, MARGIN - 4), title, 16, bold=True)
    canvas.write((end + 10, MARGIN - 2), "truth left, prediction right", 13)
    right = sum(s.right for s in scores)
    total = 2 * right + sum(s.false + s.missed for s in scores)
    x, y = float(MARGIN), MARGIN + 24
    for colour, text in ((RIGHT, "found, right"), (WRONG, "missed, false")):
        canvas.chip((x, y), colour)
        x = canvas.write((x + 18, y - 2), text, 12) + 18
    canvas.write(
        (x, y - 2),
        f"shown: score {judged.threshold:.2f} and above, where F1 of all images is largest "
        f"({2 * right / total if total else 1:.2f}); a match is the class and IoU 0.5",
        12,
    )


def _caption(score: ImageScore) -> str:
    name = drawable(Path(score.record.file).name, f"image {score.record.id}")
    return (
        f"F1 {score.f1:.2f} · {score.right} of {score.objects} found · {score.false} false · {name}"
    )


def _legend_lines(
    classes: list[ClassName], counts: Counter[int]
) -> list[list[tuple[float, str, str]]]:
    """At most two lines of (x, colour, text); what does not fit is counted at the end."""
    lines: list[list[tuple[float, str, str]]] = [[]]
    x = float(MARGIN)
    for number, c in enumerate(classes):
        text = f"{shorten(class_name(c), 160, 12)} {counts[c.index]:,}"
        width = 18 + text_width(text, 12) + 18
        full = x + width > WIDTH - MARGIN - (120 if len(lines) == 2 else 0)
        if full and len(lines) == 2:
            lines[-1].append((x, BLANK, f"and {len(classes) - number} more"))
            break
        if full:
            lines.append([])
            x = float(MARGIN)
        lines[-1].append((x, class_colour(c.index), text))
        x += width
    return lines


def _rows(records: list[Record]) -> list[tuple[list[Record], int]]:
    """Break images into full rows of one height each; the last row may stay short."""
    rows: list[tuple[list[Record], int]] = []
    row: list[Record] = []
    for record in records:
        row.append(record)
        room = WIDTH - 2 * MARGIN - GAP * (len(row) - 1)
        height = room / sum(_aspect(r) for r in row)
        if height <= ROW_HEIGHT:
            rows.append((row, int(height)))
            row = []
            if len(rows) == MOST_ROWS:
                return rows
    if row:
        rows.append((row, ROW_HEIGHT))
    return rows


def _aspect(record: Record) -> float:
    """Width to height of an image's frame; very long images get a frame that is less so."""
    return min(max(record.width / record.height, 0.4), 3.0)


def _evenly(records: list[Record], most: int) -> list[Record]:
    count = min(most, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def _picture(record: Record, data_folder: Path) -> Image.Image:
    pixels = decode_rgb(data_folder / record.file, record.rotate, record.mirror)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
