"""The distributions that training drawn are drawn from."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy import stats

from runkey.data.augment import WHOLE, Augmentation
from runkey.params import Augment, Data

DRAWS = 8000


def augmentation(
    augment: Augment, short_sides: tuple[int, ...] = (120,), long_side: int = 160
) -> Augmentation:
    return Augmentation(0, Data(short_sides=short_sides, long_side=long_side, augment=augment))


def reference_crop(
    rng: random.Random, height: int, width: int, augment: Augment, short_sides: tuple[int, ...]
) -> tuple[float, ...]:
    """The reference's three steps, one after the other; `randint` includes both ends."""
    size = rng.choice(augment.crop_short_sides)
    if height < width:
        height, width = size, int(size * width / height)
    else:
        height, width = int(size * height / width), size
    w = rng.randint(augment.crop_min, min(width, augment.crop_max))
    h = rng.randint(augment.crop_min, min(height, augment.crop_max))
    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
    short = rng.choice(short_sides)
    if max(h, w) / min(h, w) * short > 1333:
        short = round(1333 * min(h, w) / max(h, w))
    out = (short, int(short * w / h)) if h <= w else (int(short * h / w), short)
    return (left / width, top / height, w / width, h / height, *out)


@pytest.mark.parametrize("size", [(480, 640), (640, 427)])
def test_random_crop_has_the_references_distribution(size):
    augment, short_sides = Augment(crop_probability=1), (480, 576, 800)
    rng = random.Random(1)
    want = np.array([reference_crop(rng, *size, augment, short_sides) for _ in range(DRAWS)])
    drawn = augmentation(augment, short_sides, 1333).draw(0, range(DRAWS), [size] * DRAWS)
    regions = [one.region for one in drawn]
    got = np.array(
        [(r.left, r.top, r.width, r.height, *v.size) for r, v in zip(regions, drawn, strict=True)]
    )
    for name, a, b in zip(("left", "top", "w", "h", "H", "W"), want.T, got.T, strict=True):
        assert stats.ks_2samp(a, b).pvalue > 1e-3, name
    assert np.abs(np.corrcoef(want.T) - np.corrcoef(got.T)).max() < 0.06


def test_random_crop_keeps_a_small_image_whole():
    augment = Augment(crop_probability=1, crop_short_sides=(100,))
    one = augmentation(augment, (100,), 400).draw(0, [1], [(50, 80)])[0]
    assert (one.region.left, one.region.top) == (0, 0)
    assert (one.region.width, one.region.height) == (1, 1)


def test_zoom_is_about_the_image_and_keeps_the_output_size():
    augment = Augment(zoom=0.25, aspect=0.1, shift=0.1)
    drawn = augmentation(augment).draw(0, range(DRAWS), [(192, 256)] * DRAWS)
    assert {one.size for one in drawn} == {(120, 160)}
    regions = np.array(
        [(v.region.left, v.region.top, v.region.width, v.region.height) for v in drawn]
    )
    zoom = -np.log(regions[:, 2] * regions[:, 3]) / 2
    aspect = -np.log(regions[:, 2] / regions[:, 3])
    shifts = regions[:, :2] + regions[:, 2:] / 2 - 0.5
    for values, bound in ((zoom, 0.25), (aspect, 0.1), (shifts[:, 0], 0.1), (shifts[:, 1], 0.1)):
        assert stats.kstest(values, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3


def test_flip_short_side_and_crop_have_their_chances():
    augment = Augment(flip_probability=0.3, crop_probability=0.25, zoom=0, aspect=0, shift=0)
    drawn = augmentation(augment, (480, 512, 800), 1333).draw(0, range(DRAWS), [(480, 640)] * DRAWS)
    assert np.mean([v.flip for v in drawn]) == pytest.approx(0.3, abs=0.02)
    shorts = [min(v.size) for v in drawn]
    parts = [shorts.count(short) / DRAWS for short in (480, 512, 800)]
    assert parts == pytest.approx([1 / 3] * 3, abs=0.02)
    assert np.mean([v.region != WHOLE for v in drawn]) == pytest.approx(0.25, abs=0.02)


def test_everything_off_shows_the_whole_image(plain):
    drawn = augmentation(plain)
    one = drawn.draw(0, [5], [(192, 256)])[0]
    assert (one.size, one.flip) == ((120, 160), False)
    region = one.region
    assert (region.left, region.top, region.width, region.height) == (0, 0, 1, 1)
    assert drawn.draw_colour(0, [5]) is None


def test_colour_factors():
    augment = Augment(brightness=0.2, contrast=0.4, saturation=0.1)
    colour = augmentation(augment).draw_colour(0, range(DRAWS))
    for values, bound in zip(colour.T, (0.2, 0.4, 0.1), strict=True):
        assert stats.kstest(values, stats.uniform(1 - bound, 2 * bound).cdf).pvalue > 1e-3
    without = augmentation(Augment(saturation=0)).draw_colour(0, [1, 2])
    assert without.shape == (2, 2)
