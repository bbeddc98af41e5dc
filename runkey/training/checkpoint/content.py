"""What a checkpoint holds, and whoever keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class Stateful(Protocol):
    """Model, average, optimizer, loss scaler: what has tensors of its own."""

    def state_dict(self) -> Mapping[str, Any]:
        """Its tensors and numbers; the tensors are its own, not copies."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Continue from what `state_dict` gave."""


@dataclass(frozen=True)
class Content:
    """A training at the boundary of a step."""

    step: int
    """Optimizer steps tried."""
    state: dict[str, Any]
    """`LoopState.as_plain()`."""
    parts: dict[str, Mapping[str, Any]]
    """State dicts by name: `model`, `optimizer`, ...; live tensors until it has been saved."""
    position: Mapping[str, int | str]
    """Where the log was, see `Tracker.position`."""
    best_weights: dict[str, Tensor]
    """State dict on the host of the best evaluation's weights; empty before the first one."""
    changes: str = ""
    """What is different now, such as `micro_batch 4 -> 2`; empty: training goes on bit for bit."""


class Checkpoints(Protocol):
    """Keeps checkpoints.  Saving never raises: training goes on without."""

    @property
    def path(self) -> Path | None:
        """The training's folder, where reports are written too; None: not in files."""
        ...

    @property
    def newest(self) -> int | None:
        """Step of the newest one that training could go on from; None: there is none."""
        ...

    def due(self, step: int) -> bool:
        """Whether one is to be saved at this boundary; cheap, asked after every step."""
        ...

    def save(self, content: Content, *, wait: bool = False, anchor: bool = False) -> None:
        """Copy the content and begin to write it; the caller may go on changing the tensors.

        Args:
            content: what to save.
            wait: return only when it is on disk.
            anchor: keep it as one that training may be rolled back to.
        """

    def load(self) -> Content | None:
        """The newest that is whole; None: there is none."""
        ...

    def load_anchor(self, step: int) -> Content | None:
        """The newest anchor at or before a step; None: there is none."""
        ...
