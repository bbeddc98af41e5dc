"""One batch: pixels, boxes, labels and counts, from files and from the cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from runkey.params import Augment, Data


def draw(path, height, width, box_xyxy):
    """A red rectangle on blue."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 2] = 255
    left, top, right, bottom = box_xyxy
    pixels[top:bottom, left:right] = (255, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("cached", [False, True])
def test_boxes_of_a_batch_are_where_the_pixels_are(workspace, make_record, train_loader, cached):
    """From the file to the padded batch: normalised boxes, valid sizes, labels, counts."""
    rng = np.random.default_rng(1)
    records = []
    for i in range(40):
        height, width = (int(side) for side in rng.integers(100, 300, 2))
        left, top = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
        box = (left, top, left + width // 3, top + height // 3)
        draw(workspace.root / f"data/images/{i}.png", height, width, box)
        xywh = (float(left), float(top), float(width // 3), float(height // 3))
        records.append(make_record(i, (height, width), boxes_xywh=(xywh,), labels=(i % 5,)))
    workspace.write(records)
    data = Data(short_sides=(60, 80), long_side=120, augment=Augment(min_visible=0))
    seen = 0
    for window in train_loader(data, batch_size=8, micro_batch=3, cached=cached).epoch(0):
        for batch in window:
            assert (batch.images.dtype, batch.sizes.dtype) == (torch.uint8, torch.int64)
            assert (batch.boxes_cxcywh.dtype, batch.labels.dtype) == (torch.float32, torch.int64)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.sizes.max(dim=0).values.tolist() == list(batch.images.shape[2:])
            assert sum(batch.counts) == len(batch.boxes_cxcywh) == len(batch.labels)
            boxes, labels = batch.boxes_cxcywh.split(batch.counts), batch.labels.split(batch.counts)
            for i, id_ in enumerate(batch.image_ids):
                height, width = batch.sizes[i].tolist()
                assert not batch.images[i, :, height:].any()
                assert not batch.images[i, :, :, width:].any()
                record = records[id_]
                assert batch.original_sizes[i].tolist() == [record.height, record.width]
                (cx, cy, w, h), (label,) = boxes[i][0].tolist(), labels[i].tolist()
                assert label == id_ % 5
                ends = ((cx - w / 2) * width, (cy - h / 2) * height)
                ends += ((cx + w / 2) * width, (cy + h / 2) * height)
                red = (batch.images[i, 0].int() - batch.images[i, 2].int()) > 20
                ys, xs = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
                found = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
                assert np.abs(found - ends).max() <= (1.5 if cached else 1.0)
                seen += 1
    assert seen == 40


def test_memory_of_a_batch_is_used_again_when_it_is_gone_and_not_before(
    workspace, make_record, train_loader, per_image
):
    """Also if only a part of it is kept; what it held before is not seen."""
    workspace.write([make_record(i, (60 + i, 80), boxes=1) for i in range(12)])
    data = Data(short_sides=(40, 60), long_side=80)
    loader = train_loader(data, batch_size=3)
    kept = [per_image(window) for window in loader.epoch(0)]
    places = [batch.images.data_ptr() for window in loader.epoch(0) for batch in window]
    assert len(set(places)) < len(places)
    batches = [batch for window in loader.epoch(0) for batch in window]
    assert len({batch.images.data_ptr() for batch in batches}) == len(batches)
    parts = [(batch.images[0, 0], batch.images[0, 0].clone()) for batch in batches]
    del batches
    assert [per_image(window) for window in loader.epoch(0)] == kept
    assert all(torch.equal(part, copy) for part, copy in parts)


def test_exif_turns_reach_the_loader(workspace, make_record, eval_loader, plain):
    """Width, height and boxes of a record are those after turning."""
    draw(workspace.root / "data/images/0.png", 80, 60, (0, 0, 20, 10))
    record = make_record(0, (60, 80), rotate=90, boxes_xywh=((70.0, 0.0, 10.0, 20.0),), boxes=1)
    workspace.write([record])
    (batch,) = eval_loader(Data(short_sides=(60,), long_side=80, augment=plain))
    red = batch.images[0, 0] > 128
    inside = torch.zeros(60, 80, dtype=torch.bool)
    inside[0:20, 70:80] = True
    assert torch.equal(red, inside)
    assert torch.allclose(batch.boxes_cxcywh, torch.tensor([[75 / 80, 10 / 60, 10 / 80, 20 / 60]]))


def test_crowds_are_left_out_and_images_without_boxes_kept(
    workspace, make_record, train_loader, eval_loader, plain
):
    records = [
        make_record(0, boxes=0),
        make_record(1, boxes=3, crowd=(False, True, False)),
        make_record(2, boxes=2, crowd=(True, True)),
        make_record(3, boxes=0),
    ]
    workspace.write(records)
    data = Data(short_sides=(30,), long_side=40, augment=plain)
    for batch in (next(train_loader(data).epoch(0))[0], next(iter(eval_loader(data)))):
        counts = dict(zip(batch.image_ids, batch.counts, strict=True))
        assert counts == {0: 0, 1: 2, 2: 0, 3: 0}
        assert batch.labels.tolist() == [0, 2]


def test_a_batch_without_any_box(workspace, make_record, train_loader):
    workspace.write([make_record(i, boxes=0) for i in range(3)])
    ((batch,),) = train_loader(Data(short_sides=(30,), long_side=40)).epoch(0)
    assert batch.boxes_cxcywh.shape == (0, 4)
    assert batch.labels.shape == (0,)
    assert batch.counts == (0, 0, 0)


@pytest.mark.parametrize(("limit", "queries"), [(2, 1000), (0, 2), (2, 5), (5, 2)])
def test_the_largest_objects_are_kept_in_order(
    workspace, make_record, train_loader, plain, limit, queries
):
    boxes = ((0, 0, 9, 9), (5, 5, 20, 20), (1, 1, 3, 3), (10, 5, 30, 20))
    workspace.write([make_record(0, boxes=4, boxes_xywh=boxes, labels=(0, 1, 2, 3))])
    data = Data(short_sides=(60,), long_side=80, augment=plain, max_objects=limit)
    ((batch,),) = train_loader(data, max_objects=queries).epoch(0)
    assert batch.labels.tolist() == [1, 3]


def test_min_visible_drops_boxes_that_are_mostly_cut_off(workspace, make_record, train_loader):
    """Zoomed in on the middle, a box at the rim is kept only as far as it can be seen."""
    boxes = ((0.0, 0.0, 80.0, 60.0), (0.0, 0.0, 12.0, 8.0), (30.0, 20.0, 10.0, 10.0))
    workspace.write([make_record(0, boxes=3, boxes_xywh=boxes, labels=(0, 1, 2))])

    def labels(epoch, min_visible):
        augment = Augment(
            zoom=0, aspect=0, shift=0, crop_probability=1, crop_short_sides=(60,),
            crop_min=50, crop_max=50, min_visible=min_visible,
        )  # fmt: skip
        data = Data(short_sides=(60,), long_side=80, augment=augment)
        ((batch,),) = train_loader(data).epoch(epoch)
        return set(batch.labels.tolist())

    kept_any = [labels(epoch, 0.0) for epoch in range(30)]
    kept_most = [labels(epoch, 0.45) for epoch in range(30)]
    # The crop shows 2500 of the first box's 4800 pixels: always more than 0.45, never all.
    assert all(0 in kept for kept in kept_most)
    assert all(most <= some for most, some in zip(kept_most, kept_any, strict=True))
    assert sum(1 in kept for kept in kept_most) < sum(1 in kept for kept in kept_any) < 30
    assert not any(0 in labels(epoch, 0.55) for epoch in range(5))


def test_colours_stay_raw_until_the_device(workspace, make_record, train_loader, plain):
    """Colour factors travel beside the pixels: the loader's uint8 pixels are the file's."""
    workspace.write([make_record(i) for i in range(4)])
    strong = plain.model_copy(update={"brightness": 0.5, "contrast": 0.5})
    data = Data(short_sides=(60,), long_side=80, augment=strong)
    loader = train_loader(data)
    ((batch,),) = loader.epoch(0)
    for image, id_ in zip(batch.images, batch.image_ids, strict=True):
        file = np.asarray(Image.open(workspace.root / f"data/images/{id_}.png"))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), file)
    assert batch.colour.shape == (4, 2)
    assert len(set(batch.colour.flatten().tolist())) == 8
    ((later,),) = loader.epoch(1)
    assert not set(later.colour.flatten().tolist()) & set(batch.colour.flatten().tolist())
