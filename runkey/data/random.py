"""Random numbers as a pure function of (seed, epoch, purpose, image id); no state anywhere.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011), over whole arrays of image ids at once.  Nothing
has to be saved to resume, and nothing depends on workers, threads or the order of calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Purpose = Literal["order", "windows", "geometry", "colour"]

_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10


def philox(counters: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """The Philox4x32-10 bijection.

    Args:
        counters: [M, 4], each below 2^32.
        key: two words below 2^32.

    Returns:
        [M, 4] random words below 2^32.
    """
    c0, c1, c2, c3 = (counters[:, i] for i in range(4))
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _MASK, (p0 >> _HALF) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return np.stack((c0, c1, c2, c3), axis=1)


def uniforms(
    seed: int, epoch: int, purpose: Purpose, ids: Sequence[int], draws: int
) -> NDArray[np.float64]:
    """Independent uniform numbers in [0, 1), with 32 random bits each.

    Args:
        seed: the run's seed.
        epoch: from 0.
        purpose: what the numbers are for; each purpose has its own.
        ids: image ids (any integers; taken modulo 2^64).
        draws: numbers for each id.

    Returns:
        [len(ids), draws]; a row depends on its id alone, not on the other ids.
    """
    blocks = -(-draws // 4)
    wide = np.array([i & 0xFFFFFFFFFFFFFFFF for i in ids], dtype=np.uint64).repeat(blocks)
    block = np.tile(np.arange(blocks, dtype=np.uint64), len(ids))
    counters = np.stack((block, wide & _MASK, wide >> _HALF, np.zeros_like(block)), axis=1)
    words = philox(counters, _key(seed, epoch, purpose))
    return words.reshape(len(ids), blocks * 4)[:, :draws] / 2.0**32


def permutation(seed: int, epoch: int, purpose: Purpose, ids: Sequence[int]) -> list[int]:
    """Positions 0..len(ids)-1 in random order (each id's number is its own; ties by position)."""
    draws = uniforms(seed, epoch, purpose, ids, 1)[:, 0]
    return [int(i) for i in np.argsort(draws, kind="stable")]


def _key(seed: int, epoch: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
