"""Memory runs out on one rank only: its share is cut, the others wait, all have the same result."""

from __future__ import annotations

import sys

import pytest
import torch

from runkey.errors import TRY_ELSEWHERE

pytestmark = pytest.mark.slow
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


@pytest.fixture
def ended(start, tmp_path):
    def run(mib: int):
        out = str(tmp_path / "out-%.pt")
        command = [sys.executable, "-m", "tests.support.ranks", "scarce", out, str(mib)]
        return start(command, 2, **MALLOC).end()

    return run


def test_ranks_agree_on_what_fits(ended, tmp_path):
    assert [code for code, _, _ in ended(140)] == [0, 0]
    first, second = (torch.load(tmp_path / f"out-{rank}.pt") for rank in range(2))
    assert first["splits"] == second["splits"] == [(4, 16, 16, 2 * 256)]
    for kind in ("gradients", "buffers"):
        assert all(torch.equal(t, second[kind][name]) for name, t in first[kind].items())


def test_one_image_that_does_not_fit_on_one_rank_ends_all(ended):
    for code, _, said in ended(20):
        assert code == TRY_ELSEWHERE
        assert said.splitlines()[-1].startswith(
            "error: rank 1 of 2: memory ran out with a single image, 2, of 16 x 16 pixels; "
        )
