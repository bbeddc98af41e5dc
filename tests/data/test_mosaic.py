"""Zoom-out, mosaic and the crop by fractions: boxes, draws, bounds, and the last plain epochs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from runkey.data.augment import (
    OUTSIDE_RGB,
    WHOLE,
    Augmentation,
    augment_image,
    build_augmentation,
)
from runkey.data.dataset import BatchMaker
from runkey.data.index import Index
from runkey.data.sampler import GlobalBatchSampler
from runkey.memory.batch_shapes import shape_statistics
from runkey.params import Augment, Data
from tests.support.workspace import loader_params

DRAWS = 4000
AUGMENTS = {
    "zoom-out": Augment(zoom_out_probability=1, zoom_out_max=3, min_visible=0),
    "mosaic": Augment(mosaic_probability=1, min_visible=0),
    "mosaic, much moved": Augment(
        mosaic_probability=1, zoom=0.6, aspect=0.3, shift=0.3, min_visible=0
    ),
    "crop": Augment(crop_probability=1, crop_fraction=0.3, min_visible=0),
    "all": Augment(
        zoom_out_probability=0.5, mosaic_probability=0.5, crop_probability=0.3, crop_fraction=0.5,
        min_visible=0,
    ),
}  # fmt: skip
ALL = AUGMENTS["all"]


def augmentation(augment: Augment, **changes) -> Augmentation:
    return Augmentation(0, Data(short_sides=(60, 90), long_side=130, augment=augment), **changes)


def paint(workspace, make_record, count: int = 40):
    """Images with a red rectangle on blue, each image with a class of its own."""
    rng = np.random.default_rng(1)
    records = []
    for i in range(count):
        height, width = (int(side) for side in rng.integers(100, 300, 2))
        left, top = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
        w, h = width // 3, height // 3
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[..., 2] = 255
        pixels[top : top + h, left : left + w] = (255, 0, 0)
        path = workspace.root / f"data/images/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        box = (float(left), float(top), float(w), float(h))
        records.append(make_record(i, (height, width), boxes_xywh=(box,), labels=(i,)))
    workspace.write(records)
    return records


def filled(shape, boxes_xyxy, margin: float) -> np.ndarray:
    """The pixels whose centres lie in a box that is `margin` pixels larger on each side."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    mask = np.zeros(shape, dtype=bool)
    for left, top, right, bottom in boxes_xyxy:
        inside = (x > left - margin) & (x < right + margin)
        mask |= inside & (y > top - margin) & (y < bottom + margin)
    return mask


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS.keys())
@pytest.mark.parametrize("cached", [False, True])
def test_boxes_are_where_the_pixels_are(workspace, make_record, train_loader, augment, cached):
    """Every box is red up to a pixel, and all that is red lies in a box up to a pixel."""
    paint(workspace, make_record)
    data = Data(short_sides=(60, 90), long_side=130, augment=augment)
    margin, seen = 1.5 if cached else 1.0, Counter()
    loader = train_loader(data, batch_size=8, micro_batch=3, cached=cached)
    for batch in (batch for epoch in (0, 1) for window in loader.epoch(epoch) for batch in window):
        boxes, labels = batch.boxes_cxcywh.split(batch.counts), batch.labels.split(batch.counts)
        for i in range(len(batch)):
            height, width = batch.sizes[i].tolist()
            cx, cy, w, h = (boxes[i].double().numpy() * ([width, height] * 2)).T
            xyxy = np.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), axis=1)
            red = (batch.images[i, 0].int() - batch.images[i, 2].int()).numpy() > 60
            assert not batch.images[i, :, height:].any()
            assert not batch.images[i, :, :, width:].any()
            assert not (filled(red.shape, xyxy, -margin) & ~red).any()
            assert not (red & ~filled(red.shape, xyxy, margin)).any()
            assert len(set(labels[i].tolist())) == len(labels[i])
            seen[len(labels[i])] += 1
    mosaics = augment.mosaic_probability
    assert (max(seen) >= 3) is (mosaics > 0)
    assert seen[0] < 20  # crops may miss the object


def test_zoom_out_has_ssds_distribution(plain):
    augment = plain.model_copy(update={"zoom_out_probability": 0.4, "zoom_out_max": 3.0})
    drawn = augmentation(augment).draw(0, range(DRAWS), [(192, 256)] * DRAWS)
    assert {one.size for one in drawn} == {(60, 80), (90, 120)}
    regions = [one.region for one in drawn if one.region != WHOLE]
    assert len(regions) / DRAWS == pytest.approx(0.4, abs=0.03)
    assert all(region.width == region.height for region in regions)
    ratios = np.array([region.width for region in regions])
    assert stats.kstest(ratios, stats.uniform(1, 2).cdf).pvalue > 1e-3
    for name in ("left", "top"):
        place = np.array([-getattr(region, name) for region in regions]) / (ratios - 1)
        assert stats.kstest(place, stats.uniform(0, 1).cdf).pvalue > 1e-3


def test_zoom_out_shows_the_whole_image_on_grey(plain):
    augment = plain.model_copy(update={"zoom_out_probability": 1.0, "zoom_out_max": 4.0})
    image = torch.full((120, 160, 3), 200, dtype=torch.uint8).permute(2, 0, 1)
    for one in augmentation(augment).draw(0, range(50), [(120, 160)] * 50):
        out = augment_image(image, one)
        white = (out == 200).all(0)
        assert (out[:, ~white] == torch.tensor(OUTSIDE_RGB)[:, None]).all()
        part = white.sum() / white.numel() * one.region.width**2
        assert part == pytest.approx(1, abs=0.12)


def test_a_mosaic_holds_four_images_that_fill_the_output():
    sizes = [(192, 256), (256, 192), (100, 300), (200, 200), (60, 80)] * 40
    drawn = augmentation(Augment(mosaic_probability=1)).draw(3, range(200), sizes)
    places, others, centres = Counter(), Counter(), []
    for index, one in enumerate(drawn):
        covered = np.zeros(one.size, dtype=int)
        for tile in one.tiles:
            rows = slice(tile.top, tile.top + tile.augment.size[0])
            covered[rows, tile.left : tile.left + tile.augment.size[1]] += 1
        assert (covered == 1).all()
        images = [tile.index for tile in one.tiles]
        assert len(set(images)) == 4
        places[images.index(index)] += 1
        others.update(set(images) - {index})
        centres.append((one.tiles[3].top / one.size[0], one.tiles[3].left / one.size[1]))
    assert min(places.values()) > 30
    assert len(others) > 180  # of 600 draws among 200, a few images come in none
    assert max(others.values()) < 14
    low, high = np.min(centres, axis=0), np.max(centres, axis=0)
    assert (low > 0.28).all()
    assert (high < 0.72).all()
    assert (high - low > 0.35).all()


def test_tiles_keep_the_ratio_of_their_images(plain):
    """Without stretching, a tile shows all of one side of its image, in the same scale in x, y."""
    sizes = [(192, 256), (256, 192), (100, 300), (200, 200), (60, 80)] * 8
    augment = plain.model_copy(update={"mosaic_probability": 1.0})
    for one in augmentation(augment).draw(0, range(40), sizes):
        for tile in one.tiles:
            region, (height, width) = tile.augment.region, sizes[tile.index]
            assert max(region.width, region.height) == 1.0
            assert 0 <= region.left <= 1 - region.width + 1e-9
            assert 0 <= region.top <= 1 - region.height + 1e-9
            scale = tile.augment.size[1] / (region.width * width)
            assert tile.augment.size[0] / (region.height * height) == pytest.approx(scale)


def test_draws_follow_from_seed_epoch_and_image():
    sizes = [(192, 256), (256, 192)] * 100
    drawn = augmentation(ALL)
    first = list(drawn.draw(5, range(200), sizes))
    assert first == list(augmentation(ALL).draw(5, range(200), sizes))
    assert first != list(drawn.draw(6, range(200), sizes))
    assert first != list(Augmentation(1, drawn.data).draw(5, range(200), sizes))
    assert sum(bool(one.tiles) for one in first) / 200 == pytest.approx(0.5, abs=0.1)


def test_the_other_draws_stay_as_they_are():
    """Images that come into no mosaic, and all sizes, are those of a run without mosaic."""
    sizes = [(192, 256), (256, 192)] * 100
    bare = augmentation(Augment()).draw(5, range(200), sizes)
    for augment in (Augment(zoom_out_probability=0.5), Augment(mosaic_probability=0.5)):
        drawn = augmentation(augment).draw(5, range(200), sizes)
        same = sum(one == other for one, other in zip(drawn, bare, strict=True))
        assert same / 200 == pytest.approx(0.5, abs=0.1)
        assert [one.size for one in drawn] == [one.size for one in bare]


def test_a_mosaic_needs_four_images_and_two_pixels():
    for sizes in ([(192, 256)] * 3, [(1, 4000)] * 8):
        drawn = augmentation(Augment(mosaic_probability=1)).draw(0, range(len(sizes)), sizes)
        assert not any(one.tiles for one in drawn)


@pytest.mark.parametrize(("plain_epochs", "mixed"), [(0, [0, 1, 2, 3]), (1, [0, 1, 2]), (9, [])])
def test_the_last_epochs_are_plain(plain_epochs, mixed):
    augment = Augment(mosaic_probability=1, zoom_out_probability=1, plain_epochs=plain_epochs)
    params = loader_params(Data(augment=augment))
    params = params.model_copy(
        update={"training": params.training.model_copy(update={"epochs": 4})}
    )
    drawn = build_augmentation(params)
    bare = Augmentation(params.seed, Data(augment=Augment()))
    sizes = [(192, 256)] * 20
    for epoch in range(4):
        found = drawn.draw(epoch, range(20), sizes)
        assert all(one.tiles for one in found) is (epoch in mixed)
        if epoch not in mixed:
            assert list(found) == list(bare.draw(epoch, range(20), sizes))


def test_a_crop_by_fractions_suits_any_size(plain):
    augment = plain.model_copy(update={"crop_probability": 1.0, "crop_fraction": 0.35})
    for size in ((192, 256), (48, 36), (3000, 2000)):
        drawn = augmentation(augment).draw(0, range(DRAWS), [size] * DRAWS)
        sides = Counter(round(10 * one.region.width) for one in drawn)
        assert sorted(sides) == [4, 5, 6, 7, 8, 9, 10]
        assert stats.chisquare(list(sides.values())).pvalue > 1e-3
        lefts = [one.region.left / 0.6 for one in drawn if one.region.width == 0.4]
        assert stats.kstest(lefts, stats.uniform(0, 1).cdf).pvalue > 1e-3
        for one in drawn:
            ratio = one.region.width * size[1] / (one.region.height * size[0])
            assert one.size[1] / one.size[0] == pytest.approx(ratio, rel=0.06)


def dealt(augment: Augment, records, limit: int):
    """Objects of every image over some epochs, in the sampler's batches of 4."""
    data = Data(short_sides=(60,), long_side=90, augment=augment)
    params = loader_params(data, batch_size=4, max_objects=limit)
    drawn, index = build_augmentation(params), Index.of(records)
    maker = BatchMaker(index, None, None, drawn, limit)
    sampler = GlobalBatchSampler(drawn, index.ids, index.sizes, 4)
    for epoch in range(40):
        for batch in sampler.global_batches(epoch):
            yield [maker.visible_objects(image, one) for image, one in batch]
    yield shape_statistics(params, records).objects


@pytest.mark.parametrize("limit", [6, 1000])
def test_objects_stay_below_the_stated_bound(make_record, limit):
    crowds = {5: (True, False, False, False, False)}
    records = [
        make_record(i, boxes=i % 6, crowd=crowds.get(i, (False,) * (i % 6))) for i in range(12)
    ]
    augment = Augment(mosaic_probability=0.7, zoom=0, shift=0, min_visible=0)
    *batches, bound = dealt(augment, records, limit)
    singles = [len(labels) for batch in batches for _, labels in batch]
    assert max(singles) <= bound[0] == min(limit, 5 + 4 + 4 + 4)
    assert max(singles) >= min(limit, 12)
    assert max(sum(len(labels) for _, labels in batch) for batch in batches) <= bound[3]


def test_the_largest_objects_of_a_mosaic_are_kept(make_record):
    """Of all four images together, in their order."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(8):
        boxes = rng.uniform(5, 25, (4, 4)).tolist()
        labels = tuple(range(4 * i, 4 * i + 4))
        records.append(make_record(i, boxes=4, boxes_xywh=tuple(map(tuple, boxes)), labels=labels))
    augment = Augment(mosaic_probability=1)
    *few, _ = dealt(augment, records, 5)
    *every, _ = dealt(augment, records, 1000)
    for batch, whole in zip(few, every, strict=True):
        for (boxes, labels), (all_boxes, all_labels) in zip(batch, whole, strict=True):
            areas = all_boxes[:, 2] * all_boxes[:, 3]
            keep = np.sort(np.argsort(-areas, kind="stable")[:5])
            assert labels.tolist() == all_labels[keep].tolist()
            assert np.array_equal(boxes, all_boxes[keep])


def test_remains_of_boxes_are_dropped(make_record):
    """In a tile as in an image: by the part of the object that is seen."""
    box = (60.0, 40.0, 20.0, 20.0)
    records = [make_record(i, boxes_xywh=(box,), boxes=1) for i in range(12)]
    counts = []
    for least in (0.0, 0.35, 0.9):
        *batches, _ = dealt(Augment(mosaic_probability=1, min_visible=least), records, 1000)
        areas = [w * h for batch in batches for boxes, _ in batch for _, _, w, h in boxes]
        counts.append(len(areas))
    assert counts[0] > counts[1] > counts[2] > 0
