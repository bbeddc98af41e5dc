"""Two ranks give the gradient of the whole window: real processes, gloo, the real model in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runkey.training.distributed import World
from tests.support.ranks import PRESETS, WINDOWS, gradients, live_loss, statistics

ALONE = World()


@pytest.fixture(scope="module")
def two_ranks(results: Any) -> list[Any]:
    return results("accumulation", size=2)


def test_ranks_and_micro_batches_change_no_gradient(two_ranks):
    """1 x 8 = 2 x 4 = 4 x 2 = 8 x 1 = 2 ranks x 4, with unequal numbers of boxes."""
    alone = gradients(ALONE)
    for preset in PRESETS:
        for name in WINDOWS:
            losses, whole = alone[preset, name, 8]
            largest = max(gradient.abs().max().item() for gradient in whole.values())
            assert largest > 1e-3
            for found in (alone, *(rank[0] for rank in two_ranks)):
                for micro_batch in (8, 4, 2, 1):
                    other_losses, other = found[preset, name, micro_batch]
                    assert other.keys() == whole.keys()
                    for parameter, gradient in whole.items():
                        difference = (gradient - other[parameter]).abs().max().item()
                        assert difference < 1e-10 * largest, (preset, name, micro_batch, parameter)
                    assert other_losses.keys() == losses.keys()
                    for part, value in losses.items():
                        assert other_losses[part].item() == pytest.approx(value.item(), rel=1e-10)


def same_bits(ranks):
    first = ranks[0][0]
    for found, *_ in ranks[1:]:
        for case, (losses, whole) in first.items():
            other_losses, other = found[case]
            assert all(torch.equal(whole[name], other[name]) for name in whole)
            assert {k: v.item() for k, v in losses.items()} == {
                k: v.item() for k, v in other_losses.items()
            }


def test_all_ranks_get_the_same_bits(two_ranks):
    same_bits(two_ranks)


@pytest.mark.slow
def test_three_ranks(results):
    same_bits(results("accumulation", size=3))


def test_running_statistics_are_the_mean_of_the_ranks(two_ranks):
    """Each rank moves them by its own share; one without an image of the window does not."""
    (first, one_image), other = two_ranks[0][1], two_ranks[1][1]
    for mine, others in zip((first, one_image), other, strict=True):
        assert all(torch.equal(mine[name], others[name]) for name in mine)
    shares = [statistics(ALONE, [ids])[0] for ids in ([1, 3], [2, 4])]
    for name in ("backbone.1.running_mean", "backbone.1.running_var"):
        mean = (shares[0][name] + shares[1][name]) / 2
        torch.testing.assert_close(first[name], mean, rtol=0, atol=1e-12)
        assert (shares[0][name] - mean).abs().max() > 1e-4
        assert not torch.equal(one_image[name], first[name])
    assert one_image["backbone.1.num_batches_tracked"] == 2


def test_live_batch_norm_is_why_two_ranks_start_at_another_loss(two_ranks):
    """It normalises each forward pass by itself: ranks are like micro-batches of those images."""
    whole = WINDOWS["whole"]
    as_ranks = live_loss(ALONE, [whole[0::2], whole[1::2]])
    assert [found[2] for found in two_ranks] == pytest.approx([as_ranks, as_ranks], rel=1e-10)
    assert abs(live_loss(ALONE, [whole]) - as_ranks) > 0.1
