"""Gradients are sent while backward goes on: the same sums, whatever happens to a rank meanwhile.

Real processes, gloo, the real model with live batch norm and dropout.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.exchange import FIRST, LAST, MIDDLE, PLACES

SLOW = pytest.mark.slow


def equal(left: Any, right: Any) -> bool:
    """Same gradients, running statistics and losses, to the bit."""
    kinds = ("gradients", "buffers", "losses")
    return all(
        left[kind].keys() == right[kind].keys()
        and all(torch.equal(left[kind][n], right[kind][n]) for n in left[kind])
        for kind in kinds
    )


@pytest.fixture(scope="module")
def two_ranks(results: Any) -> list[Any]:
    return results("exchange", "sums")


def test_buckets_give_the_sum_of_one_tensor(two_ranks):
    """Of two numbers, in any order: the same bits. One rank has no image of `fewer than ranks`."""
    for rank in two_ranks:
        for case, got in rank.items():
            for sums in got["buckets"]:
                assert sums.keys() == got["at once"].keys()
                assert all(torch.equal(sums[n], got["at once"][n]) for n in sums), case
            assert got["hooks left"] == 0
    assert two_ranks[1]["fewer than ranks, 8"]["own"] == 0
    dropped = two_ranks[0]["layer drop"]
    assert 0 < dropped["own"] < len(dropped["at once"])


def test_buckets_are_sent_before_backward_ends(two_ranks):
    """Those of the last micro-batch, and on both ranks the same ones in the same order."""
    for case in two_ranks[0]:
        sent = []
        for rank in two_ranks:
            events = rank[case]["events"]
            ends = [i for i, event in enumerate(events) if event == "backward ends"]
            sent.append([event for event in events if event != "backward ends"])
            buckets = len(sent[-1]) // 2  # of each of two steps
            if not ends:  # no image
                continue
            passes = len(ends) // 2
            assert ends[: passes - 1] == list(range(passes - 1))
            # In layer drop the first bucket holds absent gradients, and is sent at the end.
            early = 0 if case == "layer drop" else buckets - 1
            assert ends[passes - 1] == passes - 1 + early, case
        assert sent[0] == sent[1]


@SLOW
def test_three_ranks_give_the_same_sum_twice(results):
    for rank in results("exchange", "sums", size=3):
        for case, got in rank.items():
            first, second = got["buckets"]
            assert all(torch.equal(first[n], second[n]) for n in first), case
            exact = 1e-10 if case != "layer drop" else 1e-5
            largest = max(g.abs().max().item() for g in got["at once"].values())
            for name, gradient in got["at once"].items():
                assert (first[name] - gradient).abs().max().item() < exact * largest, (case, name)


@SLOW
@pytest.mark.parametrize("short", [["1"], ["0", "1"]])
def test_a_step_that_runs_out_of_memory_is_as_if_the_limit_were_known(results, short):
    for rank, got in enumerate(results("exchange", "scarce", *short)):
        known = got["known"]
        assert known["splits"] == []
        for place in PLACES:
            case = got[place]
            assert equal(case, known), (rank, place)
            assert case["splits"] == [(2, 32 * 32)] * len(short)
            # A rank that had sent nothing tries again alone.
            tries = 2 if place in [(MIDDLE, 3), (LAST, 3)] else 1
            assert case["sent"] == tries * case["buckets"], (rank, place)
    assert known["buckets"] >= 4
    assert (FIRST, 3) in PLACES


@SLOW
def test_memory_may_run_out_again_in_the_next_try(results):
    for got in results("exchange", "scarce_again"):
        assert equal(got["found"], got["known"])
        assert got["found"]["splits"] == [(4, 2 * 32 * 32), (2, 32 * 32)]


def test_what_ends_one_rank_in_a_backward_pass_ends_all(results):
    for rank, got in enumerate(results("exchange", "ends")):
        assert got["stop"] == ("SharedError: rank 1 of 2: the disk is full", True)
        assert got["interrupt"][0].startswith("Interrupted: ")
        assert got["interrupt"][1]
        text, restored = got["out_of_memory"]
        assert text.startswith(
            "SharedError: rank 1 of 2: memory ran out with a single image, 2, of 32 x 32 pixels"
        )
        assert restored
        undisturbed, disturbed, stopped = got["signal"]
        assert equal(undisturbed, disturbed)
        assert stopped == (rank == 1)
        assert got["changed"] == "a gradient has changed after it was sent to the other ranks"
