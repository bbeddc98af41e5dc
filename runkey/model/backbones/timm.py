"""Any network of timm that gives feature maps, such as `timm:convnext_atto` (Wightman 2019).

timm is imported where it is used, so models with other bodies do without. Parameters have timm's
names under `model.`.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from runkey import params
from runkey.errors import ParamsError
from runkey.model.backbones import BodySpec, layers, levels_of, strides_of

PREFIX = "timm:"
_DEFAULT_STRIDE = 16


def _create(name: str) -> Any:
    """Build a network that returns feature maps of any image size.

    Raises:
        ParamsError: timm is not installed, or has no such network.
    """
    try:
        import timm
    except ImportError:
        raise ParamsError(
            f"model.backbone = '{name}': timm is not installed; run `make env`, or elsewhere"
            " `pip install timm`"
        ) from None
    plain = name.removeprefix(PREFIX)
    if not timm.is_model(plain):
        close = difflib.get_close_matches(plain, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ParamsError(f"model.backbone = '{name}': timm {timm.__version__} lacks it{hint}")
    options: dict[str, Any] = {"pretrained": False, "features_only": True, "feature_cls": "getter"}
    config = timm.get_pretrained_cfg(plain)
    sizes: list[dict[str, Any]] = [{}]
    if config is not None and config.fixed_input_size:  # position tables that can be resized
        sizes = [{"dynamic_img_size": True}, {"strict_img_size": False}]
    for size in sizes:
        try:
            net = timm.create_model(plain, **options, **size)
        except (TypeError, RuntimeError, AttributeError):
            continue
        if hasattr(net.model, "forward_intermediates"):
            return net
    raise ParamsError(
        f"model.backbone = '{name}': gives no feature maps for images of any size; take another"
        " network of timm, such as timm:convnext_atto"
    )


@lru_cache(maxsize=8)
def spec_of(name: str) -> BodySpec:
    """Return what timm says of a network. Of several levels of one stride, the last one counts.

    Raises:
        ParamsError: timm is not installed, or has no such network.
    """
    levels = _levels(_template(name))
    import timm

    config = timm.get_pretrained_cfg(name.removeprefix(PREFIX))
    strides = tuple(sorted(levels))
    normalisation: dict[str, Any] = (
        {} if config is None else {"mean": config.mean, "std": config.std}
    )
    return BodySpec(
        name=name,
        stages=len(levels),
        strides=strides,
        channels=tuple(levels[stride][1] for stride in strides),
        default_stride=_DEFAULT_STRIDE if _DEFAULT_STRIDE in levels else strides[-1],
        # Patches and strided convolutions without padding drop the pixels of an unfinished cell.
        pad_multiple=strides[-1],
        **normalisation,
    )


def _levels(net: Any) -> dict[int, tuple[int, int, str]]:
    """Stride of each level to its index in timm, its channels, and the module that it ends with."""
    info = net.feature_info
    rows = zip(info.out_indices, info.channels(), info.module_name(), strict=True)
    return dict(zip(info.reduction(), rows, strict=True))


@lru_cache(maxsize=8)
def _template(name: str) -> Any:
    """Build a network without values: what it is made of."""
    return _create(name).to("meta")


def _new(name: str) -> Any:
    """Build a network with random weights, or with fake ones where all tensors are fake.

    timm reads values of tensors while it builds, which fake ones do not have: there, a template is
    copied.
    """
    if type(torch.empty(0)) is Tensor:
        return _create(name).model
    template = _template(name).model
    fakes: dict[int, Tensor] = {}
    for one in (*template.parameters(), *template.buffers()):
        fake = torch.zeros(one.shape, dtype=one.dtype)
        fakes[id(one)] = nn.Parameter(fake) if isinstance(one, nn.Parameter) else fake
    return copy.deepcopy(template, fakes)


def _without_head(net: Any, indices: list[int]) -> Any:
    """Drop what these levels do not need, which would be parameters without a gradient."""
    net.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
    names = net.pretrained_cfg.get("classifier") or ()
    for name in (names,) if isinstance(names, str) else names:
        setattr(net, name.split(".")[0], nn.Identity())
    return net


class Timm(nn.Module):
    """A network of timm; a frozen stage is a feature level with all that is before it."""

    def __init__(self, model: params.Model, spec: BodySpec) -> None:
        super().__init__()
        levels = _levels(_template(spec.name))
        used = [levels[spec.strides[level]] for level in levels_of(model)]
        self.channels = tuple(channels for _, channels, _ in used)
        self._indices = [index for index, _, _ in used]
        self.model = _without_head(_new(spec.name), self._indices)
        if model.norm == "frozen":
            import timm.layers

            self.model = cast("Any", timm.layers).freeze_batch_norm_2d(self.model)
        self._frozen: list[nn.Module] = []
        if model.frozen_stages:
            self._freeze(levels[spec.strides[model.frozen_stages - 1]][2])

    def _freeze(self, last: str) -> None:
        """Freeze all parameters up to those of the module `last`."""
        names = [name for name, _ in self.model.named_parameters()]
        ends = [i for i, name in enumerate(names) if name.startswith(f"{last}.")]
        frozen = set(names[: ends[-1] + 1] if ends else names)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        self._frozen = [
            module
            for path, module in self.model.named_modules()
            if (own := [n for n, _ in module.named_parameters(prefix=path)]) and frozen >= set(own)
        ]
        self.train(self.training)

    def train(self, mode: bool = True) -> Timm:
        """Set training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features [B, C, h, w] of the used levels."""
        network: Any = self.model
        found: list[Tensor] = network.forward_intermediates(
            images, indices=self._indices, intermediates_only=True, output_fmt="NCHW"
        )
        return found


def build(model: params.Model, spec: BodySpec) -> layers.Backbone:
    """Build one; see `build_backbone`."""
    return layers.Backbone(Timm(model, spec), spec, strides_of(model))


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of timm under the names of our parameters; classifiers find no place."""
    return {f"model.{name}": tensor for name, tensor in state.items()}
