"""Device, mixed precision and seeds.

Randomness is a function of (seed, step): nothing about it has to be saved for a resume.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch.amp.grad_scaler import GradScaler

from runkey.errors import TrainingError
from runkey.units import counted


def choose_device(name: str, local_rank: int = 0) -> tuple[torch.device, str]:
    """Choose the device for `runtime.device` (a GPU with its index), and say why, for the log.

    The local rank, an index among this machine's processes, says which GPU to use. Raises
    TrainingError if cuda was asked for and torch sees no GPU, or fewer than processes.
    """
    # The allocator reads this once, when the GPU is first used. Padded shapes vary: without it, the
    # allocator reserves up to 30% more than the tensors take, in blocks of sizes that do not fit.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if name == "cpu":
        return torch.device("cpu"), "asked for"
    if torch.cuda.is_available():
        if local_rank:
            check_gpus(local_rank + 1)
            torch.cuda.set_device(local_rank)
        index = torch.cuda.current_device()
        reason = torch.cuda.get_device_name(index)
        return torch.device("cuda", index), reason if name == "auto" else f"asked for: {reason}"
    if name == "auto":
        return torch.device("cpu"), "torch sees no GPU"
    raise TrainingError(
        "params.yaml: runtime.device = cuda, but torch sees no GPU; set it to auto or cpu"
    )


def check_gpus(processes: int) -> None:
    """Raise TrainingError if GPUs are too few: NCCL cannot connect two processes on the same."""
    seen = torch.cuda.device_count()
    if processes > seen:
        raise TrainingError(
            f"{counted(processes, 'process')}, but torch sees {counted(seen, 'GPU')};"
            " set runtime.processes to auto"
        )


def keep_freed_memory() -> None:
    """Let the C library keep what a training step frees for the next step.

    By default glibc gives it back to the kernel, which fills every page with zeros when it is asked
    for again: 4 to 9% of a step's time on a CPU (benchmarks/results/step.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    mallopt(_TRIM_THRESHOLD, -1)
    mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)


# malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 2**30
"""Bytes; larger blocks are given back."""


_DTYPES = {"off": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Mixed precision: the autocast context, and the loss scaler that fp16 needs."""

    device: torch.device
    dtype: torch.dtype | None = None
    """None: fp32 throughout."""
    reason: str = ""
    """Why, in a few words, for the log."""
    tf32: bool = False
    """Whether a GPU may multiply fp32 numbers as TF32."""

    @property
    def name(self) -> str:
        """As in `training.precision`: off, tf32, bf16 or fp16."""
        names = (name for name, dtype in _DTYPES.items() if dtype is self.dtype)
        return "tf32" if self.tf32 else next(names)

    @cached_property
    def scaler(self) -> GradScaler | None:
        """For fp16 only: its smallest gradients would be zero without a factor on the loss."""
        return GradScaler(self.device.type) if self.dtype is torch.float16 else None

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of the forward pass."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def build_precision(precision: str, device: torch.device) -> Precision:
    """Choose the autocast dtype for `training.precision`: auto is bf16 where the GPU has it."""
    on_gpu = device.type == "cuda"
    # Ampere was the first with bf16 and TF32.
    has_bf16 = on_gpu and torch.cuda.get_device_capability(device)[0] >= 8
    if precision == "auto":
        if has_bf16:
            return Precision(device, torch.bfloat16, "auto: the GPU has bf16")
        if on_gpu:
            why = "the GPU has no bf16, and fp16 is only used when asked for"
        else:  # measured: a training step takes 1.1 to 2 times as long without AMX
            why = "mixed precision does not pay on a CPU"
        return Precision(device, None, f"auto: {why}")
    reason = "asked for"
    if precision == "fp16":
        reason += "; losses are scaled"
    elif precision == "bf16" and not has_bf16:
        slow = "the GPU only emulates it: slow"
        reason += f", though {slow if on_gpu else 'it is slower than fp32 on a CPU without AMX'}"
    elif precision == "tf32" and not has_bf16:
        reason += f", though the {'GPU' if on_gpu else 'CPU'} has no TF32: fp32"
    return Precision(device, _DTYPES[precision], reason, precision == "tf32" and has_bf16)


def derive_seed(*parts: int | str) -> int:
    """Hash any parts to a 63-bit seed; unlike a sum, other parts do not give the same one."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def configure_torch(
    seed: int,
    *,
    deterministic: bool,
    cpu_threads: int | Literal["auto"] = "auto",
    processes: int = 1,
) -> None:
    """Seed torch and set determinism and threads, before a model is built.

    `deterministic` allows only algorithms with reproducible results. `cpu_threads` do arithmetic on
    a CPU; auto: one per core, which the `processes` that train together share.
    """
    # cuBLAS reads this once, when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    allow_tf32(False)  # torch allows it for convolutions
    # Benchmarking picks kernels by their time on the day, and padded shapes vary from step to step.
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)
    # The deterministic mode would also fill every new tensor with NaN, a memory pass for nothing:
    # no operation of ours reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if cpu_threads != "auto":
        torch.set_num_threads(cpu_threads)
    elif processes > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    torch.manual_seed(derive_seed(seed, "init"))


def allow_tf32(allowed: bool) -> None:
    """Let GPUs round the factors of fp32 products to TF32, in this process, or not."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Make the noise of one optimizer step (dropout, denoising) a function of its arguments.

    The micro-batches of a step draw one after the other, so noise depends on the micro-batch size
    too; without dropout and denoising there is none.
    """
    torch.manual_seed(derive_seed(seed, "step", step, rank))


def draw_depth(layer_drop: float, layers: int, seed: int, step: int) -> int:
    """Draw how many of the decoder's layers run in a step, from the first on.

    With probability `layer_drop` it is uniform in 1 .. layers - 1, else all: LayerDrop (Fan et al.
    2020) that drops from the end, as nested dropout does (Rippel et al. 2014). A function of (seed,
    step): the same for all micro-batches and ranks, and torch's generator is left alone.
    """
    uniform = derive_seed(seed, "depth", step) / 2**63
    if uniform >= layer_drop:
        return layers
    return 1 + min(int(uniform / layer_drop * (layers - 1)), layers - 2)
