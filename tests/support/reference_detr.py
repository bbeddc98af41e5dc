"""Shared by the model's tests: weights from a formula, made-up targets, the reference DETR."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.reference import Reference, open_reference
from runkey import params
from runkey.model.matcher import Targets

ROOT = Path(__file__).resolve().parents[2]


def fill_by_formula(module: nn.Module) -> None:
    """Weights that any machine makes alike: sines, scaled by the fan-in.

    The parameter's place in the list is its phase, so no two are equal.
    """
    state = module.state_dict()
    for phase, (name, tensor) in enumerate(sorted(state.items())):
        if not tensor.is_floating_point():
            continue
        count = torch.arange(tensor.numel(), dtype=torch.float64)
        wave = (count * 12.9898 + phase * 78.233).sin().view(tensor.shape)
        if name.endswith("running_var"):
            value = 1 + 0.5 * wave
        elif tensor.dim() > 1:
            value = wave * (2.0 / tensor[0].numel()) ** 0.5
        elif name.endswith("weight"):
            value = 1 + 0.1 * wave
        else:
            value = 0.1 * wave
        state[name] = value.to(tensor.dtype)
    module.load_state_dict(state)


def images_by_formula(batch: int, height: int, width: int) -> torch.Tensor:
    """float64 [batch, 3, height, width] in about -2..2."""
    count = torch.arange(batch * 3 * height * width, dtype=torch.float64)
    smooth = (count / 7).sin() + (count / width / 5).cos()
    return (smooth + (count * 12.9898).sin() / 2).view(batch, 3, height, width)


def targets_by_formula(counts: tuple[int, ...], num_classes: int) -> Targets:
    """Boxes of different places and sizes, float64."""
    n = torch.arange(sum(counts), dtype=torch.float64)
    centre = 0.5 + 0.3 * torch.stack(((n * 2.1).sin(), (n * 1.3).cos()), 1)
    size = 0.15 + 0.1 * torch.stack(((n * 0.7).cos(), (n * 1.7).sin()), 1)
    return Targets(torch.cat((centre, size), 1), (n * 5).long() % num_classes, counts)


@pytest.fixture
def formula() -> Namespace:
    return Namespace(fill=fill_by_formula, images=images_by_formula, targets=targets_by_formula)


def small_detr(**changes: object) -> params.Model:
    """Preset detr, small, as the reference builds it: frozen norms, stem and layer1 frozen."""
    values = {
        "preset": "detr",
        "backbone": "resnet18",
        "norm": "frozen",
        "frozen_stages": 2,
        "hidden_dim": 32,
        "num_heads": 4,
        "feedforward_dim": 48,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "num_queries": 12,
        "loss": {"classification": 1.0, "l1": 5.0, "giou": 2.0},
    }
    return params.Model.model_validate(values | changes)


@pytest.fixture
def detr_params():
    return small_detr


def _reference_repository() -> Path | None:
    """`make reference` clones it; RUNKEY_DETR_REFERENCE names a clone or a mirror elsewhere."""
    path = Path(os.environ.get("RUNKEY_DETR_REFERENCE") or ROOT / ".reference" / "detr")
    return path if path.exists() else None


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The reference implementation, checked out of a clone or a mirror."""
    repository = _reference_repository()
    if repository is None:
        pytest.skip("needs the reference DETR: `make reference`, or set RUNKEY_DETR_REFERENCE")
    return open_reference(repository, tmp_path_factory.mktemp("reference"))
