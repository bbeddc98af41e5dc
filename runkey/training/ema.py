"""Moving average of the weights (Polyak and Juditsky 1992): evaluated and kept in their place."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """An averaged copy of a module: average += (1 - decay) * (weights - average).

    The decay grows as (1 + n) / (10 + n) with the n updates so far, up to `decay`: a short training
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

    def current_decay(self) -> float:
        """The decay of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the module's present weights, without a host sync."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.current_decay())
        for average, weight in self._copies:
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
