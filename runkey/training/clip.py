"""Gradient clipping by joint norm or by value, without a host sync."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from runkey import params

# In a history's places without a norm yet.  Not NaN: what a checkpoint holds is finite.
_NO_NORM = -1.0

ClipMode = Literal["norm", "value", "percentile", "none"]


@dataclass(frozen=True, slots=True)
class Clipped:
    """What clipping saw and did: scalars on the gradients' device."""

    before: Tensor
    """Joint 2-norm before."""
    after: Tensor
    """Joint 2-norm after."""
    threshold: Tensor | None
    """Largest norm that was let through; None: norms are not what is clipped."""


class Clipper:
    """Clips each step's gradients; percentile remembers past norms.

    norm scales all gradients by one factor, so that the joint 2-norm is at most `threshold`
    (Pascanu et al. 2013).  percentile is the same with a percentile of the last norms, this step's
    included, in the threshold's place (AutoClip, Seetharaman et al. 2020).  value clamps each
    element to +-`threshold`; none changes nothing.
    """

    def __init__(self, section: params.Clip, device: torch.device) -> None:
        """Start without a history."""
        self.mode: ClipMode = section.mode
        self._limit = section.threshold
        self._part = section.percentile / 100
        length = section.history if section.mode == "percentile" else 0
        self._norms = torch.full((length,), _NO_NORM, device=device)

    def clip(self, gradients: list[Tensor]) -> Clipped:
        """Clip in place, once per optimizer step.

        Args:
            gradients: tensors of any shapes on one device, at least one; unscaled.
        """
        before = joint_norm(gradients)
        match self.mode:
            case "norm":
                limit = torch.full_like(before, self._limit)
                return Clipped(before, scale_to(gradients, before, self._limit), limit)
            case "percentile":
                limit = self._percentile_with(before)
                return Clipped(before, scale_to(gradients, before, limit), limit)
            case "value":
                torch._foreach_clamp_min_(gradients, -self._limit)
                torch._foreach_clamp_max_(gradients, self._limit)
                return Clipped(before, joint_norm(gradients), None)
        return Clipped(before, before, None)

    def _percentile_with(self, norm: Tensor) -> Tensor:
        """Take a norm into the history, unless it is not finite; the percentile of the history."""
        longer = torch.cat((self._norms[1:], norm.to(self._norms.dtype)[None]))
        self._norms = torch.where(norm.isfinite(), longer, self._norms)
        known = torch.where(self._norms >= 0, self._norms, torch.nan)
        return torch.nanquantile(known, self._part)

    def state_dict(self) -> dict[str, Tensor]:
        """`norms` [history], the latest last, -1 where there is none yet; empty if not needed."""
        return {"norms": self._norms}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave."""
        self._norms = state["norms"].to(self._norms.device, copy=True)


def joint_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a scalar on their device; NaN or inf if any holds one.

    Args:
        gradients: tensors of any shapes on one device, at least one.
    """
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


def scale_to(gradients: list[Tensor], norm: Tensor, limit: float | Tensor) -> Tensor:
    """Scale gradients in place so that their joint norm is at most `limit`.

    Args:
        gradients: tensors of any shapes on one device.
        norm: their joint norm.
        limit: positive.

    Returns:
        The joint norm after.
    """
    # 1e-6 as in torch: a norm at the limit is never multiplied by more than 1.
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor)
    return norm * factor
