"""Micro-batches that do not fit: a real allocator that refuses, and the same gradient in parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runkey.training.distributed import World
from runkey.training.step import accumulate_gradients, is_out_of_memory, pixels, split_batches
from tests.support import toy
from tests.support.ranks import machinery, real

REPOSITORY = Path(__file__).parents[2]
IDS = [1, 2, 3, 7, 5, 4, 6, 8]
ALONE = World()


@pytest.mark.slow
def test_memory_that_really_runs_out():
    """8 images do not fit, 4 do not, 2 do; with less still, not one does."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.scarce"],
        cwd=REPOSITORY,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["splits"] == [[8, 16, 16, 4 * 256], [4, 16, 16, 2 * 256]]
    assert told["known"] == []
    assert told["same as with the limit known"]
    assert told["same again"]
    assert told["line"].startswith(
        "memory ran out with a single image, 1, of 16 x 16 pixels; that needs"
    )
    assert told["kept"]
    training = told["training"]
    assert training["limit known"]
    assert training["splits"] == [[1, 8, 1024], [1, 4, 512]]
    assert training["lines"][0] == (
        "step 1: memory ran out with 8 x 16 x 16 (images x height x width); such a batch is"
        " computed in parts of at most 4 from here on, with the same result up to rounding"
    )
    # Stopped by the second checkpoint (the first is of the start), saved for the limit's sake.
    assert training["stopped"] == [1, 512]
    assert training["splits after the resume"] == []
    assert training["same weights"]
    assert training["steps"] == 2


def padded(ids):
    """A batch whose images differ in their valid size."""
    (batch,) = toy.make_window(ids, len(ids), dtype=torch.float64, size=32)
    sizes = torch.tensor([[32 - 4 * (i % 3), 32 - 4 * (i % 2)] for i in range(len(ids))])
    images = batch.images.clone()
    for image, (height, width) in zip(images, sizes.tolist(), strict=True):
        image[:, height:], image[:, :, width:] = 0, 0
    return replace(batch, images=images, sizes=sizes)


def gradients_of(parts, window, limit):
    parts.optimizer.zero_grad()
    losses = accumulate_gradients(parts, window, limit).values
    return losses, {n: p.grad for n, p in parts.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("preset", ["fast", "detr"])
@pytest.mark.parametrize("images", [1, 3, 5])
def test_a_cut_batch_gives_the_same_gradient(preset, images):
    """In fp64, on the real model, with padding and an image without boxes."""
    parts, window = real(preset, ALONE), (padded(IDS),)
    losses, whole = gradients_of(parts, window, None)
    other_losses, other = gradients_of(parts, window, images * 32 * 32)
    largest = max(gradient.abs().max().item() for gradient in whole.values())
    for name, gradient in whole.items():
        assert (gradient - other[name]).abs().max().item() < 1e-10 * largest, name
    for name, value in losses.items():
        assert other_losses[name].item() == pytest.approx(value.item(), rel=1e-10)


def test_cut_keeps_images_targets_and_padding():
    (batch,) = toy.make_window(IDS, 8)
    batch = replace(batch, colour=torch.arange(16.0).view(8, 2))
    parts = split_batches((batch,), 3 * 16 * 16)
    assert [len(part) for part in parts] == [2, 2, 2, 2]
    assert all(pixels(part) <= 3 * 256 for part in parts)
    assert sum((part.image_ids for part in parts), ()) == batch.image_ids
    assert sum((part.counts for part in parts), ()) == batch.counts
    for name in ("images", "sizes", "boxes_cxcywh", "labels", "original_sizes", "colour"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(batch, name)), name
    assert all(sum(p.counts) == len(p.labels) == len(p.boxes_cxcywh) for p in parts)


def test_a_limit_below_one_image_cuts_to_single_images():
    window = toy.make_window([1, 2, 3], 3)
    assert [len(part) for part in split_batches(window, 1)] == [1, 1, 1]
    assert split_batches(window, None) is window
    assert split_batches(window, 3 * 256)[0] is window[0]


def test_other_errors_are_not_memory():
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert is_out_of_memory(MemoryError())


def test_a_bug_is_not_retried():
    class Broken(toy.ToyCriterion):
        calls = 0

        def __call__(self, *arguments):
            self.calls += 1
            raise RuntimeError("something else")

    criterion = Broken()
    parts = machinery(toy.ToyModel(), criterion, ALONE)
    with pytest.raises(RuntimeError, match="something else"):
        accumulate_gradients(parts, toy.make_window(IDS, 8))
    assert criterion.calls == 1
