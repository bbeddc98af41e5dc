"""Normalisation against its formula in float64, and its independence of the padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runkey.data.dataset import IMAGENET, Batch, normalise


def make_batch(sizes, colour=None, padded=None, seed=0, channels_last=True):
    """Random pixels in the valid area of each image."""
    generator = np.random.default_rng(seed)
    height, width = padded or (max(h for h, _ in sizes), max(w for _, w in sizes))
    images = torch.zeros(len(sizes), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for image, (h, w) in zip(images, sizes, strict=True):
        image[:, :h, :w] = torch.from_numpy(generator.integers(0, 256, (3, h, w), dtype=np.uint8))
    return Batch(
        images=images if channels_last else images.contiguous(),
        sizes=torch.tensor(sizes),
        boxes_cxcywh=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        counts=(0,) * len(sizes),
        image_ids=tuple(range(len(sizes))),
        original_sizes=torch.tensor(sizes),
        colour=None if colour is None else torch.tensor(colour, dtype=torch.float32),
    )


def formula(pixels, factors):
    """[3, h, w] in float64: brightness, then contrast, then saturation, one after the other."""
    x = pixels.astype(np.float64) * factors[0]
    x = (x - x.mean()) * factors[1] + x.mean()
    if len(factors) == 3:
        grey = np.tensordot([0.299, 0.587, 0.114], x, 1)
        x = factors[2] * x + (1 - factors[2]) * grey
    mean, std = np.array(IMAGENET.mean), np.array(IMAGENET.std)
    return (x / 255 - mean[:, None, None]) / std[:, None, None]


SIZES = [(13, 21), (30, 8), (17, 17)]
COLOURS = {
    "none": None,
    "brightness and contrast": [[1.2, 0.8], [0.7, 1.3], [1, 1]],
    "saturation too": [[1.2, 0.8, 0.5], [0.7, 1.3, 1.0], [1, 1, 1.5]],
}


@pytest.mark.parametrize("colour", COLOURS.values(), ids=COLOURS.keys())
@pytest.mark.parametrize("channels_last", [True, False])
def test_equals_the_formula_and_padding_is_zero(colour, channels_last):
    batch = make_batch(SIZES, colour, channels_last=channels_last)
    images, padding = normalise(batch, channels_last=channels_last)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    assert images.is_contiguous(memory_format=memory)
    assert (images.dtype, padding.dtype) == (torch.float32, torch.bool)
    for i, (h, w) in enumerate(SIZES):
        want = formula(batch.images[i, :, :h, :w].numpy(), (1, 1) if colour is None else colour[i])
        assert np.abs(images[i, :, :h, :w].numpy() - want).max() < 5e-6
        inside = torch.zeros(images.shape[2:], dtype=torch.bool)
        inside[:h, :w] = True
        assert torch.equal(padding[i], ~inside)
        assert (images[i][:, ~inside] == 0).all()


@pytest.mark.parametrize("colour", COLOURS.values(), ids=COLOURS.keys())
def test_an_image_does_not_depend_on_its_batch(colour):
    """To the last bit: in a batch, alone, and in a batch that pads it further."""
    batch = make_batch(SIZES, colour)
    images, _ = normalise(batch)
    wider, _ = normalise(make_batch(SIZES, colour, padded=(64, 61)))
    for i, (h, w) in enumerate(SIZES):
        alone = make_batch([SIZES[i]], None if colour is None else [colour[i]])
        alone.images[0] = batch.images[i, :, :h, :w]
        assert torch.equal(normalise(alone)[0][0], images[i, :, :h, :w])
        assert torch.equal(wider[i, :, :h, :w], images[i, :, :h, :w])


@pytest.mark.parametrize("seed", range(6))
def test_padding_does_not_show_in_the_mean_of_a_large_image(seed):
    """Its sum is beyond what float32 counts exactly, and padding would change the rounding."""
    images = [
        normalise(make_batch([(301, 403)], [[1.1, 0.6]], padded, seed))[0][0, :, :301, :403]
        for padded in ((301, 403), (334, 500), (609, 417))
    ]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_the_batch_is_left_as_it_was():
    batch = make_batch(SIZES, COLOURS["saturation too"])
    before = batch.images.clone()
    normalise(batch)
    assert torch.equal(batch.images, before)


@pytest.mark.gpu
def test_gpu_equals_cpu_and_does_not_wait():
    batch = make_batch(SIZES, COLOURS["saturation too"])
    want, want_padding = normalise(batch)
    moved = batch.to(torch.device("cuda"))
    normalise(moved)
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, padding = normalise(moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(images.cpu(), want, atol=1e-5)
    assert torch.equal(padding.cpu(), want_padding)
