"""Batch norm's running statistics: put back where the step that changed them does not count.

Ranks make them equal after each window.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from runkey.training.distributed import World


class RunningStatistics:
    """The buffers that a module's forward pass changes in training.

    A forward pass poisons them before anyone knows that its loss is not finite, and unlike the
    optimizer's update this cannot be left out afterwards.
    """

    def __init__(self, module: nn.Module) -> None:
        """Find them in `module`, which is on its device already."""
        by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for part in module.modules():
            if isinstance(part, _NormBase) and part.track_running_stats:
                for buffer in part.buffers(recurse=False):
                    by_dtype[buffer.dtype].append(buffer)
        self._groups = list(by_dtype.values())

    def copy(self) -> list[Tensor]:
        """Their present values, one flat tensor for each dtype."""
        return [_joined(group) for group in self._groups]

    @torch.no_grad()
    def restore(self, saved: list[Tensor], where: Tensor) -> None:
        """Put back, bit for bit, what `copy` gave, where `where` is not 0; without a host sync.

        Args:
            saved: from `copy`.
            where: float scalar on the device, 0 or 1.
        """
        for group, before in zip(self._groups, saved, strict=True):
            # A few kernels for all buffers, not one for each of a hundred.
            _write(group, torch.where(where > 0, before, _joined(group)))

    @torch.no_grad()
    def average(self, world: World) -> None:
        """Give all ranks the mean of their statistics, and rank 0's number of batches.

        Each rank has moved them by the images of its own share, as each micro-batch does in one
        process.  The mean is the same bits everywhere.
        """
        if world.size == 1:
            return
        for group in self._groups:
            joined = _joined(group)
            if joined.is_floating_point():
                world.add_up(joined)
                joined /= world.size
            else:
                joined *= world.is_main
                world.add_up(joined)
            _write(group, joined)


def _write(tensors: list[Tensor], joined: Tensor) -> None:
    """The way back from `_joined`."""
    parts = torch.split(joined, [tensor.numel() for tensor in tensors])
    views = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, views)


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
