"""What is drawn on an image: each box with its colour and its words."""

from __future__ import annotations

from dataclasses import dataclass, replace

from runkey.data.index import ClassName, Record
from runkey.evaluation.per_image import ImageScore
from runkey.plots.canvas import Box, Canvas, box_area
from runkey.plots.fonts import drawable
from runkey.plots.style import BLACK, BLUE, CYCLE, GREY, VERMILLION

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
