"""Make the sample data: handwritten digits on billiard balls on photographs, in COCO format.

    runkey sample-data [FOLDER]

Every image has its own random generator, keyed by (seed, split, index), so the data set comes out
the same, byte for byte, under the locked versions. Test came later: it takes the digits that no
picture of train or val shows, and parts of another photograph.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from runkey.data.index import SplitName
from runkey.errors import DataError

WIDTH = 256
HEIGHT = 192
SEED = 2026
COUNTS: dict[SplitName, int] = {"train": 400, "val": 100, "test": 100}
_STREAMS: dict[SplitName, int] = {"train": 0, "val": 1, "test": 3}
"""In the keys of the random generators."""
_SOURCES_STREAM = 2
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
# As in pool; number 8 is not quite black, so that its shading is visible.
COLOURS = (
    (236, 190, 36),
    (38, 74, 178),
    (206, 40, 40),
    (112, 50, 140),
    (236, 120, 32),
    (24, 124, 70),
    (126, 32, 42),
    (44, 44, 50),
)
SMALLEST, LARGEST = 14, 120
MOST_BALLS = 8
MOST_OVERLAP = 0.35
_TRAIN_DIGITS = 0.8
_TRAIN_WIDTH = 0.65
# Left, top, right, bottom of the portrait's parts: flag, backdrop, two of the uniform; no face.
_TEST_PARTS = ((0, 0, 150, 600), (375, 0, 512, 320), (0, 400, 210, 600), (300, 400, 512, 600))
_JPEG_QUALITY = 72
_MOST_NOISE = 0.8  # grey levels, standard deviation

Pixels = NDArray[np.float64]
"""[H, W, 3], 0..255."""

_INK = np.array([22.0, 20.0, 26.0])
_CORE = np.array([247.0, 244.0, 236.0])
# Direction of the lamp, upper left and in front; a unit vector.
_LIGHT = (-0.48, -0.60, 0.64)
_GLOSS = (-0.51, -0.61, 0.6065)
_CORE_RADIUS = 0.64  # of the ball's radius
_DIGIT_SIDE = 1.16  # of the ball's radius: side of the square that the digit is drawn in
_DIGIT_PIXELS = 96
# A steep ramp instead of a threshold gives smooth edges.
_INK_OF_GREY = [min(255, max(0, (grey - 106) * 5)) for grey in range(256)]


@dataclass(frozen=True, slots=True)
class Ball:
    """A ball: its position, colour and digit."""

    left: int
    """Pixels."""
    top: int
    diameter: int
    number: int
    """1..8."""
    colour: tuple[float, float, float]
    """RGB, 0..255."""
    digit: int
    """Row of the digit in scikit-learn's data."""
    angle_degrees: int

    @property
    def box_xywh(self) -> tuple[int, int, int, int]:
        """Return the disc's exact extent, pixels."""
        return self.left, self.top, self.diameter, self.diameter


def digit_ink(digit_8x8: NDArray[np.float64], angle_degrees: int, side: int) -> Pixels:
    """Draw the strokes of a handwritten digit (0..16), turned anticlockwise.

    Returns:
        Coverage [side, side], 0..1.
    """
    # A margin of one cell, so that strokes at the edge are not cut off.
    padded = np.pad(np.rint(digit_8x8 * (255 / 16)), 1).astype(np.uint8)
    size = (_DIGIT_PIXELS, _DIGIT_PIXELS)
    image = Image.fromarray(padded).resize(size, Image.Resampling.BICUBIC)
    image = image.filter(ImageFilter.GaussianBlur(_DIGIT_PIXELS // 48))
    image = image.point(_INK_OF_GREY)
    image = image.rotate(angle_degrees, Image.Resampling.BICUBIC)
    image = image.resize((side, side), Image.Resampling.BOX)
    ink: Pixels = np.asarray(image, dtype=np.float64) / 255
    return ink


def draw_picture(
    background: NDArray[np.uint8],
    balls: Sequence[Ball],
    digits_8x8: NDArray[np.float64],
    noise: Pixels,
) -> NDArray[np.uint8]:
    """Draw a picture [HEIGHT, WIDTH, 3]; later balls cover earlier ones.

    Args:
        background: [HEIGHT, WIDTH, 3].
        balls: what to draw.
        digits_8x8: [*, 8, 8], indexed by `Ball.digit`.
        noise: [HEIGHT, WIDTH, 3], added at the end, grey levels.
    """
    canvas: Pixels = background.astype(np.float64)
    for ball in balls:
        _shadow(canvas, ball)
        _ball(canvas, ball, digits_8x8[ball.digit])
    return np.rint(np.clip(canvas + noise, 0, 255)).astype(np.uint8)


def coverage(ball: Ball) -> Pixels:
    """Return the covered fraction of each pixel of a ball's box: [diameter, diameter], 0..1."""
    x, y = _grid(0, 0, ball.diameter, ball.diameter, ball)
    distance = np.sqrt(x * x + y * y) * (ball.diameter / 2)
    return np.clip(ball.diameter / 2 - distance + 0.5, 0, 1)


def _grid(left: int, top: int, width: int, height: int, ball: Ball) -> tuple[Pixels, Pixels]:
    """Pixel centres of a rectangle in the ball's box, in radii from the ball's centre."""
    radius = ball.diameter / 2
    x: Pixels = (np.arange(left, left + width, dtype=np.float64) + 0.5 - radius) / radius
    y: Pixels = (np.arange(top, top + height, dtype=np.float64) + 0.5 - radius) / radius
    return x[None, :], y[:, None]


def _shadow(canvas: Pixels, ball: Ball) -> None:
    """Darken the area to the lower right of a ball."""
    reach = ball.diameter // 2 + 1
    left, top = max(0, ball.left - reach), max(0, ball.top - reach)
    right = min(WIDTH, ball.left + ball.diameter + reach)
    bottom = min(HEIGHT, ball.top + ball.diameter + reach)
    x, y = _grid(left - ball.left, top - ball.top, right - left, bottom - top, ball)
    # An ellipse around the point where the ray of light through the centre meets the ground.
    u, v = (x - 0.30) / 1.22, (y - 0.40) / 1.10
    fade = np.clip(1 - (u * u + v * v), 0, 1)
    fade = fade * fade * (3 - 2 * fade)
    canvas[top:bottom, left:right] *= (1 - 0.62 * fade)[:, :, None]


def _ball(canvas: Pixels, ball: Ball, digit_8x8: NDArray[np.float64]) -> None:
    """A shaded sphere with a light core, a digit in it and a highlight."""
    diameter, radius = ball.diameter, ball.diameter / 2
    x, y = _grid(0, 0, diameter, diameter, ball)
    squared = x * x + y * y
    height = np.sqrt(np.clip(1 - squared, 0, 1))
    lit = np.clip(_LIGHT[0] * x + _LIGHT[1] * y + _LIGHT[2] * height, 0, 1)

    core = np.clip((_CORE_RADIUS - np.sqrt(squared)) * radius + 0.5, 0, 1)
    side = max(1, round(_DIGIT_SIDE * radius))
    ink = np.zeros((diameter, diameter))
    start = (diameter - side) // 2
    ink[start : start + side, start : start + side] = digit_ink(digit_8x8, ball.angle_degrees, side)

    surface = _mix(np.broadcast_to(np.array(ball.colour), (*core.shape, 3)), _CORE, core)
    surface = _mix(surface, _INK, ink * core)
    # The core is lit more evenly than the coloured rim, so that the number stays legible.
    rim, inner = 0.42 + 0.68 * lit, 0.74 + 0.32 * lit
    shaded = surface * (rim + (inner - rim) * core)[:, :, None]

    # A small bright spot on the coloured rim; power 64 by squaring.
    gloss = np.clip(_GLOSS[0] * x + _GLOSS[1] * y + _GLOSS[2] * height, 0, 1)
    for _ in range(6):
        gloss = gloss * gloss
    shaded = _mix(shaded, np.array([255.0, 255.0, 255.0]), 0.85 * gloss * (1 - ink))

    below = canvas[ball.top : ball.top + diameter, ball.left : ball.left + diameter]
    below[:] = _mix(below, shaded, coverage(ball))


def _mix(below: Pixels, above: Pixels, part: Pixels) -> Pixels:
    """`above` over `below` with coverage `part` [H, W]."""
    mixed: Pixels = below + (above - below) * part[:, :, None]
    return mixed


_DIGITS_CREDIT = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning "
    "Repository, 1998; CC BY 4.0"
)
_PHOTO_CREDIT: dict[SplitName, str] = {
    **dict.fromkeys(("train", "val"), "photographs by danielbuechele and vultilion"),
    "test": "photograph by James S. Davis, United States Navy",
}
_LICENSE = {
    "id": 1,
    "name": "CC BY 2.0 (photographs), CC BY 4.0 (digits); see LICENSE.txt",
    "url": "https://creativecommons.org/licenses/by/2.0/",
}
_LICENSE_TEXT = """\
Numbered balls: sample data of runkey
=====================================

600 pictures of 256 x 192 pixels (400 train, 100 val, 100 test) in COCO format, made by
sample-data/make_sample.py from what comes with scikit-learn and matplotlib.  They may be used,
changed and given away, if this text goes with them.

Digits
  Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning
  Repository, 1998, https://archive.ics.uci.edu/ml/datasets/Optical+Recognition+of+Handwritten+Digits
  Licence: CC BY 4.0, https://creativecommons.org/licenses/by/4.0/
  Changed: enlarged, smoothed, turned, drawn in ink on a ball.

Photographs (scikit-learn's load_sample_images; authors as its README names them)
  china.jpg   by danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/
  flower.jpg  by vultilion, https://www.flickr.com/photos/vultilion/6056698931/
              (scikit-learn's README credits danielbuechele for this one too)
  Licence: CC BY 2.0, https://creativecommons.org/licenses/by/2.0/
  Changed: cropped, mirrored, darkened or lightened, balls laid upon them.

Photograph of test (matplotlib's sample data)
  grace_hopper.jpg  portrait of Commodore Grace M. Hopper by James S. Davis, 1984, a work of the
                    United States Navy and so in the public domain
  Changed: only flag, backdrop and uniform used; cropped, mirrored, darkened or lightened, balls
  laid upon it.

Drawing (balls, shadows, layout) and annotations
  By the authors of runkey; CC BY 4.0.
"""


@dataclass(frozen=True, slots=True)
class SampleSources:
    """Digits and photographs, divided between the splits."""

    photos: dict[SplitName, list[NDArray[np.uint8]]]
    """[H, W, 3]: of scikit-learn's photographs the left part of each for train, the right part for
    val; for test parts of matplotlib's portrait."""
    digits_8x8: NDArray[np.float64]
    rows: dict[SplitName, list[NDArray[np.int64]]]
    """By split and number: rows of `digits_8x8`."""


def make_sample(out: Path) -> dict[SplitName, tuple[int, int]]:
    """Write the data set: annotations/, train/, val/, test/ and LICENSE.txt.

    Args:
        out: the folder; files of an earlier call are replaced.

    Returns:
        Numbers of images and balls in each split.

    Raises:
        DataError: `out` holds something that this function does not write.
    """
    known = {"annotations", *COUNTS, "LICENSE.txt"}
    strange = sorted(p.name for p in out.iterdir() if p.name not in known) if out.is_dir() else []
    if strange:
        raise DataError(f"{out}: holds {strange[0]}, no sample data; name a new or an empty folder")
    for name in ("annotations", *COUNTS):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    (out / "LICENSE.txt").write_text(_LICENSE_TEXT, encoding="utf-8", newline="\n")
    sources = load_sources()
    made: dict[SplitName, tuple[int, int]] = {}
    for split, count in COUNTS.items():
        laid: dict[int, list[Ball]] = {}
        for index in range(count):
            number = _image_id(split, index)
            pixels, laid[number] = make_picture(sources, split, index)
            Image.fromarray(pixels).save(
                out / split / _file_name(number), "JPEG", quality=_JPEG_QUALITY, optimize=True
            )
        annotations = json.dumps(_coco(split, laid), separators=(",", ":")) + "\n"
        path = out / "annotations" / f"instances_{split}.json"
        path.write_text(annotations, encoding="utf-8", newline="\n")
        made[split] = (count, sum(map(len, laid.values())))
    return made


def make_picture(
    sources: SampleSources, split: SplitName, index: int
) -> tuple[NDArray[np.uint8], list[Ball]]:
    """Draw image `index` of a split; it does not depend on other images."""
    crop, balls, rng = layout(sources, split, index)
    background = _background(sources.photos[split], crop)
    sigma = float(rng.uniform(0, _MOST_NOISE))
    noise = rng.standard_normal((HEIGHT, WIDTH, 3)) * sigma
    return draw_picture(background, balls, sources.digits_8x8, noise), balls


def load_sources() -> SampleSources:
    """Load digits and photographs, and divide them between the splits."""
    # Imported here because it takes a second.
    from matplotlib import get_data_path
    from sklearn.datasets import load_digits, load_sample_images

    with warnings.catch_warnings():
        # scikit-learn 1.8 sets an array's shape in place, which NumPy 2.5 deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        digits, target = load_digits(return_X_y=True)
        photos = load_sample_images().images
    portrait = Image.open(Path(get_data_path()) / "sample_data/grace_hopper.jpg")
    rng = np.random.default_rng([SEED, _SOURCES_STREAM])
    of_number = [rng.permutation(np.flatnonzero(target == n + 1)) for n in range(len(NUMBERS))]
    rows = [np.split(found, [round(len(found) * _TRAIN_DIGITS)]) for found in of_number]
    parts = [np.split(photo, [round(photo.shape[1] * _TRAIN_WIDTH)], axis=1) for photo in photos]
    first: tuple[SplitName, ...] = ("train", "val")
    sources = SampleSources(
        photos={split: [part[i] for part in parts] for i, split in enumerate(first)},
        digits_8x8=np.asarray(digits, dtype=np.float64).reshape(-1, 8, 8),
        rows={split: [part[i] for part in rows] for i, split in enumerate(first)},
    )
    shown = [row for split in first for row in _shown_digits(sources, split)]
    sources.photos["test"] = [np.asarray(portrait.crop(box)) for box in _TEST_PARTS]
    sources.rows["test"] = [np.setdiff1d(found, shown) for found in of_number]
    return sources


def _shown_digits(sources: SampleSources, split: SplitName) -> list[int]:
    """Return the digits, as rows, on the balls of all pictures of a split."""
    laid = (layout(sources, split, index)[1] for index in range(COUNTS[split]))
    return [ball.digit for balls in laid for ball in balls]


def layout(
    sources: SampleSources, split: SplitName, index: int
) -> tuple[Crop, list[Ball], np.random.Generator]:
    """Choose background and balls of a picture; return its generator for the rest, too."""
    rng = np.random.default_rng([SEED, _STREAMS[split], index])
    crop = _choose_crop(sources.photos[split], rng)
    balls: list[Ball] = []
    for _ in range(int(rng.integers(1, MOST_BALLS + 1))):
        ball = _place(balls, sources.rows[split], rng)
        if ball is not None:
            balls.append(ball)
    return crop, balls, rng


@dataclass(frozen=True, slots=True)
class Crop:
    """What a picture shows of a photograph."""

    photo: int
    """Index."""
    left: int
    """Pixels."""
    top: int
    width: int
    height: int
    is_mirrored: bool
    brightness: float
    """Factor."""


def _choose_crop(photos: list[NDArray[np.uint8]], rng: np.random.Generator) -> Crop:
    """Choose a random crop, perhaps mirrored, darker or lighter."""
    number = int(rng.integers(len(photos)))
    photo = photos[number]
    height, width = photo.shape[:2]
    largest = min(width, height * WIDTH // HEIGHT)
    crop_width = int(rng.integers(min(180, largest), largest + 1))
    crop_height = crop_width * HEIGHT // WIDTH
    left = int(rng.integers(width - crop_width + 1))
    top = int(rng.integers(height - crop_height + 1))
    is_mirrored = rng.random() < 0.5
    brightness = rng.uniform(0.55, 1.1)
    return Crop(number, left, top, crop_width, crop_height, is_mirrored, brightness)


def _background(photos: list[NDArray[np.uint8]], crop: Crop) -> NDArray[np.uint8]:
    """Cut a crop out of its photograph: [HEIGHT, WIDTH, 3]."""
    rows, columns = (
        slice(crop.top, crop.top + crop.height),
        slice(crop.left, crop.left + crop.width),
    )
    image = Image.fromarray(photos[crop.photo][rows, columns])
    pixels = np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float64)
    if crop.is_mirrored:
        pixels = pixels[:, ::-1]
    return np.rint(np.clip(pixels * crop.brightness, 0, 255)).astype(np.uint8)


def _place(
    balls: list[Ball], rows: list[NDArray[np.int64]], rng: np.random.Generator
) -> Ball | None:
    """One more ball that overlaps others little; None after 40 attempts."""
    for _ in range(40):
        diameter = round(math.exp(rng.uniform(math.log(SMALLEST), math.log(LARGEST))))
        left = int(rng.integers(WIDTH - diameter + 1))
        top = int(rng.integers(HEIGHT - diameter + 1))
        if any(_overlap(left, top, diameter, other) > MOST_OVERLAP for other in balls):
            continue
        number = int(rng.integers(1, len(NUMBERS) + 1))
        brightness = rng.uniform(0.75, 1.15)
        tint = rng.integers(-22, 23, size=3)
        red, green, blue = (
            float(min(255, max(0, channel * brightness + shift)))
            for channel, shift in zip(COLOURS[number - 1], tint, strict=True)
        )
        digit = int(rng.choice(rows[number - 1]))
        angle = int(rng.integers(-20, 21))
        return Ball(left, top, diameter, number, (red, green, blue), digit, angle)
    return None


def _overlap(left: int, top: int, diameter: int, other: Ball) -> float:
    """Shared area of two boxes, as a fraction of the smaller one."""
    width = min(left + diameter, other.left + other.diameter) - max(left, other.left)
    height = min(top + diameter, other.top + other.diameter) - max(top, other.top)
    smaller: int = min(diameter, other.diameter) ** 2
    return max(0, width) * max(0, height) / smaller


def _image_id(split: SplitName, index: int) -> int:
    """1..400 in train, 1001..1100 in val, 2001..2100 in test."""
    return 1 + index + 1000 * list(COUNTS).index(split)


def _file_name(image_id: int) -> str:
    return f"{image_id:06d}.jpg"


def _coco(split: SplitName, laid: dict[int, list[Ball]]) -> dict[str, Any]:
    """The annotation file of a split, from the balls by image id."""
    size = {"width": WIDTH, "height": HEIGHT, "license": 1}
    return {
        "info": {
            "description": f"Numbered balls, {split} split: sample data of runkey",
            "version": "1",
            "year": 2026,
            "contributor": f"{_DIGITS_CREDIT}; {_PHOTO_CREDIT[split]}",
        },
        "licenses": [_LICENSE],
        "images": [{"id": number, "file_name": _file_name(number), **size} for number in laid],
        "annotations": [
            {
                "id": 100 * number + position,
                "image_id": number,
                "category_id": ball.number,
                "bbox": list(ball.box_xywh),
                "area": ball.diameter**2,
                "iscrowd": 0,
            }
            for number, balls in laid.items()
            for position, ball in enumerate(balls)
        ],
        "categories": [
            {"id": number, "name": name, "supercategory": "ball"}
            for number, name in enumerate(NUMBERS, start=1)
        ],
    }
