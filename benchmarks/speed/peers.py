"""The peers of `make env-bench`: where they are, and how they get our weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from runkey.params import Model

DETR, TRANSFORMERS = "reference DETR", "transformers"
_REPOSITORY = Path(__file__).parents[2]
_SITES = ".venv-bench/lib/python3*/site-packages"


def find_packages() -> None:
    """Let packages of .venv-bench be imported, in front of .venv's."""
    folder = next(_REPOSITORY.glob(_SITES), None)
    if folder is None:
        sys.exit("error: .venv-bench: not found; run `make env-bench`")
    sys.path.insert(0, str(folder))


def build_transformers(section: Model, state: Mapping[str, Tensor], num_classes: int) -> nn.Module:
    """Build `DetrForObjectDetection` from configuration, with a state dict of the reference.

    What the reference freezes is frozen: transformers does so with its own ResNet alone.
    """
    from transformers import DetrConfig, DetrForObjectDetection

    config = DetrConfig(
        backbone=section.backbone,
        num_labels=num_classes,
        num_queries=section.num_queries,
        d_model=section.hidden_dim,
        encoder_layers=section.encoder_layers,
        decoder_layers=section.decoder_layers,
        encoder_ffn_dim=section.feedforward_dim,
        decoder_ffn_dim=section.feedforward_dim,
        encoder_attention_heads=section.num_heads,
        decoder_attention_heads=section.num_heads,
        dropout=section.dropout,
        attention_dropout=section.dropout,
        activation_dropout=section.dropout,
        auxiliary_loss=True,
    )
    model: nn.Module = DetrForObjectDetection(config)
    model.load_state_dict(dict(rename(state)))
    for name, parameter in model.named_parameters():
        if "backbone" in name and not any(f"layer{stage}" in name for stage in (2, 3, 4)):
            parameter.requires_grad_(False)
    return model


_NAMES = {
    "backbone.0.body.": "model.backbone.model.",
    "input_proj.": "model.input_projection.",
    "query_embed.": "model.query_position_embeddings.",
    "class_embed.": "class_labels_classifier.",
    "bbox_embed.": "bbox_predictor.",
    "transformer.decoder.norm.": "model.decoder.layernorm.",
    "transformer.": "model.",
}
"""Beginnings of names, the reference's and transformers'."""
_DECODER_NORMS = {"norm2.": "encoder_attn_layer_norm.", "norm3.": "final_layer_norm."}
_PARTS = {
    "multihead_attn.": "encoder_attn.",
    "out_proj.": "o_proj.",
    "linear1.": "mlp.fc1.",
    "linear2.": "mlp.fc2.",
    "norm1.": "self_attn_layer_norm.",
    "norm2.": "final_layer_norm.",
}
"""Parts of names in the layers of encoder and decoder."""


def rename(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the entries of the reference's state dict under transformers' names."""
    for name, tensor in state.items():
        begin = next(one for one in _NAMES if name.startswith(one))
        new = _NAMES[begin] + name.removeprefix(begin)
        if begin == "transformer.":
            for old, part in (_PARTS | (_DECODER_NORMS if "decoder" in name else {})).items():
                new = new.replace(old, part)
        if "in_proj_" not in new:
            yield new, tensor
            continue
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield new.replace("in_proj_", f"{part}_proj."), rows
