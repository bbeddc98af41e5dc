"""One training step, operation by operation, with what the allocator was asked for meanwhile.

Real and fake steps give the same list, so a difference in their memory has the name of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runkey.data.batch import Window
from runkey.memory.trace.batch import synthetic_batch
from runkey.memory.trace.events import Pass
from runkey.memory.trace.record import Lent, Recorder
from runkey.memory.trace.scope import watching


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


def log_step(lent: Lent, window: Window) -> dict[str, Any]:
    """A step on a GPU: its operations, and the allocator's history."""
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=1_000_000)
    before = _allocations()
    operations = Operations()
    with operations:
        lent.step(window)
    torch.cuda.synchronize()
    snapshot = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    history = [
        (event["action"], event["size"], event["addr"]) for event in snapshot["device_traces"][0]
    ]
    return {"before": before, "operations": operations.rows, "history": history}


def log_fake_step(recorder: Recorder, passes: Sequence[Pass]) -> dict[str, Any]:
    """The same of a fake step: the operations, without a history."""
    content = recorder.content
    window = tuple(synthetic_batch(one, content.num_classes, content.colour) for one in passes)
    operations = Operations()
    with watching(recorder.scope), recorder.tracker, operations:
        recorder.lent.step(window)
    return {"operations": operations.rows}
