"""Sheets of images with boxes: of a data set, of training, and ground truth beside detections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from runkey.data.decode import decode_pixels
from runkey.data.index import ClassName, ImageRecord, Index
from runkey.evaluation.per_image import ImageScore, Judgement, rank_images
from runkey.inference.draw import (
    GAP,
    LINE,
    MARGIN,
    SHEET_IMAGES,
    WIDTH,
    LabelledBox,
    Sheet,
    SheetImage,
    class_colour,
    draw_rows,
    label_fewer,
    printable,
    shorten,
)
from runkey.plots.style import BLUE, GREY, VERMILLION
from runkey.units import counted

if TYPE_CHECKING:
    from runkey.data.dataset import Batch

RIGHT, WRONG = BLUE, VERMILLION


def contact_sheet(
    records: Sequence[ImageRecord], classes: list[ClassName], data_folder: Path, path: Path
) -> Path:
    """Draw images of a split, evenly chosen, with their ground truth, as a JPEG.

    `ImageRecord.file` is relative to `data_folder`.
    """
    count = min(SHEET_IMAGES, len(records))
    chosen = [records[i * len(records) // count] for i in range(count)]
    index = Index.of(records)
    objects = Counter(index.labels[~index.crowd].tolist())
    title = f" · {counted(f'{objects.total():,}', 'object')}"
    title += f" · {counted(f'{len(classes):,}', 'class')}"
    images = [
        SheetImage(
            (record.width, record.height),
            partial(_load, record, data_folder),
            class_boxes(record, classes),
        )
        for record in chosen
    ]
    named = [(one.index, class_name(one)) for one in classes]
    return draw_rows(path, len(records), title, named, objects, images)


def training_sheet(
    batches: Iterable[Batch], classes: list[ClassName], path: Path, *, total: int, epoch: int
) -> Path:
    """Draw augmented training images with their boxes, as the model sees them, as a JPEG.

    Args:
        batches: of the training loader; no more are read than the sheet holds.
        classes: of the data set.
        path: of the file.
        total: number of training images.
        epoch: that the batches are of, from 1; for the title.
    """
    images: list[SheetImage] = []
    objects: Counter[int] = Counter()
    for batch in batches:
        images += _augmented(batch, classes, objects)
        if len(images) >= SHEET_IMAGES:
            break
    named = [(one.index, class_name(one)) for one in classes]
    title = f" in training, epoch {epoch}"
    return draw_rows(path, total, title, named, objects, images[:SHEET_IMAGES])


def _augmented(
    batch: Batch, classes: list[ClassName], objects: Counter[int]
) -> Iterator[SheetImage]:
    """The images of a batch with colours and boxes of training; count their objects."""
    import torch

    from runkey.data.dataset import colour_constants, normalise

    mean, std = colour_constants(torch.device("cpu"))
    pixels = (normalise(batch)[0].permute(0, 2, 3, 1) * std + mean).round().clamp(0, 255)
    shown = pixels.to(torch.uint8).numpy()
    ends = np.cumsum(batch.counts)[:-1]
    each = zip(
        shown,
        batch.sizes.tolist(),
        np.split(batch.boxes_cxcywh.numpy(), ends),
        np.split(batch.labels.numpy(), ends),
        strict=True,
    )
    for image, (height, width), boxes_cxcywh, labels in each:
        picture = Image.fromarray(image[:height, :width])
        sides = boxes_cxcywh.astype(np.float64) * ([width, height] * 2)
        boxes = [
            LabelledBox(
                (cx - w / 2, cy - h / 2, w, h), class_colour(label), class_name(classes[label])
            )
            for (cx, cy, w, h), label in zip(sides.tolist(), labels.tolist(), strict=True)
        ]
        objects.update(labels.tolist())
        yield SheetImage(
            (width, height), partial(Image.Image.copy, picture), label_fewer(boxes, None)
        )


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
    width = (WIDTH - 4 * MARGIN - 2 * GAP) // 4
    aspects = [score.record.width / score.record.height for score in chosen] or [4 / 3]
    height = round(width / float(np.clip(np.median(aspects), 0.7, 2.0)))
    block = height + 24 + MARGIN
    head = MARGIN + 26 + LINE + GAP
    sheet = Sheet(head + max(1, -(-len(chosen) // 2)) * block)
    _write_head(sheet, judged, f"The {len(chosen)} {'best' if best else 'worst'}")
    for number, score in enumerate(chosen):
        left = MARGIN + (number % 2) * (2 * width + GAP + 2 * MARGIN)
        top = head + (number // 2) * block
        sheet.write((left, top), shorten(_caption(score), 2 * width + GAP, 12), 12)
        picture = _load(score.record, data_folder)
        sides = (truth_boxes(score, classes), detection_boxes(score, classes))
        for x, boxes in zip((left, left + width + GAP), sides, strict=True):
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
    shown = score.shown
    boxes = [
        LabelledBox((x, y, w, h), RIGHT if right else WRONG, class_name(classes[label]), value)
        for (x, y, w, h), right, label, value in zip(
            shown.boxes_xywh.tolist(),
            shown.right.tolist(),
            shown.labels.tolist(),
            shown.scores.tolist(),
            strict=True,
        )
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


def _write_head(sheet: Sheet, judged: Judgement, title: str) -> None:
    scores = judged.images
    title = f"{title} of {counted(f'{len(scores):,}', 'image')}"
    end = sheet.write((MARGIN, MARGIN - 4), title, 16, bold=True)
    sheet.write((end + 10, MARGIN - 2), "ground truth left, detections right", 13)
    right = sum(score.right for score in scores)
    total = 2 * right + sum(score.false + score.missed for score in scores)
    y = MARGIN + 24
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


def _load(record: ImageRecord, data_folder: Path) -> Image.Image:
    turned = (record.rotate, record.mirror, record.intensity_range)
    return Image.fromarray(decode_pixels(data_folder / record.file, *turned))
