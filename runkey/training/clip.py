"""Gradient clipping by joint norm or by value, without a host sync."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ClipMode = Literal["norm", "value", "none"]


def joint_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a scalar on their device; NaN or inf if any holds one.

    Args:
        gradients: tensors of any shapes on one device, at least one.
    """
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


def clip_gradients(
    gradients: list[Tensor], mode: ClipMode, threshold: float
) -> tuple[Tensor, Tensor]:
    """Clip gradients in place.

    Args:
        gradients: tensors of any shapes on one device, unscaled.
        mode: norm scales all by one factor, so that the joint 2-norm is at most `threshold`
            (Pascanu et al. 2013); value clamps each element to +-`threshold`; none changes nothing.
        threshold: largest norm, or largest absolute value.

    Returns:
        The joint norm before and after, scalars on the gradients' device.
    """
    before = joint_norm(gradients)
    if mode == "norm":
        # 1e-6 as in torch: a norm at the threshold is never multiplied by more than 1.
        factor = (threshold / (before + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)
        return before, before * factor
    if mode == "value":
        torch._foreach_clamp_min_(gradients, -threshold)
        torch._foreach_clamp_max_(gradients, threshold)
        return before, joint_norm(gradients)
    return before, before
