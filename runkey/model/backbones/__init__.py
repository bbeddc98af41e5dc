"""Bodies: the networks that turn images into features, each under the name that params.yaml uses.

    spec = spec_of("lite0")                    # strides, channels, normalisation, ...
    backbone = build_backbone(params.model)    # with random weights

The rest of the code reads a body's `BodySpec` and never asks which body it is. To add one: a file
in this folder with `build` and `rename`, its lines in `_SPECS` and `_file_of`, and a test. No torch
is imported before one is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runkey import params
from runkey.errors import ParamsError

if TYPE_CHECKING:
    from torch import Tensor

    from runkey.model.backbones.layers import Backbone

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5)

Rgb = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class BodySpec:
    """What the rest of the code needs to know of a body."""

    name: str
    stages: int
    """What `model.frozen_stages` counts: the stem and the stages after it."""
    strides: tuple[int, ...]
    """Pixels from cell to cell of each feature level, finest first."""
    channels: tuple[int, ...]
    """Of each feature level."""
    default_stride: int
    """Stride of the level that `model.feature_strides: auto` takes."""
    mean: Rgb = IMAGENET_MEAN
    """Mean of RGB in 0..1 that images are normalised with."""
    std: Rgb = IMAGENET_STD
    """Standard deviation of RGB in 0..1 that images are normalised with."""
    norm_eps: float = 1e-5
    """Epsilon of the norms."""
    pad_multiple: int = 1
    """Images are padded to multiples of so many pixels; 1: not at all."""
    dilates: bool = False
    """Whether `model.dilation` can replace the last stride."""


_RESNET: dict[str, Any] = {
    "stages": 5,
    "strides": (4, 8, 16, 32),
    "default_stride": 32,
}
_WIDE: dict[str, Any] = {"channels": (256, 512, 1024, 2048), "dilates": True}
_SPECS: dict[str, tuple[str, BodySpec]] = {
    spec.name: (file, spec)
    for file, spec in (
        ("compact", BodySpec("compact", 3, (4, 8), (32, 96), 8)),
        ("resnet", BodySpec("resnet18", channels=(64, 128, 256, 512), **_RESNET)),
        ("resnet", BodySpec("resnet34", channels=(64, 128, 256, 512), **_RESNET)),
        ("resnet", BodySpec("resnet50", **_WIDE, **_RESNET)),
        ("resnet", BodySpec("resnet101", **_WIDE, **_RESNET)),
        (
            "lite",
            BodySpec(
                name="lite0",
                stages=8,
                strides=(4, 8, 16, 32),
                channels=(24, 40, 112, 320),
                default_stride=16,
                mean=_HALF,
                std=_HALF,
                norm_eps=1e-3,
                # TF's SAME padding depends on whether a side is even: here every one is.
                pad_multiple=32,
            ),
        ),
    )
}
"""The file of each body, and its spec."""


def spec_of(name: str) -> BodySpec:
    """Return the spec of a body by its name in params.yaml.

    Raises:
        ParamsError: there is no such body.
    """
    if name.startswith("timm:"):
        spec: BodySpec = _file_of(name).spec_of(name)
        return spec
    if name not in _SPECS:
        known = ", ".join(_SPECS)
        raise ParamsError(f"model.backbone = '{name}': should be {known} or timm:NAME")
    return _SPECS[name][1]


def levels_of(model: params.Model) -> list[int]:
    """Return the positions in `BodySpec.strides` of the levels that a model uses.

    Raises:
        ParamsError: the body has no level of a stride in `model.feature_strides`.
    """
    spec = spec_of(model.backbone)
    if model.feature_strides == "auto":
        return [spec.strides.index(spec.default_stride)]
    # Of two levels of one stride, which dilation makes, the later one.
    positions = {stride: level for level, stride in enumerate(_all_strides(model, spec))}
    if missing := [stride for stride in model.feature_strides if stride not in positions]:
        raise ParamsError(
            f"model.feature_strides = {list(model.feature_strides)}: backbone {spec.name} has no"
            f" {missing[0]}, but {', '.join(map(str, positions))}"
        )
    return [positions[stride] for stride in model.feature_strides]


def strides_of(model: params.Model) -> tuple[int, ...]:
    """Return the pixels from token to token of each level that a model uses, finest first.

    Raises:
        ParamsError: see `levels_of`.
    """
    every = _all_strides(model, spec_of(model.backbone))
    return tuple(every[level] for level in levels_of(model))


def _all_strides(model: params.Model, spec: BodySpec) -> tuple[int, ...]:
    if not model.dilation:
        return spec.strides
    return (*spec.strides[:-1], spec.strides[-1] // 2)


def check(model: params.Model) -> None:
    """Check that the body has what the parameters ask of it.

    Raises:
        ParamsError: there is no such body, or it has no such thing.
    """
    spec = spec_of(model.backbone)
    levels_of(model)
    if model.frozen_stages > spec.stages:
        raise ParamsError(
            f"model.frozen_stages = {model.frozen_stages}: backbone {spec.name} has {spec.stages}"
        )
    if model.dilation and not spec.dilates:
        some = " or ".join(name for name, (_, one) in _SPECS.items() if one.dilates)
        raise ParamsError(f"model.dilation = true: needs {some}, not {spec.name}")


def build_backbone(model: params.Model) -> Backbone:
    """Build the backbone that section `model` names, with random weights.

    Raises:
        ParamsError: see `check`.
    """
    check(model)
    built: Backbone = _file_of(model.backbone).build(model, spec_of(model.backbone))
    return built


def rename(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return published weights of a body under the names of its parameters, without classifiers."""
    renamed: dict[str, Tensor] = _file_of(name).rename(state)
    return renamed


def _file_of(name: str) -> Any:
    """Return the module of a body."""
    # Imported here, as they import torch; by name, as the key follows imports.
    from runkey.model.backbones import compact, lite, resnet, timm

    files = {"compact": compact, "lite": lite, "resnet": resnet}
    return timm if name.startswith("timm:") else files[_SPECS[name][0]]
