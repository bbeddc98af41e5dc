"""Where the numbers of a step stop being finite."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from runkey.training.debug.tensors import TensorNumbers
from runkey.training.guard.report import json_safe

Where = Literal["weights", "image", "targets", "forward", "loss", "backward", "nowhere"]

_HEADLINES = {
    "weights": "the weights were not finite before this step: {module}",
    "image": "the input is not finite before the model sees it",
    "targets": "the true boxes are not what they should be",
    "forward": "forward pass: {module} ({kind}) takes finite numbers and gives others",
    "loss": "the loss: predictions and targets are finite, {module} is not",
    "backward": "backward pass: {module} ({kind}) takes finite gradients and gives others",
    "nowhere": "everything in this step is finite",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """The first place at which something that is not finite came out of finite numbers."""

    where: Where
    module: str = ""
    """Its name in the model; of the loss, its parts; of the weights, the tensor."""
    kind: str = ""
    """Its class."""
    micro_batch: int | None = None
    """Which of the window's, from 1; None: all the same."""
    image_ids: tuple[int, ...] = ()
    """COCO ids of that micro-batch, or of the images in it that are concerned."""
    tensors: dict[str, TensorNumbers] = field(default_factory=dict)
    """What went in, what came out, the module's own."""

    def lines(self) -> list[str]:
        """In words: the place first, then the numbers."""
        head = _HEADLINES[self.where].format(module=self.module or "the model", kind=self.kind)
        lines = [head]
        if self.micro_batch is not None:
            ids = ", ".join(map(str, self.image_ids))
            lines.append(f"  micro-batch {self.micro_batch}, images {ids}")
        width = max(map(len, self.tensors), default=0)
        return lines + [f"  {name:<{width}}  {numbers}" for name, numbers in self.tensors.items()]

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        plain: dict[str, Any] = json_safe(asdict(self))
        return plain
