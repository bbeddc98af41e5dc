"""Moving average of the weights (Polyak and Juditsky 1992): evaluated and kept in their place."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

# Tensors begin at multiples of this many elements, as they would on their own.
_ALIGNMENT = 64


class Ema:
    """An averaged copy of a module: average += (1 - decay) * (weights - average).

    The decay grows as (1 + n) / (10 + n) with the n steps so far, up to `decay`: a short training
    is not averaged with its random start.  Floating buffers (batch norm's statistics) are averaged
    in the same way, others copied.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start from a copy of `module` as it is."""
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0
        pairs = [
            (average, weight)
            for average, weight in zip(_tensors(self.module), _tensors(module), strict=True)
            # A frozen weight never moves, so neither does its average.
            if not isinstance(weight, nn.Parameter) or weight.requires_grad
        ]
        self._averages = [average for average, _ in pairs if average.is_floating_point()]
        self._weights = [weight for average, weight in pairs if average.is_floating_point()]
        self._copies = [pair for pair in pairs if not pair[0].is_floating_point()]
        dtypes = dict.fromkeys(average.dtype for average in self._averages)
        self._flat = [
            _lay_out([average for average in self._averages if average.dtype == dtype])
            for dtype in dtypes
        ]

    def current_decay(self) -> float:
        """The decay of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Take one step towards the module's present weights, without a host sync.

        Args:
            skipped: float scalar on the device; where it is 1, the optimizer's step was skipped,
                and the averages stay as they are, bit for bit.  The decay's n counts it all the
                same: the host does not know yet.
        """
        before = [flat.clone() for flat in self._flat]
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.current_decay())
        for flat, old in zip(self._flat, before, strict=True):
            torch.where(skipped > 0, old, flat, out=flat)
        for average, weight in self._copies:  # put back already where the step was skipped
            average.copy_(weight)
        self.updates += 1

    def state_dict(self) -> dict[str, object]:
        """The averaged tensors and the number of updates."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from what `state_dict` gave."""
        self.module.load_state_dict(state["module"])  # type: ignore[arg-type]
        self.updates = int(state["updates"])  # type: ignore[call-overload]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _lay_out(tensors: list[Tensor]) -> Tensor:
    """Move tensors of one dtype into one flat tensor, which can be copied in one go.

    Shapes, strides and values stay; so does the order of arithmetic on each of them.
    """
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT
    flat = tensors[0].new_zeros(end)
    for start, tensor in zip(starts, tensors, strict=True):
        place = torch.as_strided(flat, tensor.shape, _dense_stride(tensor), start)
        place.copy_(tensor)
        tensor.data = place
    return flat


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a copy without gaps, in the same memory format."""
    return torch.empty_like(tensor).stride()
