"""AdamW over groups of parameters, each with its own rate and decay."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from runkey import params
from runkey.errors import TrainingError

_BACKBONE = "backbone."


def build_optimizer(module: nn.Module, section: params.Optimizer, lr: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) for the parameters of `module` that are to be trained.

    Groups are named `backbone` or `rest`, with `/no_decay` for biases and norm weights if those
    are to have none.  Each keeps its peak rate as `base_lr`; `set_rates` scales it.  A factor of 0
    for the backbone's rate freezes it: its parameters no longer require gradients after this.

    Args:
        module: its backbone is what `backbone.` begins the names of.
        section: the optimizer's parameters.
        lr: peak rate, per step.

    Raises:
        TrainingError: nothing is left to train.
    """
    if section.backbone_lr_factor == 0:
        for name, parameter in module.named_parameters():
            if name.startswith(_BACKBONE):
                parameter.requires_grad_(False)
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            group = "backbone" if name.startswith(_BACKBONE) else "rest"
            if parameter.ndim < 2 and not section.decay_norm_and_bias:
                group += "/no_decay"
            groups.setdefault(group, []).append(parameter)
    if not groups:
        raise TrainingError("params.yaml: every parameter of the model is frozen; nothing to train")
    return torch.optim.AdamW(
        [
            {
                "name": name,
                "params": parameters,
                "base_lr": lr * (section.backbone_lr_factor if "backbone" in name else 1.0),
                "weight_decay": 0.0 if name.endswith("/no_decay") else section.weight_decay,
            }
            for name, parameters in sorted(groups.items())
        ],
        lr=lr,
        betas=(section.beta1, section.beta2),
        fused=True,
    )


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its peak rate times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def trained_parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The parameters of all groups."""
    for group in optimizer.param_groups:
        yield from group["params"]


def guarded_step(optimizer: torch.optim.AdamW, skip: Tensor) -> None:
    """One step, or none at all where `skip` is 1, decided on the device without a host sync.

    A skipped step leaves parameters, moments and step counters as they were, bit for bit: the
    fused kernel has this for loss scaling, and reads it from an attribute.

    Args:
        optimizer: a fused AdamW.
        skip: float scalar on the parameters' device, 0 or 1.
    """
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
