"""Trainings share a device as long as their bounds add up to no more than it has."""

from __future__ import annotations

import random

import pytest

from runkey.errors import RunkeyError
from runkey.sweep.packing import Request, check_fits, place, request_bytes, room_bytes
from runkey.units import GIB, MIB


@pytest.mark.parametrize("seed", range(50))
def test_random_sets_never_exceed_a_device_and_leave_nothing_out_that_fits(seed: int) -> None:
    rng = random.Random(seed)
    free = {f"gpu{i}": rng.randrange(0, 40 * GIB) for i in range(rng.randrange(1, 6))}
    running = {name: rng.randrange(0, 6) for name in free} if seed % 2 else None
    waiting = [Request(str(i), rng.randrange(1, 20 * GIB)) for i in range(30)]
    placed = place(waiting, free, running)
    used = dict.fromkeys(free, 0)
    for request, device in placed:
        used[device] += request.bytes
    assert all(used[name] <= free[name] for name in free)
    started = {request.name for request, _ in placed}
    assert len(started) == len(placed)
    for request in waiting:
        if request.name not in started:
            assert all(used[name] + request.bytes > free[name] for name in free)
    shuffled = rng.sample(waiting, len(waiting))
    assert place(shuffled, free, running) == placed, "the order of the list does not matter"


def test_a_whole_queue_runs_without_ever_exceeding_a_device() -> None:
    rng = random.Random(0)
    rooms = {"a": 8 * GIB, "b": 24 * GIB}
    waiting = [Request(str(i), rng.randrange(GIB // 2, 8 * GIB)) for i in range(100)]
    running: list[tuple[Request, str]] = []
    ended = 0
    while waiting or running:
        free = {n: room - sum(r.bytes for r, d in running if d == n) for n, room in rooms.items()}
        assert all(size >= 0 for size in free.values())
        placed = place(waiting, free)
        running += placed
        waiting = [one for one in waiting if one not in [request for request, _ in placed]]
        running.remove(rng.choice(running))  # each round ends one: nothing hangs
        ended += 1
    assert ended == 100


def test_large_ones_start_first_on_the_device_with_the_least_room() -> None:
    waiting = [Request("small", 1), Request("large", 10)]
    small, large = waiting
    assert place(waiting, {"wide": 30, "close": 10}) == [(large, "close"), (small, "wide")]
    # No device is idle while another one is shared.
    assert place([small], {"wide": 30, "close": 10}, {"close": 1}) == [(small, "wide")]
    assert place([small], {"wide": 30, "close": 10}, {"close": 1, "wide": 2}) == [(small, "close")]
    assert place(waiting, {"wide": 9}) == [(waiting[0], "wide")]
    assert place(waiting, {}) == []


def test_a_request_is_the_bound_of_the_micro_batch_that_it_chooses_alone() -> None:
    def bound(images: int) -> int:
        return (1000 + 100 * images) * MIB

    assert request_bytes(bound, 8, 10 * GIB) == 1800 * MIB  # the whole batch
    assert request_bytes(bound, 8, 1400 * MIB) == 1400 * MIB  # four images of eight
    assert request_bytes(bound, 8, 1400 * MIB, outside_bytes=150 * MIB) == 1350 * MIB
    assert request_bytes(bound, 8, 10 * MIB) == 1100 * MIB  # nothing fits: one image
    assert room_bytes(GIB) == 768 * MIB
    assert room_bytes(100 * GIB) == 97 * GIB
    assert room_bytes(1) == 0


def test_one_that_fits_nowhere_is_refused_with_a_way_out() -> None:
    fits = Request("lr=1e-4", 2 * GIB)
    check_fits([fits], {"gpu0": 2 * GIB})
    huge = Request(
        "model.backbone=resnet101", 3 * GIB, "it would fit with model.checkpointing: true"
    )
    with pytest.raises(RunkeyError) as refused:
        check_fits([fits, huge], {"gpu0": 2 * GIB, "gpu1": GIB})
    assert str(refused.value) == (
        "model.backbone=resnet101: a training step takes up to 3.00 GiB, the largest device has"
        " room for 2.00; it would fit with model.checkpointing: true"
    )
    with pytest.raises(RunkeyError, match=r"\(and 1 other\).*use a larger one"):
        check_fits([fits, Request("b", 9 * GIB)], {})
