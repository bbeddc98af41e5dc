"""Every image once an epoch, whatever the batch, and the same images whatever the micro-batch."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest

from runkey.data.augment import Augmentation
from runkey.data.sampler import GlobalBatchSampler, is_portrait, micro_batches
from runkey.params import Augment, Data

CROP = Augment(crop_probability=0.5, crop_short_sides=(100, 120), crop_min=60, crop_max=110)


def make_sampler(count, batch, *, grouped=True, augment=CROP, seed=0):
    rng = random.Random(count)
    sizes = [(rng.randint(100, 200), rng.randint(100, 200)) for _ in range(count)]
    data = Data(short_sides=(80, 120), long_side=160, augment=augment, group_by_aspect=grouped)
    ids = [1000 - 7 * i for i in range(count)]
    return GlobalBatchSampler(Augmentation(seed, data), ids, sizes, batch)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("count", [1, 3, 8, 37, 64, 101])
@pytest.mark.parametrize("batch", [1, 4, 16, 200])
def test_every_image_once_and_a_fixed_number_of_steps(count, batch, grouped):
    sampler = make_sampler(count, batch, grouped=grouped)
    orders = set()
    for epoch in range(6):
        batches = sampler.global_batches(epoch)
        assert len(batches) == -(-count // batch)
        images = [image for batch in batches for image, _ in batch]
        assert sorted(images) == list(range(count))
        assert sorted(map(len, batches))[1:] == [batch] * (len(batches) - 1)
        orders.add(tuple(images))
    assert len(orders) == 6 or count < 8


def test_only_the_last_two_batches_mix_orientations():
    """Crops change an image's orientation, and it is the crop's that counts."""
    sampler = make_sampler(203, 8)
    for epoch in range(5):
        mixed = [
            len({is_portrait(augment.size) for _, augment in batch}) > 1
            for batch in sampler.global_batches(epoch)
        ]
        assert sum(mixed) <= 2
        for batch in sampler.global_batches(epoch):
            for run in micro_batches(batch, 8, grouped=True):
                assert len({is_portrait(augment.size) for _, augment in run}) == 1


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("micro", [1, 3, 5, 16, 99])
def test_micro_batches_only_cut(micro, grouped):
    for batch in make_sampler(100, 16, grouped=grouped).global_batches(0):
        runs = micro_batches(batch, micro, grouped=grouped)
        assert [image for run in runs for image in run] == list(batch)
        assert all(1 <= len(run) <= micro for run in runs)


def test_batches_come_in_random_order():
    """Orientation must not go with the time in the epoch."""
    sampler = make_sampler(400, 8)
    portrait = [is_portrait(batch[0][1].size) for batch in sampler.global_batches(0)]
    changes = sum(a != b for a, b in itertools.pairwise(portrait))
    assert changes > 10


def test_seed_and_epoch_decide():
    first = list(make_sampler(50, 8).global_batches(3))
    assert first == list(make_sampler(50, 8).global_batches(3))
    assert first != list(make_sampler(50, 8).global_batches(4))
    assert first != list(make_sampler(50, 8, seed=1).global_batches(3))


@pytest.mark.parametrize("grouped", [True, False])
def test_other_images_come_together_each_epoch(grouped):
    sampler = make_sampler(64, 4, grouped=grouped, augment=Augment())
    batches = [
        {frozenset(image for image, _ in batch) for batch in sampler.global_batches(epoch)}
        for epoch in range(2)
    ]
    assert len(batches[0] & batches[1]) <= 1


def test_order_does_not_depend_on_augmentation_when_not_grouped():
    """One thing changed at a time: a run with other augmentation sees the images in one order."""

    def images(augment):
        sampler = make_sampler(50, 8, grouped=False, augment=augment)
        return [{image for image, _ in batch} for batch in sampler.global_batches(0)]

    assert images(Augment()) == images(CROP)


def test_batches_hold_outputs_of_one_short_side():
    """But for what is left of the groups; padding is less than half of what mixed batches have."""

    def padded(grouped):
        rng = random.Random(0)
        sizes = [rng.choice([(192, 256), (256, 192)]) for _ in range(200)]
        data = Data(short_sides=(120, 80, 96), long_side=160, group_by_aspect=grouped)
        sampler = GlobalBatchSampler(Augmentation(0, data), range(200), sizes, 8)
        batches = [
            [augment.size for _, augment in batch]
            for epoch in range(5)
            for batch in sampler.global_batches(epoch)
        ]
        own = sum(h * w for batch in batches for h, w in batch)
        whole = sum(max(h for h, _ in b) * max(w for _, w in b) * len(b) for b in batches)
        return sum(len(set(batch)) > 1 for batch in batches), whole / own - 1

    mixed, waste = padded(True)
    assert mixed <= 5 * 6  # of 125: at most one batch for each of six groups
    mixed_without, waste_without = padded(False)
    assert mixed_without > 120
    assert waste < waste_without / 4


AUGMENTS = {
    "none": Augment(),
    "DETR's crop": Augment(
        crop_probability=0.5, crop_short_sides=(400, 500, 600), crop_min=384, crop_max=600
    ),
    "crop by fractions": Augment(
        crop_probability=0.7, crop_fraction=0.3, zoom_out_probability=0.5, mosaic_probability=0.4
    ),
}


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
@pytest.mark.parametrize(
    ("short", "long"), [((120,), 160), ((800, 480, 512), 1333), ((90, 120), 120)]
)
def test_sizes_are_planned_as_they_are_made(augment, short, long):
    """All sizes of an epoch at once are those of the images one by one, extreme ones too."""
    rng = random.Random(0)
    sizes = [(rng.randint(1, 900), rng.randint(1, 900)) for _ in range(1000)] + [(1, 5000)]
    data = Data(short_sides=short, long_side=long, augment=augment)
    draws = Augmentation(3, data).draw(1, range(len(sizes)), sizes)
    assert draws.sizes.tolist() == [list(one.size) for one in draws]


def test_a_plan_is_made_when_it_is_asked_for():
    """COCO's epoch is planned in a tenth of a second; a batch takes microseconds more."""
    sizes = np.random.default_rng(0).integers(300, 641, (118_287, 2))
    data = Data(short_sides=(480, 800), long_side=1333, augment=AUGMENTS["DETR's crop"])
    sampler = GlobalBatchSampler(Augmentation(0, data), np.arange(len(sizes)), sizes, 64)
    start = time.process_time()
    plan = sampler.global_batches(1)
    assert time.process_time() - start < 0.6
    assert len(plan) == 1849
    assert len(plan[-1]) == 64
    assert plan[5:][0] == plan[5]
