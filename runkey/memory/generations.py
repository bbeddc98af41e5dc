"""What a GPU's libraries add to the tensors of a step: bands, by generation.

Measured where the source says so; else the widest of what is known elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from runkey.memory.line import MIB


@dataclass(frozen=True, slots=True)
class Generation:
    """GPUs of one architecture."""

    name: str
    capability: tuple[int, int]
    """The least compute capability of it."""
    context_bytes: tuple[int, int]
    """Least and most that a process takes beside the allocator: the CUDA context, the handles of
    cuBLAS and cuDNN, and their kernels, which are loaded when they are first used."""
    has_bf16: bool
    source: str


WORKSPACE_SHARE = 1.0
"""Most that a convolution takes as workspace, as a part of its result: on an H200, some in float32
were seen to copy their input to another memory format.  A workspace is there while one operation
runs, and the peak is at the end of the forward pass, where results are small."""

MODEL_ERROR = 0.01
"""Most that tensors and workspaces were measured to take beyond the prediction, as a part of it:
0.95% of 105 MiB, else 0.39%, in 70 trainings on the H200 below."""

_NOT_MEASURED = "not measured; maskrcnn-benchmark#182 reports up to 1 GB"
_H200 = (
    "measured: 707 to 723 MiB over 70 trainings (benchmarks/results/gpu/gpu_memory.json), NVIDIA "
    "H200, driver 580.159.04, torch 2.11.0+cu130"
)

GENERATIONS = (
    Generation("Maxwell or older", (0, 0), (300 * MIB, 1024 * MIB), False, _NOT_MEASURED),
    Generation("Pascal", (6, 0), (300 * MIB, 1024 * MIB), False, _NOT_MEASURED),
    Generation("Volta, Turing", (7, 0), (300 * MIB, 1024 * MIB), False, _NOT_MEASURED),
    Generation("Ampere, Ada", (8, 0), (300 * MIB, 1024 * MIB), True, _NOT_MEASURED),
    Generation("Hopper", (9, 0), (700 * MIB, 800 * MIB), True, _H200),
    Generation("Blackwell", (10, 0), (300 * MIB, 1024 * MIB), True, _NOT_MEASURED),
)


def generation_of(capability: tuple[int, int]) -> Generation:
    """The generation of a compute capability, such as (9, 0)."""
    return [one for one in GENERATIONS if one.capability <= capability][-1]
