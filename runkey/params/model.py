"""`model`: the architecture, where its weights start from, and the loss weights."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from runkey.params.base import (
    BelowOne,
    Count,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Stages,
)

Backbone = Literal["compact", "resnet18", "resnet34", "resnet50", "resnet101"]


class Denoising(Section):
    """Denoising queries (DN-DETR, Li et al. 2022); preset `fast` only."""

    groups: Count = 0
    """Noised copies of the ground truth per image; 0: none."""
    label_noise: Fraction = 0.2
    """Chance that a copy's class is replaced by a random one."""
    box_noise: Fraction = 0.4
    """Largest shift and scale of a copy, as a part of the box's size."""


class LossWeights(Section):
    """Weights of the losses; matching costs use the same numbers (as DETR does)."""

    classification: NonNegativeFloat = 2.0
    """Cross entropy (detr) or quality-aware focal loss (fast).  DETR: 1."""
    l1: NonNegativeFloat = 5.0
    """L1 distance of normalised cxcywh boxes."""
    giou: NonNegativeFloat = 2.0
    """Generalised IoU loss."""
    no_object: PositiveFloat = 0.1
    """Weight of the no-object class in the cross entropy (preset detr)."""
    focal_gamma: NonNegativeFloat = 1.5
    """Exponent of the focal weight (preset fast)."""


class Model(Section):
    """`model`: what is trained."""

    preset: Literal["fast", "detr"] = "fast"
    """detr: the reference's architecture and losses; fast: converges on small data."""
    backbone: Backbone = "compact"
    """Image features.  compact: 2 convolutions, 2 residual blocks, stride 8, for small images."""
    backbone_weights: str = "none"
    """none | imagenet (torchvision's, downloaded once) | a file with a state dict."""
    init_from: str | None = None
    """A whole detector's weights, ours or the reference's; heads are matched by class name."""
    dilation: bool = False
    """ResNets: stride 16 instead of 32 in the last stage (DC5)."""
    norm: Literal["live", "frozen"] = "live"
    """Batch norm: live statistics, or frozen as DETR does (only with pretrained weights)."""
    frozen_stages: Stages = 0
    """ResNet stages without training: 1 the stem, 2 also layer1 (DETR with pretrained weights)."""
    hidden_dim: PositiveInt = 96
    """Width D of the Transformer."""
    num_heads: PositiveInt = 6
    """Attention heads; divides hidden_dim."""
    feedforward_dim: PositiveInt = 192
    """Hidden width of the feed-forward layers."""
    encoder_layers: Count = 1
    """Transformer encoder layers."""
    decoder_layers: PositiveInt = 2
    """Transformer decoder layers, each with its own loss."""
    num_queries: PositiveInt = 30
    """Detections per image; must be at least the objects in an image."""
    dropout: BelowOne = 0.0
    """Dropout in the Transformer; DETR: 0.1."""
    checkpointing: bool = False
    """Activation checkpointing: less memory, about a third more time, same numbers."""
    denoising: Denoising = Denoising()
    """Denoising queries (preset fast)."""
    loss: LossWeights = LossWeights()
    """Loss weights and matching costs."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"hidden_dim {self.hidden_dim} is not a multiple of num_heads {self.num_heads}"
            )
        if self.hidden_dim % 4:
            raise ValueError(
                f"hidden_dim {self.hidden_dim} is not a multiple of 4 (sine and cosine of x and y)"
            )
        if self.preset == "detr" and self.denoising.groups:
            raise ValueError("denoising needs preset fast; set denoising.groups to 0")
        if self.backbone == "compact" and self.dilation:
            raise ValueError("dilation needs a ResNet backbone")
        if self.dilation and self.backbone in ("resnet18", "resnet34"):
            raise ValueError(f"dilation needs resnet50 or resnet101, not {self.backbone}")
        if self.backbone == "compact" and self.backbone_weights == "imagenet":
            raise ValueError("backbone_weights imagenet needs a ResNet backbone")
        if self.backbone == "compact" and self.frozen_stages > 3:
            raise ValueError(f"frozen_stages {self.frozen_stages}: backbone compact has 3")
        return self
