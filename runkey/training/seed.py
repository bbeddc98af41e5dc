"""Randomness as a function of (seed, step): nothing about it has to be saved for a resume."""

from __future__ import annotations

import hashlib
import os
import struct
from typing import Literal

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts: unlike sums, other parts never give the same one by design."""
    text = "/".join(str(part) for part in parts).encode()
    (value,) = struct.unpack("<Q", hashlib.blake2b(text, digest_size=8).digest())
    return int(value) >> 1


def set_up(
    seed: int,
    *,
    deterministic: bool,
    cpu_threads: int | Literal["auto"] = "auto",
    processes: int = 1,
) -> None:
    """Seed torch and settle which kernels may be used, before a model is built.

    Args:
        seed: start of the initial weights.
        cpu_threads: threads of arithmetic on a CPU; auto: torch's choice, one per core.
        deterministic: only algorithms whose result is the same each time.  An operation that has
            none raises.
        processes: how many train together; they share the cores.
    """
    # cuBLAS reads this once, when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Benchmarking picks kernels by their time on the day, and padded shapes vary from step to step.
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)
    # The deterministic mode would also fill every new tensor with NaN: a memory pass for nothing,
    # since no operation of ours reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if cpu_threads != "auto":
        torch.set_num_threads(cpu_threads)
    elif processes > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    torch.manual_seed(derive_seed(seed, "init"))


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Make the noise of one optimizer step (dropout, denoising) a function of its arguments.

    The micro-batches of a window draw one after the other, so noise depends on the micro-batch
    size too; without dropout and denoising there is none.
    """
    torch.manual_seed(derive_seed(seed, "step", step, rank))
