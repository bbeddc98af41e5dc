"""Philox against its published answers, and what draws may depend on."""

from __future__ import annotations

import numpy as np
import pytest

from runkey.data.augment import permutation, philox, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        (0x0, 0x0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, 0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_known_answers_of_random123(counter, key, answer):
    words = philox(np.full((1, 4), counter, dtype=np.uint64), (key, key))
    assert tuple(words[0].tolist()) == answer


def test_a_row_depends_on_its_id_alone():
    ids = [7, 0, -3, 2**40 + 7, 2**64 + 1]
    together = uniforms(5, 2, "geometry", ids, 9)
    alone = np.concatenate([uniforms(5, 2, "geometry", [i], 9) for i in ids])
    assert np.array_equal(together, alone)
    assert len({row.tobytes() for row in together}) == len(ids)


def test_seed_epoch_and_purpose_each_change_everything():
    first = uniforms(5, 2, "geometry", range(50), 4)
    for other in ((6, 2, "geometry"), (5, 3, "geometry"), (5, 2, "colour")):
        assert not np.any(uniforms(*other, range(50), 4) == first)


def test_uniform_and_uncorrelated():
    draws = uniforms(0, 0, "geometry", range(50_000), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    histogram = np.histogram(draws, bins=20, range=(0, 1))[0] / draws.size
    assert np.abs(histogram - 0.05).max() < 0.002
    correlation = np.corrcoef(np.concatenate([draws, np.roll(draws, 1, axis=0)], axis=1).T)
    assert np.abs(correlation - np.eye(8)).max() < 0.02


def test_permutation_is_one():
    order = permutation(3, 1, "order", range(1000)).tolist()
    assert sorted(order) == list(range(1000))
    assert order != list(range(1000))
    assert order != permutation(3, 2, "order", range(1000)).tolist()
    assert permutation(3, 1, "order", []).tolist() == []
