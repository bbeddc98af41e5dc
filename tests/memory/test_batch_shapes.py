"""Batch shapes, and the sampled steps against the real loader."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from runkey.data.index import write_index
from runkey.data.loader import build_train_loader
from runkey.errors import DataError
from runkey.memory.batch_shapes import sample_steps, shape_statistics
from runkey.params import Augment, Data
from tests.support.workspace import loader_params


@pytest.fixture
def mixed(make_record):
    return [
        make_record(1, 640, 480, 3),
        make_record(2, 480, 640, 7, crowds=5),
        make_record(3, 640, 360, 0),
    ]


def test_shapes_of_mixed_orientations(mixed):
    data = Data(short_sides=(480, 800), long_side=1333, augment=Augment(), max_objects=100)
    found = shape_statistics(loader_params(data, batch_size=3), mixed)
    # 640 x 480 at 480 and 800, its portrait twin, and 640 x 360, which the long side limits.
    assert found.shapes == 6
    assert found.worst == found.worst_grouped == (800, 1333)
    assert found.largest == (750, 1333)
    assert (found.worst_of(1), found.worst_of(2)) == (found.largest, found.worst)
    assert found.worst_ungrouped == (1066, 1333)
    assert found.objects == (7, 10, 10)
    lines = found.lines()
    assert lines[:2] == [
        "image shapes after resizing: 6 (largest 750 x 1333); up to 7 objects per image",
        "padded batch shapes: 7 (largest 800 x 1333)",
    ]
    assert lines[2] == (
        "  data.group_by_aspect helps: mixed batches would pad to 1066 x 1333, "
        "1.33 times the pixels"
    )


def test_without_grouping_the_cost_is_logged(mixed):
    data = Data(short_sides=(480, 800), long_side=1333, group_by_aspect=False, max_objects=5)
    found = shape_statistics(loader_params(data, batch_size=2), mixed)
    assert found.worst == found.worst_ungrouped == (1066, 1333)
    assert found.objects == (5, 8)
    assert found.lines()[2] == (
        "  data.group_by_aspect: true would pad to 800 x 1333 at most, 1/1.33 of the pixels"
    )


def test_one_shape(make_record):
    records = [make_record(1, 256, 192, 4), make_record(2, 256, 192, 8)]
    assert shape_statistics(loader_params(Data(), batch_size=1), records).lines() == [
        "image shapes after resizing: 1 (largest 120 x 160); up to 8 objects per image",
        "padded batch shapes: 1 (largest 120 x 160)",
    ]


def test_images_are_needed():
    with pytest.raises(DataError) as caught:
        shape_statistics(loader_params(Data(), batch_size=1), [])
    assert str(caught.value) == (
        "prepared/train.safetensors: no training images; see prepared/report.json"
    )


@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop_probability=0.5, crop_short_sides=(40, 50), crop_min=20, crop_max=40),
        Augment(zoom_out_probability=0.5, mosaic_probability=0.7),
    ],
    ids=["crop", "mosaic"],
)
def test_sampled_steps_are_those_of_the_real_loader(make_record, tmp_path, augment):
    """Shapes and boxes of every forward pass of two epochs, without an image being opened."""
    data = Data(short_sides=(32, 48), long_side=64, augment=augment)
    records = [
        make_record(i, *((64, 48), (48, 64), (50, 50))[i % 3], boxes=i % 5) for i in range(20)
    ]
    (tmp_path / "prepared").mkdir()
    (tmp_path / "data").mkdir()
    write_index(tmp_path / "prepared/train.safetensors", records)
    params = loader_params(data, seed=3, batch_size=6, max_objects=3)
    windows = sample_steps(params, records, micro_batch=4, count=12, seed=3)
    for record in records:  # only now is there anything to open
        pixels = np.zeros((record.height, record.width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / record.file)
    loader = build_train_loader(params, tmp_path, 4)
    real = [window for epoch in range(2) for window in loader.epoch(epoch)][: len(windows)]
    assert sum(map(len, windows)) >= 12
    assert len(real) == len(windows)
    for window, passes in zip(real, windows, strict=True):
        assert [(len(b), b.images.shape[2], b.images.shape[3], max(b.counts)) for b in window] == [
            (p.images, p.height, p.width, p.objects) for p in passes
        ]


def test_plain_epochs_do_not_change_what_is_predicted(make_record):
    """`training.epochs` is no parameter of the stage, and whole batches have fewer objects."""
    records = [make_record(i, 64, 48, boxes=3) for i in range(20)]
    mosaic = Augment(mosaic_probability=1.0, zoom=0, shift=0, min_visible=0)
    steps = []
    for plain_epochs in (0, 1000):
        augment = mosaic.model_copy(update={"plain_epochs": plain_epochs})
        params = loader_params(Data(augment=augment), batch_size=4, max_objects=100)
        steps.append(sample_steps(params, records, micro_batch=4, count=12, seed=3))
    assert steps[0] == steps[1]
    assert max(part.objects for step in steps[0] for part in step) > 6
