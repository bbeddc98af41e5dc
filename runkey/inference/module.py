"""A detector as one network: uint8 images in, scores, labels and boxes out.

    module = InferenceModule(load_model(folder)[0])
    scores, labels, boxes_xyxy = module(images)

It computes what `evaluate` computes, to the last bit. `InferenceOptions` make it faster; with them
rounding differs, and what leaves out layers loses AP. Shapes: B images, n detections of each.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from runkey.data.dataset import Normalisation, colour_constants
from runkey.errors import ModelError
from runkey.model.detr import Detector, Detr, FastDetr, without_autocast
from runkey.model.postprocess import Postprocess


@dataclass(frozen=True, slots=True)
class InferenceOptions:
    """What makes a network faster without training it again."""

    fold_norms: bool = False
    """Multiply the backbone's norms into the kernels of the convolutions before them."""
    last_layer_only: bool = False
    """Leave out the heads of the other decoder layers, which only losses need."""
    channels_last: bool = False
    """Run the backbone in this memory format."""
    bf16: bool = False
    """Compute convolutions and matrix products in bfloat16 (`torch.autocast`), heads in float32."""
    decoder_layers: int | None = None
    """Run only so many, from the first; None: all."""
    proposals_only: bool = False
    """Preset fast: the encoder's proposals are the detections; no decoder runs."""


EXPORTED = InferenceOptions(fold_norms=True, last_layer_only=True)
"""What changes nothing but rounding."""


class InferenceModule(nn.Module):
    """A detector with its normalisation before and its postprocessing after it.

    Images of a batch have one shape; nothing is padded, so there is no mask.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, detector: Detector, options: InferenceOptions = InferenceOptions()) -> None:
        """Take over a detector, in evaluation mode and without gradients; options change a copy.

        Raises:
            ModelError: an option does not fit the detector.
        """
        super().__init__()
        self.options = options
        self.detector = _shortened(detector, options) if options != InferenceOptions() else detector
        self.postprocess = Postprocess(softmax=isinstance(detector, Detr))
        body = detector.body
        mean, std = colour_constants(torch.device("cpu"), Normalisation(body.mean, body.std))
        self.register_buffer("scale", (1.0 / std)[:, None, None], persistent=False)
        self.register_buffer("offset", (-mean / std)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect objects.

        Args:
            images: RGB, uint8 [B, 3, h, w], resized as `runkey.inference.preprocess` does.

        Returns:
            Scores float32 [B, n], descending; class indices int64 [B, n]; boxes xyxy float32
            [B, n, 4] as fractions of width and height, clipped to 0..1. n is at most 100.
        """
        pixels = images.to(torch.float32) * self.scale + self.offset
        if self.options.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        bf16 = torch.autocast(pixels.device.type, torch.bfloat16)
        with bf16 if self.options.bf16 else nullcontext():
            logits, boxes_cxcywh = self._predict(pixels)
        return self.postprocess.select(logits, boxes_cxcywh)

    def _predict(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, Q, C] and boxes cxcywh [B, Q, 4] of normalised images."""
        detector = self.detector
        if self.options.proposals_only and isinstance(detector, FastDetr):
            memory = detector.encode(pixels, None)
            with without_autocast(pixels.device):
                queries = detector.query_content.num_embeddings
                proposals, _ = detector.proposal_head(memory, queries)
            return proposals.logits, proposals.boxes_cxcywh
        outputs = detector(pixels, None)
        return outputs.logits[-1], outputs.boxes_cxcywh[-1]


def _shortened(detector: Detector, options: InferenceOptions) -> Detector:
    detector = copy.deepcopy(detector).eval()
    layers = detector.transformer.decoder.layers
    if options.proposals_only and not isinstance(detector, FastDetr):
        raise ModelError("proposals only: preset detr has no proposals; leave the option out")
    if options.decoder_layers is not None and not 1 <= options.decoder_layers <= len(layers):
        raise ModelError(
            f"decoder layers: {options.decoder_layers}; this model has {len(layers)}, "
            f"give 1 to {len(layers)}"
        )
    detector.transformer.decoder.layers = layers[: options.decoder_layers]
    detector.last_layer_only = options.last_layer_only
    if options.fold_norms:
        _fold_norms(detector.backbone)
    if options.channels_last:
        detector.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return detector


def _fold_norms(backbone: nn.Module) -> None:
    """Replace each convolution and the norm after it by one convolution and `nn.Identity`."""
    for parent in list(backbone.modules()):
        for (name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and hasattr(norm, "running_var"):
                # A FrozenBatchNorm2d has all that is read of a batch norm.
                setattr(parent, name, fuse_conv_bn_eval(conv, cast(nn.BatchNorm2d, norm)))
                setattr(parent, norm_name, nn.Identity())
