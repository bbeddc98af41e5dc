"""Draw one picture of the sample data: numbered balls on a crop of a photograph.

The picture must come out byte for byte the same on every machine.  So pixels are made with
+, -, *, / and square roots in float64 alone, which IEEE 754 defines to the last bit, and positions,
sizes and angles are whole numbers.  Pillow's 8-bit filters are integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

WIDTH = 256
HEIGHT = 192

Pixels = NDArray[np.float64]
"""[H, W, 3], 0..255."""

_INK = np.array([22.0, 20.0, 26.0])
_CORE = np.array([247.0, 244.0, 236.0])
# Towards the lamp, upper left and in front; a unit vector.
_LIGHT = (-0.48, -0.60, 0.64)
_GLOSS = (-0.51, -0.61, 0.6065)
_CORE_RADIUS = 0.64  # of the ball's radius
_DIGIT_SIDE = 1.16  # of the ball's radius: side of the square that the digit is drawn in
_DIGIT_PIXELS = 96
# A steep ramp in place of a hard threshold: smooth edges.
_INK_OF_GREY = [min(255, max(0, (grey - 106) * 5)) for grey in range(256)]


@dataclass(frozen=True, slots=True)
class Ball:
    """A ball: where it lies, and what is on it."""

    left: int
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
        """The disc's exact extent, pixels."""
        return self.left, self.top, self.diameter, self.diameter


def digit_ink(digit_8x8: NDArray[np.float64], angle_degrees: int, side: int) -> Pixels:
    """The strokes of a handwritten digit as coverage.

    Args:
        digit_8x8: values 0..16.
        angle_degrees: anticlockwise.
        side: pixels of the result.

    Returns:
        [side, side], 0..1.
    """
    # A margin of one cell, so that strokes at the edge are neither cut nor fade there.
    padded = np.pad(np.rint(digit_8x8 * (255 / 16)), 1).astype(np.uint8)
    size = (_DIGIT_PIXELS, _DIGIT_PIXELS)
    image = Image.fromarray(padded).resize(size, Image.Resampling.BICUBIC)
    image = image.filter(ImageFilter.GaussianBlur(_DIGIT_PIXELS // 48))
    image = image.point(_INK_OF_GREY)
    image = image.rotate(angle_degrees, Image.Resampling.BICUBIC)
    image = image.resize((side, side), Image.Resampling.BOX)
    ink: Pixels = np.asarray(image, dtype=np.float64) / 255
    return ink


def draw(
    background: NDArray[np.uint8],
    balls: Sequence[Ball],
    digits_8x8: NDArray[np.float64],
    noise: Pixels,
) -> NDArray[np.uint8]:
    """The finished picture.

    Args:
        background: [HEIGHT, WIDTH, 3].
        balls: in the order they are laid down; later ones cover earlier ones.
        digits_8x8: [*, 8, 8] that `Ball.digit` points into.
        noise: [HEIGHT, WIDTH, 3], added at the end, in grey levels.

    Returns:
        [HEIGHT, WIDTH, 3].
    """
    canvas: Pixels = background.astype(np.float64)
    for ball in balls:
        _shadow(canvas, ball)
        _ball(canvas, ball, digits_8x8[ball.digit])
    return np.rint(np.clip(canvas + noise, 0, 255)).astype(np.uint8)


def coverage(ball: Ball) -> Pixels:
    """How much of each pixel of its box the ball covers: [diameter, diameter], 0..1."""
    x, y = _grid(0, 0, ball.diameter, ball.diameter, ball)
    distance = np.sqrt(x * x + y * y) * (ball.diameter / 2)
    return np.clip(ball.diameter / 2 - distance + 0.5, 0, 1)


def _grid(left: int, top: int, width: int, height: int, ball: Ball) -> tuple[Pixels, Pixels]:
    """Pixel centres of a window (relative to the ball's box), in radii from the ball's centre."""
    radius = ball.diameter / 2
    x: Pixels = (np.arange(left, left + width, dtype=np.float64) + 0.5 - radius) / radius
    y: Pixels = (np.arange(top, top + height, dtype=np.float64) + 0.5 - radius) / radius
    return x[None, :], y[:, None]


def _shadow(canvas: Pixels, ball: Ball) -> None:
    """Darken what lies to the lower right of the ball, softly."""
    reach = ball.diameter // 2 + 1
    left, top = max(0, ball.left - reach), max(0, ball.top - reach)
    right = min(WIDTH, ball.left + ball.diameter + reach)
    bottom = min(HEIGHT, ball.top + ball.diameter + reach)
    x, y = _grid(left - ball.left, top - ball.top, right - left, bottom - top, ball)
    # An ellipse around the point where the light's ray through the centre meets the ground.
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
    shade = _mix_scalar(0.42 + 0.68 * lit, 0.74 + 0.32 * lit, core)
    shaded = surface * shade[:, :, None]

    # A small bright spot on the coloured rim, where it shows; power 64 by squaring.
    gloss = np.clip(_GLOSS[0] * x + _GLOSS[1] * y + _GLOSS[2] * height, 0, 1)
    for _ in range(6):
        gloss = gloss * gloss
    shaded = _mix(shaded, np.array([255.0, 255.0, 255.0]), 0.85 * gloss * (1 - ink))

    window = canvas[ball.top : ball.top + diameter, ball.left : ball.left + diameter]
    window[:] = _mix(window, shaded, coverage(ball))


def _mix(below: Pixels, above: Pixels, part: Pixels) -> Pixels:
    """`above` over `below` with coverage `part` [H, W]."""
    mixed: Pixels = below + (above - below) * part[:, :, None]
    return mixed


def _mix_scalar(below: Pixels, above: Pixels, part: Pixels) -> Pixels:
    return below + (above - below) * part
