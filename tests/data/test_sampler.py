"""Every image once an epoch, whatever the batch, and the same images whatever the micro-batch."""

from __future__ import annotations

import itertools
import random

import pytest

from runkey.data.augment import build_views
from runkey.data.sampler import WindowSampler, micro_batches
from runkey.data.shapes import is_portrait
from runkey.params import Augment, Data

CROP = Augment(crop_probability=0.5, crop_short_sides=(100, 120), crop_min=60, crop_max=110)


def make_sampler(count, batch, *, grouped=True, augment=CROP, seed=0):
    rng = random.Random(count)
    sizes = [(rng.randint(100, 200), rng.randint(100, 200)) for _ in range(count)]
    data = Data(short_sides=(80, 120), long_side=160, augment=augment, group_by_aspect=grouped)
    ids = [1000 - 7 * i for i in range(count)]
    return WindowSampler(build_views(data, seed), ids, sizes, batch, grouped)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("count", [1, 3, 8, 37, 64, 101])
@pytest.mark.parametrize("batch", [1, 4, 16, 200])
def test_every_image_once_and_a_fixed_number_of_steps(count, batch, grouped):
    sampler = make_sampler(count, batch, grouped=grouped)
    orders = set()
    for epoch in range(6):
        windows = sampler.windows(epoch)
        assert len(windows) == sampler.steps_per_epoch
        images = [image for window in windows for image, _ in window]
        assert sorted(images) == list(range(count))
        assert sorted(map(len, windows))[1:] == [batch] * (len(windows) - 1)
        orders.add(tuple(images))
    assert len(orders) == 6 or count < 8


def test_only_the_last_two_windows_mix_orientations():
    """Crops change an image's orientation, and it is the crop's that counts."""
    sampler = make_sampler(203, 8)
    for epoch in range(5):
        mixed = [
            len({is_portrait(view.size) for _, view in window}) > 1
            for window in sampler.windows(epoch)
        ]
        assert sum(mixed) <= 2
        for window in sampler.windows(epoch):
            for run in micro_batches(window, 8, grouped=True):
                assert len({is_portrait(view.size) for _, view in run}) == 1


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("micro", [1, 3, 5, 16, 99])
def test_micro_batches_only_cut(micro, grouped):
    for window in make_sampler(100, 16, grouped=grouped).windows(0):
        runs = micro_batches(window, micro, grouped=grouped)
        assert [seen for run in runs for seen in run] == list(window)
        assert all(1 <= len(run) <= micro for run in runs)


def test_windows_come_in_random_order():
    """Orientation must not go with the time in the epoch."""
    sampler = make_sampler(400, 8)
    portrait = [is_portrait(window[0][1].size) for window in sampler.windows(0)]
    changes = sum(a != b for a, b in itertools.pairwise(portrait))
    assert changes > 10


def test_seed_and_epoch_decide():
    first = make_sampler(50, 8).windows(3)
    assert first == make_sampler(50, 8).windows(3)
    assert first != make_sampler(50, 8).windows(4)
    assert first != make_sampler(50, 8, seed=1).windows(3)


@pytest.mark.parametrize("grouped", [True, False])
def test_other_images_come_together_each_epoch(grouped):
    sampler = make_sampler(64, 4, grouped=grouped, augment=Augment())
    windows = [
        {frozenset(image for image, _ in window) for window in sampler.windows(epoch)}
        for epoch in range(2)
    ]
    assert len(windows[0] & windows[1]) <= 1


def test_order_does_not_depend_on_augmentation_when_not_grouped():
    """One thing changed at a time: a run with other augmentation sees the images in one order."""

    def images(augment):
        sampler = make_sampler(50, 8, grouped=False, augment=augment)
        return [{image for image, _ in window} for window in sampler.windows(0)]

    assert images(Augment()) == images(CROP)
