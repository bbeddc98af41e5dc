"""Names, copies on the host, and the time between checkpoints."""

import pytest
import torch

from runkey.training.checkpoint import (
    SHORTEST_SECONDS,
    CheckpointName,
    HostCopy,
    Interval,
    find_checkpoints,
    obsolete,
)
from runkey.training.tensors import all_finite, named_tensors
from tests.support import checkpoint_kit as kit


def saved(*names):
    return [CheckpointName(int(name.lstrip("a")), name.startswith("a")) for name in names]


@pytest.mark.parametrize(
    ("there", "gone"),
    [
        ([], []),
        (["5"], []),
        (["5", "9"], []),
        (["5", "9", "12", "3"], ["3", "5"]),
        # The newest anchor, and the one that the older checkpoint would go back to.
        (["a0", "a5", "8", "9", "7"], ["7", "a0"]),
        (["a0", "a5", "4", "9"], []),
        (["a0", "a5", "a10", "4", "12"], []),
        (["a0", "a5", "a10", "10", "12"], ["a0", "a5"]),
        # Without others, anchors are the checkpoints.
        (["a0", "a5", "a10"], ["a0"]),
    ],
)
def test_which_may_go(there, gone):
    assert sorted(obsolete(saved(*there))) == sorted(saved(*gone))


def test_checkpoints_are_found_by_name(tmp_path):
    names = ["step-00000012.ckpt", "anchor-00000012.ckpt", "step-123456789.ckpt"]
    others = ["step-00000013.ckpt.tmp", "step-00000014.ckpt.bad", "step-1.ckpt", "best-1.pt", "x"]
    for name in names + others:
        (tmp_path / name).touch()
    assert [one.name for one in find_checkpoints(tmp_path)] == [names[2], names[0], names[1]]


def tree():
    return {
        "model": {
            "conv": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
            "empty": torch.zeros(0),
            "scalar": torch.tensor(2.5),
            "count": torch.tensor(3),
            "mask": torch.tensor([True, False]),
            "gaps": torch.randn(6, 4)[:, :2],
        },
        "groups": [{"lr": 0.1, "params": [0, 1], "betas": (0.9, 0.99)}],
        "none": None,
    }


def test_copies_keep_values_and_strides():
    original = tree()
    copy = HostCopy().take(original)
    dense = original | {"model": original["model"] | {"gaps": original["model"]["gaps"].clone()}}
    assert kit.equal(copy, dense)
    original["model"]["conv"].fill_(7)
    original["groups"][0]["lr"] = 9
    assert copy["groups"][0]["lr"] == 0.1
    assert not (copy["model"]["conv"] == 7).any()


def test_memory_is_used_again():
    copier, first = HostCopy(), tree()
    before = copier.take(first)
    places = [before["model"][name].data_ptr() for name in ("conv", "count")]
    second = tree()
    after = copier.take(second)
    assert [after["model"][name].data_ptr() for name in ("conv", "count")] == places
    assert kit.equal(after["model"]["conv"], second["model"]["conv"])
    other = {"more": torch.ones(1000)}
    assert kit.equal(copier.take(other), other)


def test_no_two_tensors_share_a_place():
    tensors = {str(n): torch.full((n,), float(n)) for n in range(40)}
    copy = HostCopy().take(tensors)
    assert all((copy[str(n)] == n).all() for n in range(40))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found(value):
    copy = HostCopy().take(tree())
    assert all_finite(tensor for _, tensor in named_tensors(copy))
    copy["model"]["conv"][2, 1, 0, 1] = value
    assert not all_finite(tensor for _, tensor in named_tensors(copy))


def test_the_first_one_is_due_at_once_then_by_cost():
    now = [100.0]
    interval = Interval("auto", clock=lambda: now[0])
    assert interval.is_over()
    interval.restart()
    interval.set_cost(0.2)
    now[0] += 19.9
    assert not interval.is_over()
    now[0] += 0.2
    assert interval.is_over()
    interval.restart()
    interval.set_cost(1e-4)
    now[0] += SHORTEST_SECONDS - 0.1
    assert not interval.is_over()
    now[0] += 0.2
    assert interval.is_over()
    assert not interval.is_each_step


def test_a_fixed_time_does_not_ask_what_it_costs():
    now = [100.0]
    interval = Interval(60.0, clock=lambda: now[0])
    assert not interval.is_over()
    now[0] += 60
    assert interval.is_over()
    interval.restart()
    interval.set_cost(30.0)
    assert interval.seconds == 60
    each = Interval(0, clock=lambda: now[0])
    assert each.is_each_step
    each.restart()
    assert each.is_over()
