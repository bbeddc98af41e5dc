"""The census against what the sampler really deals."""

from __future__ import annotations

import pytest

from runkey.data.augment import Augmentation, evaluation_size
from runkey.data.sampler import (
    GlobalBatchSampler,
    is_portrait,
    micro_batches,
    most_objects,
    padded_shapes,
    reachable_shapes,
    worst_batch_shape,
)
from runkey.params import Augment, Data

SIZES = [(48, 64), (64, 48), (50, 50), (30, 70), (33, 64)]
CROP = Augment(crop_probability=0.5, crop_short_sides=(12, 14), crop_min=8, crop_max=12)


def dealt_shapes(data, records, epochs, batch, micro):
    """Shapes of single images, and padded shapes of micro-batches, over some epochs."""
    ids, sizes = [r.id for r in records], [(r.height, r.width) for r in records]
    sampler = GlobalBatchSampler(Augmentation(0, data), ids, sizes, batch)
    single, padded = set(), set()
    for epoch in range(epochs):
        for images in sampler.global_batches(epoch):
            for run in micro_batches(images, micro, grouped=data.group_by_aspect):
                shapes = [augment.size for _, augment in run]
                single.update(shapes)
                padded.add((max(h for h, _ in shapes), max(w for _, w in shapes)))
    return single, padded


FRACTION = Augment(crop_probability=0.5, crop_fraction=0.5, mosaic_probability=0.2)
MIXED = Augment(zoom_out_probability=0.5, mosaic_probability=0.5)


@pytest.mark.parametrize(
    "augment", [Augment(), CROP, FRACTION, MIXED], ids=["zoom", "crop", "fraction", "mosaic"]
)
@pytest.mark.parametrize("grouped", [True, False])
def test_census_is_what_is_dealt_no_less_and_no_more(make_record, augment, grouped):
    data = Data(short_sides=(10, 16), long_side=24, augment=augment, group_by_aspect=grouped)
    records = [make_record(i, size) for i, size in enumerate(SIZES * 6)]
    census = reachable_shapes(data, records)
    single, padded = dealt_shapes(data, records, 150, 6, 6)
    assert single == census
    worst = worst_batch_shape(census, 6, grouped=grouped)
    assert all(
        h <= worst[0] and w <= worst[1]
        for h, w in padded
        if is_portrait((h, w)) is is_portrait(worst)
    )
    assert max(h * w for h, w in padded) == worst[0] * worst[1]
    assert padded <= padded_shapes(census, 6, grouped=grouped)
    assert padded_shapes(census, 1, grouped=grouped) == census


@pytest.mark.parametrize("grouped", [True, False])
def test_padded_shapes_are_those_of_all_pairs(make_record, grouped):
    data = Data(short_sides=(10, 16), long_side=24, augment=CROP, group_by_aspect=grouped)
    records = [make_record(i, size) for i, size in enumerate(SIZES * 6)]
    census = reachable_shapes(data, records)
    pairs = {
        (max(a[0], b[0]), max(a[1], b[1]))
        for a in census
        for b in census
        if not grouped or is_portrait(a) is is_portrait(b)
    }
    assert padded_shapes(census, 2, grouped=grouped) == pairs


def test_grouping_halves_the_worst_shape(make_record):
    data = Data(short_sides=(480, 800), long_side=1333)
    shapes = reachable_shapes(data, [make_record(0, (480, 800)), make_record(1, (800, 480))])
    assert worst_batch_shape(shapes, 2, grouped=True) in {(800, 1333), (1333, 800)}
    assert worst_batch_shape(shapes, 2, grouped=False) == (1333, 1333)
    assert worst_batch_shape(shapes, 1, grouped=False) in {(800, 1333), (1333, 800)}


def test_evaluation_uses_the_largest_short_side():
    data = Data(short_sides=(60, 120, 90), long_side=160)
    assert evaluation_size(data, 192, 256) == (120, 160)
    assert evaluation_size(data, 300, 100) == (159, 53)


def test_most_objects(make_record):
    records = [make_record(i, boxes=n) for i, n in enumerate((3, 9, 0, 5))]
    records.append(make_record(9, boxes=4, crowd=(True, True, True, False)))
    assert most_objects(records, 2, 0) == 14
    assert most_objects(records, 2, 6) == 11
    assert most_objects(records, 100, 0) == 18
    assert most_objects(records, 1, 0, mosaic=True) == 18
    assert most_objects(records, 2, 16, mosaic=True) == 32
    assert most_objects(records, 100, 16, mosaic=True) == 80
    assert most_objects(records[:3], 2, 0, mosaic=True) == 12
