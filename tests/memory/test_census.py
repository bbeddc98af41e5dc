"""The census, and the sampled steps against the real loader."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from runkey.data.index import write_index
from runkey.data.loader import build_train_loader
from runkey.errors import DataError
from runkey.memory.batch_shapes import sample_windows, take_census
from runkey.params import Augment, Data
from tests.support.workspace import loader_params


@pytest.fixture
def mixed(make_record):
    return [
        make_record(1, 640, 480, 3),
        make_record(2, 480, 640, 7, crowds=5),
        make_record(3, 640, 360, 0),
    ]


def test_census_of_mixed_orientations(mixed):
    data = Data(short_sides=(480, 800), long_side=1333, augment=Augment())
    census = take_census(data, mixed, batch_size=3, max_objects=100)
    # 640 x 480 at 480 and 800, its portrait twin, and 640 x 360, which the long side limits.
    assert census.shapes == 6
    assert census.worst == census.worst_grouped == (800, 1333)
    assert census.largest == (750, 1333)
    assert (census.worst_of(1), census.worst_of(2)) == (census.largest, census.worst)
    assert census.worst_ungrouped == (1066, 1333)
    assert census.objects == (7, 10, 10)
    lines = census.lines()
    assert lines[:2] == [
        "census: 6 output shapes, the largest 750 x 1333; up to 7 objects an image",
        "  once padded 7 shapes, the worst 800 x 1333",
    ]
    assert lines[2] == (
        "  grouping by aspect pays: mixed batches would pad to 1066 x 1333, 1.33 times the pixels"
    )


def test_census_without_grouping_says_what_it_costs(mixed):
    data = Data(short_sides=(480, 800), long_side=1333, group_by_aspect=False)
    census = take_census(data, mixed, batch_size=2, max_objects=5)
    assert census.worst == census.worst_ungrouped == (1066, 1333)
    assert census.objects == (5, 8)
    assert census.lines()[2] == (
        "  data.group_by_aspect: true would pad to 800 x 1333 at most, 1/1.33 of the pixels"
    )


def test_census_of_one_shape(make_record):
    records = [make_record(1, 256, 192, 4), make_record(2, 256, 192, 8)]
    assert take_census(Data(), records, batch_size=1, max_objects=30).lines() == [
        "census: 1 output shape, the largest 120 x 160; up to 8 objects an image",
        "  once padded 1 shape, the worst 120 x 160",
    ]


def test_census_needs_images():
    with pytest.raises(DataError) as caught:
        take_census(Data(), [], batch_size=1, max_objects=30)
    assert str(caught.value) == (
        "prepared/train.json: no training images; see prepared/report.json"
    )


def test_sampled_steps_are_those_of_the_real_loader(make_record, tmp_path):
    """Shapes and boxes of every forward pass of two epochs, without an image being opened."""
    augment = Augment(crop_probability=0.5, crop_short_sides=(40, 50), crop_min=20, crop_max=40)
    data = Data(short_sides=(32, 48), long_side=64, augment=augment)
    records = [
        make_record(i, *((64, 48), (48, 64), (50, 50))[i % 3], boxes=i % 5) for i in range(20)
    ]
    (tmp_path / "prepared").mkdir()
    (tmp_path / "data").mkdir()
    write_index(tmp_path / "prepared/train.json", records)
    common = {"seed": 3, "batch_size": 6, "micro_batch": 4, "max_objects": 3}
    windows = sample_windows(data, records, batches=12, **common)
    for record in records:  # only now is there anything to open
        pixels = np.zeros((record.height, record.width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / record.file)
    params = loader_params(data, seed=3, batch_size=6, max_objects=3)
    loader = build_train_loader(params, tmp_path, 4)
    real = [window for epoch in range(2) for window in loader.epoch(epoch)][: len(windows)]
    assert sum(map(len, windows)) >= 12
    assert len(real) == len(windows)
    for window, passes in zip(real, windows, strict=True):
        assert [(len(b), b.images.shape[2], b.images.shape[3], max(b.counts)) for b in window] == [
            (p.batch, p.height, p.width, p.objects) for p in passes
        ]
