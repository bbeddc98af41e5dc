"""Sizes by the reference's rule; boxes go where the pixels go."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from runkey.data.augment import (
    OUTSIDE_RGB,
    Augmentation,
    AugmentParams,
    Region,
    augment_boxes,
    augment_image,
    resized_size,
)
from runkey.params import Augment, Data


def reference_size(height: int, width: int, size: int, max_size: int) -> tuple[int, int]:
    """The reference's rule, stated anew: its order of operations decides its rounding."""
    small, large = float(min(width, height)), float(max(width, height))
    if large / small * size > max_size:
        size = round(max_size * small / large)
    if width < height:
        return int(size * height / width), size
    return size, int(size * width / height)


@pytest.mark.parametrize(("short", "long"), [(120, 160), (480, 1333), (800, 1333), (608, 1333)])
def test_sizes_are_the_references(short, long):
    rng = random.Random(0)
    bounded = 0
    for _ in range(5000):
        height, width = rng.randint(20, 900), rng.randint(20, 900)
        want = reference_size(height, width, short, long)
        got = resized_size(height, width, short, long)
        if max(want) > long:
            # The reference's rounding oversteps its own bound; ours never does.
            bounded += 1
            want = (min(want[0], long), min(want[1], long))
        assert got == want, (height, width)
    assert bounded < 1000


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (3, 3), (1, 1)])
def test_sizes_of_extreme_images_have_pixels_and_keep_the_bound(size):
    height, width = resized_size(*size, 120, 160)
    assert min(height, width) >= 1
    assert max(height, width) <= 160


AUGMENTS = {
    "zoom": Augment(zoom=0.5, aspect=0.3, shift=0.3, min_visible=0),
    "crop": Augment(
        crop_probability=1, crop_short_sides=(40, 60), crop_min=20, crop_max=50, min_visible=0
    ),
    "flip only": Augment(zoom=0, aspect=0, shift=0, flip_probability=1, min_visible=0),
}


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS.keys())
def test_boxes_follow_pixels_within_a_pixel(augment):
    """A red rectangle on blue: found by its colour after augmentation, it is where its box is."""
    rng = np.random.default_rng(0)
    drawn = Augmentation(0, Data(short_sides=(60, 90), long_side=130, augment=augment))
    seen = flipped = 0
    for id_ in range(400):
        height, width = (int(side) for side in rng.integers(60, 200, 2))
        left, top = int(rng.integers(0, width - 12)), int(rng.integers(0, height - 12))
        right, bottom = int(rng.integers(left + 10, width)), int(rng.integers(top + 10, height))
        image = torch.zeros(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)
        image[2] = 255
        image[:, top:bottom, left:right] = torch.tensor([255, 0, 0])[:, None, None]
        one = drawn.draw(0, [id_], [(height, width)])[0]
        out = augment_image(image, one)
        assert out.dtype == torch.uint8
        assert out.shape == (3, *one.size)
        box = np.array([[left, top, right, bottom]], dtype=np.float64)
        (carried,), (visible,) = augment_boxes(box, (height, width), one)
        red = (out[0].int() - out[2].int()) > 20
        if min(carried[2] - carried[0], carried[3] - carried[1]) < 3:
            continue
        ys, xs = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
        found = [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]
        assert np.abs(carried - found).max() <= 1.0, (id_, one, carried, found)
        assert 0 < visible <= 1
        seen += 1
        flipped += one.flip
    assert seen > 150
    assert flipped > 60


@pytest.mark.parametrize("size", [(31, 47), (300, 200), (101, 256), (100, 150)])
def test_mirroring_before_or_after_resizing_gives_the_same_bits(size):
    """Where the image grows it is mirrored first, as it has fewer pixels then."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (100, 150, 3), dtype=torch.uint8, generator=generator)
    image = image.permute(2, 0, 1)
    for region in (Region(), Region(0.1, 0.3, 0.6, 0.5), Region(-0.4, -0.2, 1.7, 1.3)):
        plain = augment_image(image, AugmentParams(size, region))
        padded = torch.zeros(size[0] + 3, size[1] + 5, 3, dtype=torch.uint8).permute(2, 0, 1)
        out = padded[:, : size[0], : size[1]]
        augment_image(image, AugmentParams(size, region, flip=True), out)
        assert torch.equal(out.flip(-1), plain)
        assert int(padded.sum()) == int(plain.sum())


def test_outside_is_mean_grey_and_the_rest_is_the_image():
    image = torch.full((40, 60, 3), 200, dtype=torch.uint8).permute(2, 0, 1)
    out = augment_image(image, AugmentParams((60, 120), Region(-0.5, -0.25, 2.0, 1.5)))
    inside = torch.zeros(60, 120, dtype=torch.bool)
    inside[10:50, 30:90] = True
    assert (out[:, inside] == 200).all()
    assert (out[:, ~inside] == torch.tensor(OUTSIDE_RGB)[:, None]).all()


@pytest.mark.parametrize("left", [-3.0, -1.0, 1.0, 3.0])
def test_a_region_that_misses_the_image_still_gives_a_picture(left):
    image = torch.full((40, 60, 3), 200, dtype=torch.uint8).permute(2, 0, 1)
    out = augment_image(image, AugmentParams((40, 60), Region(left, 0, 0.5, 1)))
    assert out.shape == (3, 40, 60)


def test_the_whole_image_is_not_resampled():
    image = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).permute(2, 0, 1)
    assert torch.equal(augment_image(image, AugmentParams((40, 60))), image)


def test_resampling_is_antialiased():
    stripes = torch.zeros(40, 400, 3, dtype=torch.uint8).permute(2, 0, 1)
    stripes[:, :, ::4] = 255
    small = augment_image(stripes, AugmentParams((4, 40)))
    assert small.float().std() < 10


def test_visible_part_of_a_box():
    lower_right = AugmentParams((50, 50), Region(0.5, 0.5, 0.5, 0.5))
    boxes = np.array([[40.0, 60, 60, 80], [0, 0, 50, 50], [45, 45, 65, 65], [60, 60, 70, 70]])
    carried, visible = augment_boxes(boxes, (100, 100), lower_right)
    assert np.allclose(visible, [0.5, 0.0, 0.5625, 1.0])
    assert np.allclose(carried[0], [0, 10, 10, 30])
    mirrored, _ = augment_boxes(boxes, (100, 100), replace(lower_right, flip=True))
    assert np.allclose(mirrored[0], [40, 10, 50, 30])
