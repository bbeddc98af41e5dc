"""Build a detector of either preset from the parameters."""

from __future__ import annotations

from runkey import params
from runkey.model.backbones import Backbone, Compact, ResNet
from runkey.model.detr import Detector, Detr
from runkey.model.fast import ConditionalAttention, FastDetr
from runkey.model.transformer import Attention, DecoderLayer, EncoderLayer, Stack, Transformer


def build_model(model: params.Model, num_classes: int) -> Detector:
    """Build a detector with random weights. Pretrained ones: see `runkey.model.weights`.

    Args:
        model: section `model` of params.yaml.
        num_classes: K.

    Returns:
        `Detr` or `FastDetr`, in training mode. With preset detr and frozen norms its state dict
        has exactly the names of the reference implementation (Carion et al. 2020).
    """
    backbone, transformer = _backbone(model), _transformer(model)
    if model.preset == "detr":
        return Detr(backbone, transformer, num_classes=num_classes, num_queries=model.num_queries)
    return FastDetr(
        backbone,
        transformer,
        num_classes=num_classes,
        num_queries=model.num_queries,
        denoising_groups=model.denoising.groups,
        label_noise=model.denoising.label_noise,
        box_noise=model.denoising.box_noise,
    )


def _backbone(model: params.Model) -> Backbone:
    frozen_norm = model.norm == "frozen"
    stages, checkpointing = model.frozen_stages, model.checkpointing
    if model.backbone == "compact":
        body: Compact | ResNet = Compact(
            frozen_norm=frozen_norm, frozen_stages=stages, checkpointing=checkpointing
        )
    else:
        body = ResNet(
            model.backbone,
            dilation=model.dilation,
            frozen_norm=frozen_norm,
            frozen_stages=stages,
            checkpointing=checkpointing,
        )
    return Backbone(body)


def _transformer(model: params.Model) -> Transformer:
    sizes = (model.hidden_dim, model.num_heads, model.feedforward_dim, model.dropout)
    cross = Attention if model.preset == "detr" else ConditionalAttention
    encoder = [EncoderLayer(*sizes) for _ in range(model.encoder_layers)]
    decoder = [DecoderLayer(*sizes, cross) for _ in range(model.decoder_layers)]
    return Transformer(
        Stack(encoder, model.hidden_dim, norm=False, checkpointing=model.checkpointing),
        Stack(decoder, model.hidden_dim, norm=True, checkpointing=model.checkpointing),
    )
