"""What of a GPU decides about memory: which kernels run, and what they take for themselves."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

KIB, MIB = 2**10, 2**20

# Multiprocessors of a common GPU, and threads of each, by compute capability.
_COMMON = {
    (6, 0): (56, 2048),  # P100
    (6, 1): (20, 2048),  # GTX 1080
    (7, 0): (80, 2048),  # V100
    (7, 5): (40, 1024),  # T4
    (8, 0): (108, 2048),  # A100
    (8, 6): (72, 1536),  # A10
    (8, 9): (128, 1536),  # RTX 4090; L4 has 58
    (9, 0): (132, 2048),  # H100, H200
    (10, 0): (148, 2048),  # B200
    (12, 0): (170, 1536),  # RTX 5090
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU and its libraries."""

    capability: tuple[int, int]
    """Compute capability: 7.0 V100, 7.5 T4, 8.0 A100, 8.6 A10, 8.9 L4, 9.0 H100, 10.0 B200."""
    cudnn: int
    """Version of cuDNN as torch tells it, such as 91002."""
    multiprocessors: int = 0
    """0: as many as a common GPU of its capability has."""

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bf16 (Ampere and later)."""
        return self.capability >= (8, 0)

    @property
    def sms(self) -> int:
        """Multiprocessors."""
        return self.multiprocessors or self._common()[0]

    @property
    def threads_per_sm(self) -> int:
        """Threads that a multiprocessor runs at once."""
        return self._common()[1]

    def cublas_workspace(self) -> int:
        """Bytes that cuBLAS keeps for each thread that uses it.

        `CUBLAS_WORKSPACE_CONFIG` decides (`runkey.training.seed.set_up` sets 8 times 4 MiB);
        without it torch takes 32 MiB on Hopper and later, 8 MiB and 128 KiB before.
        """
        chosen = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
        pairs = re.findall(r":(\d+):(\d+)", chosen)
        if pairs:
            return sum(int(size) * KIB * int(count) for size, count in pairs)
        return 32 * MIB if self.capability >= (9, 0) else 8 * MIB + 128 * KIB

    def _common(self) -> tuple[int, int]:
        known = [one for one in _COMMON if one <= self.capability]
        return _COMMON[max(known, default=(6, 0))]


def present_gpu() -> Gpu:
    """The GPU that torch would use; torch must see one."""
    properties = torch.cuda.get_device_properties(0)
    return Gpu(
        (properties.major, properties.minor),
        torch.backends.cudnn.version() or 0,  # type: ignore[no-untyped-call]
        properties.multi_processor_count,
    )
