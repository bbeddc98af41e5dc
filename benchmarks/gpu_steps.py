"""One training step, operation by operation, with what the allocator was asked for meanwhile.

Real and fake steps give the same list, so a difference in their memory has the name of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runkey.data.dataset import GlobalBatch
from runkey.memory.template import Allocator, Block
from runkey.memory.trace.events import MicroBatch
from runkey.memory.trace.record import BuiltStep, Recorder, synthetic_batch

History = tuple[str, int, int]
"""What the allocator did, bytes, address."""


class Operations(TorchDispatchMode):
    """Lists operations: name, bytes of each result's storage, allocations so far."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, list[int], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it and write it down."""
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else [out]
        sizes = [
            one.untyped_storage().nbytes()
            for one in results
            if isinstance(one, Tensor) and one.device.type == "cuda"
        ]
        self.rows.append((str(func), sizes, _allocations()))
        return out


def _allocations() -> int:
    """How many allocations the process has made; 0 without a GPU."""
    if not torch.cuda.is_initialized():
        return 0
    count: int = torch._C._cuda_memoryStats(0)["allocation"]["all"]["allocated"]
    return count


def log_step(built: BuiltStep, window: GlobalBatch) -> dict[str, Any]:
    """A step on a GPU: its operations, and the allocator's history."""
    start_history()
    before = _allocations()
    operations = Operations()
    with operations:
        built.step(window)
    return {"before": before, "operations": operations.rows, "history": end_history()}


def start_history() -> None:
    """Let the allocator write down what it does from here on."""
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=1_000_000)


def end_history() -> list[History]:
    """What it did."""
    torch.cuda.synchronize()
    (events,) = torch.cuda.memory._snapshot()["device_traces"]
    torch.cuda.memory._record_memory_history(enabled=None)
    return [(event["action"], event["size"], event["addr"]) for event in events]


def replayed(history: list[History]) -> dict[str, Any]:
    """The requests of a history from an empty cache, put to the model of the allocator.

    Torch has expandable segments, so every block's place in its segment can be compared.

    Returns:
        How many requests there were, how many of them the model put elsewhere and which was the
        first; and the model's peaks.
    """
    allocator = Allocator()
    blocks: dict[int, Block] = {}
    starts: dict[int, int] = {}
    requests, elsewhere, first = 0, 0, None
    for action, size, address in history:
        if action == "alloc":
            block = blocks[address] = allocator.allocate(size)
            segment = allocator.segment(block.size)
            start = starts.setdefault(segment.page, address - block.address)
            requests += 1
            if address - start != block.address:
                elsewhere += 1
                first = first or {"request": requests, "bytes": size}
        elif action == "free_completed" and address in blocks:
            allocator.release(blocks.pop(address))
    return {
        "requests": requests,
        "elsewhere": elsewhere,
        "first_elsewhere": first,
        "allocated": allocator.max_allocated,
        "reserved": allocator.reserved,
    }


def log_fake_step(recorder: Recorder, passes: Sequence[MicroBatch]) -> dict[str, Any]:
    """The same of a fake step: the operations, without a history."""
    window = tuple(synthetic_batch(one, recorder.fields) for one in passes)
    operations = Operations()
    with recorder.watching(), operations:
        recorder.built.step(window)
    return {"operations": operations.rows}
