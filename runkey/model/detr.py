"""The detectors of both presets, and what builds them from the parameters.

`Detr` (Carion et al. 2020) has the reference implementation's parameter names and computes its
numbers. `FastDetr` converges on small data: two-stage selection of reference boxes, conditional
cross-attention, box refinement from layer to layer, and denoising queries; each class names its
paper.
Shapes: B images, H x W pixels, h x w tokens of a level, S tokens of all levels, Q queries,
P denoising queries, T = P + Q, L decoder layers, K classes, D width, H heads, N boxes of all
images, G denoising groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runkey import params
from runkey.model.backbones import BodySpec, build_backbone
from runkey.model.backbones.layers import Backbone, Pointwise
from runkey.model.boxes import full_precision
from runkey.model.matcher import DenoisingOutputs, Outputs, Proposals, Targets
from runkey.model.transformer import (
    MLP,
    Attention,
    DecoderLayer,
    EncoderLayer,
    GridPosition,
    Stack,
    Transformer,
    grid_centres,
    is_traced,
    project_memory,
    sine,
)


@dataclass(frozen=True, slots=True)
class Level:
    """The cells of a feature level."""

    shape: tuple[int, int]
    """(h, w)."""
    padding: Tensor | None
    """bool [B, h, w], True on padding; None: no padding."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The encoder's output tokens."""

    tokens: Tensor
    """[B, S, D]."""
    position: Tensor
    """[B or 1, S, D]."""
    levels: list[Level]
    """Of which the tokens are, one after the other."""
    padding: Tensor | None
    """bool [B, S], True on padding; None: no padding."""
    mask: Tensor | None
    """bool [B, 1, 1, S], True where a token may be attended to; None: everywhere."""


class Detector(nn.Module):
    """Backbone, projection and encoder. `Detr` and `FastDetr` add queries, decoder and heads.

    Parameters under `backbone.` have their own learning rate.
    """

    def __init__(
        self,
        backbone: Backbone,
        transformer: Transformer,
        input_norm: nn.Module,
        grid_position: GridPosition,
    ) -> None:
        super().__init__()
        # The reference keeps a positional encoding beside its backbone: hence "backbone.0.".
        self.backbone = nn.ModuleList([backbone])
        dim = transformer.encoder.dim
        projections = [Pointwise(channels, dim) for channels in backbone.channels]
        self.level_embed: nn.Parameter | None = None
        """[levels, D], added to the positions; None for one level, as in the reference."""
        self.input_proj: nn.Conv2d | nn.ModuleList = projections[0]
        if len(projections) > 1:
            self.input_proj = nn.ModuleList(projections)
            self.level_embed = nn.Parameter(torch.randn(len(projections), dim))
        self.input_norm = input_norm
        self.transformer = transformer
        self.grid_position = grid_position
        self.last_layer_only = False
        """Whether only the last decoder layer predicts (L = 1): enough for detections."""

    @property
    def body(self) -> BodySpec:
        """What its body says of itself."""
        return cast(Backbone, self.backbone[0]).spec

    def encode(self, images: Tensor, padding_mask: Tensor | None) -> Memory:
        """Run backbone, projections and encoder; `forward` describes the arguments."""
        found = self.backbone[0](images, padding_mask)
        projections: list[nn.Module] = [self.input_proj]
        if self.level_embed is not None:
            projections = list(cast(nn.ModuleList, self.input_proj))
        levels, every, positions = [], [], []
        for number, projection in enumerate(projections):
            features, padding = found[number]
            found[number] = None  # the model keeps no features longer than it needs them
            features = projection(features)
            height, width = features.shape[-2:]
            position = self.grid_position(padding, (height, width), features.device)
            # float32 under autocast: in half precision neighbouring tokens look alike.
            position = position.to(torch.promote_types(features.dtype, position.dtype))
            if self.level_embed is not None:
                position = position + self.level_embed[number]
            levels.append(Level((height, width), padding))
            # torch multiplies strided tokens by other kernels where weights need no gradient.
            every.append(features.flatten(2).transpose(1, 2).contiguous())
            positions.append(position)
        tokens, position = self.input_norm(_joined(every)), _joined(positions)
        masks = [level.padding.flatten(1) for level in levels if level.padding is not None]
        padding = _joined(masks) if masks else None
        mask = None if padding is None else ~padding[:, None, None, :]
        tokens = self.transformer.encode(tokens, position, mask)
        return Memory(tokens, position, levels, padding, mask)

    def forward(
        self, images: Tensor, padding_mask: Tensor | None, targets: Targets | None = None
    ) -> Outputs:
        """Detect objects.

        Args:
            images: normalised RGB, float [B, 3, H, W].
            padding_mask: bool [B, H, W], True right of and below each image's valid area. None
                is faster; pass it where no image is padded.
            targets: the true boxes; only read in training, to make denoising queries.
        """
        raise NotImplementedError


def _joined(levels: list[Tensor]) -> Tensor:
    """Join the levels' tokens [B, S, ...]."""
    return levels[0] if len(levels) == 1 else torch.cat(levels, dim=1)


def without_autocast(device: torch.device) -> torch.autocast:
    """Return a context in which heads compute in full precision (half precision costs AP)."""
    return torch.autocast(device.type, enabled=False)


class Detr(Detector):
    """Learned query positions, content from zero, softmax over K classes and no-object."""

    def __init__(
        self, backbone: Backbone, transformer: Transformer, *, num_classes: int, num_queries: int
    ) -> None:
        dim = transformer.encoder.dim
        position = GridPosition(dim, temperature=10000.0, centred=False)
        super().__init__(backbone, transformer, nn.Identity(), position)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = MLP(dim, dim, 4, 3)

    def forward(
        self,
        images: Tensor,
        padding_mask: Tensor | None,
        targets: Targets | None = None,  # noqa: ARG002 - see Detector
    ) -> Outputs:
        """Detect objects as in `Detector.forward`; logits [L, B, Q, K + 1], no-object last."""
        memory = self.encode(images, padding_mask)
        decoder = self.transformer.decoder
        cross = [cast(Attention, layer.multihead_attn) for layer in decoder.active_layers]
        keys_values = project_memory(cross, memory.tokens, memory.position)
        position = self.query_embed.weight[None]
        x = torch.zeros_like(position).expand(images.shape[0], -1, -1)
        hidden = []
        for index, pair in enumerate(keys_values):
            x = decoder.run(index, x, position, position, pair, None, memory.mask)
            hidden.append(x)
        hidden += [x] * (len(decoder.layers) - len(hidden))  # a dropped layer passes its input on
        if self.last_layer_only:
            hidden = hidden[-1:]
        with without_autocast(images.device):
            states = decoder.norm(full_precision(torch.stack(hidden)))
            return Outputs(self.class_embed(states), self.bbox_embed(states).sigmoid())


# Preset `fast`.


# Logit of probability 0.01: most queries match nothing (RetinaNet, Lin et al. 2017).
PRIOR_LOGIT = -math.log((1 - 0.01) / 0.01)
# Ratio of wavelengths for positions in 0..1 (DAB-DETR); DETR's 10000 hardly separates them.
_TEMPERATURE = 20.0


def class_head(dim: int, num_classes: int) -> nn.Linear:
    """Build a linear layer whose initial scores are about 0.01."""
    head = nn.Linear(dim, num_classes)
    nn.init.constant_(head.bias, PRIOR_LOGIT)
    return head


def box_head(dim: int) -> MLP:
    """Build an MLP [..., dim] to [..., 4] whose initial output is zero: no refinement."""
    head = MLP(dim, dim, 4, 3)
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return head


class ProposalHead(nn.Module):
    """Two-stage selection (Deformable DETR, Zhu et al. 2021): the best tokens propose boxes."""

    def __init__(self, dim: int, num_classes: int, initial_box: float) -> None:
        super().__init__()
        self.class_embed = class_head(dim, num_classes)
        self.bbox_embed = box_head(dim)
        self.initial_box = initial_box

    def forward(self, memory: Memory, num_queries: int) -> tuple[Proposals, Tensor]:
        """Select the Q tokens with the highest score in any class.

        Only the selected tokens get a loss: AP rises faster than with a loss on all of them
        (numbered balls: AP .382 after 250 steps and .560 after 500, against .340 and .540).

        Call it without autocast.

        Returns:
            Proposals of the selected tokens, and their boxes as logits of cxcywh [B, Q, 4],
            detached.
        """
        tokens, initial, scores = self._candidates(memory, num_queries)
        best = scores.topk(num_queries, dim=1).indices[..., None]
        # Not take_along_dim, which ONNX does not have.
        selected = tokens.gather(1, best.expand(-1, -1, tokens.shape[2]))
        start = initial.expand(tokens.shape[0], -1, -1).gather(1, best.expand(-1, -1, 4))
        box_logits = self.bbox_embed(selected) + start.to(tokens.dtype)
        proposals = Proposals(self.class_embed(selected), box_logits.sigmoid())
        return proposals, box_logits.detach()

    def _candidates(self, memory: Memory, least: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, S, D], initial boxes [B or 1, S, 4], scores [B, S]; S is at least `least`.

        Tokens on padding, and those added to reach `least`, are all equal and come last: the
        selection does not depend on how far an image is padded.
        """
        tokens, initial = full_precision(memory.tokens), self._initial_boxes(memory)
        if memory.padding is not None:
            padding = memory.padding[..., None]
            tokens = tokens.masked_fill(padding, 0.0)
            initial = initial.masked_fill(padding, 0.0)
        # A traced graph is for images of any size.
        missing = least if is_traced() else max(0, least - tokens.shape[1])
        if missing:
            tokens, initial = (F.pad(x, (0, 0, 0, missing)) for x in (tokens, initial))
        with torch.no_grad():
            scores: Tensor = self.class_embed(tokens).amax(-1)
            if memory.padding is not None:
                filled = F.pad(padding[..., 0], (0, missing), value=True)
                scores = scores.masked_fill(filled, -math.inf)
            elif missing:
                scores = F.pad(scores[:, :-missing], (0, missing), value=-math.inf)
        return tokens, initial, scores

    def _initial_boxes(self, memory: Memory) -> Tensor:
        """A box around each token's centre: logits of cxcywh [B or 1, S, 4]."""
        boxes = []
        for number, level in enumerate(memory.levels):
            centres = grid_centres(level.padding, level.shape, memory.tokens.device)
            # Twice as large from level to level (Deformable DETR), as the strides are.
            size = self.initial_box * 2.0 ** (number - len(memory.levels) // 2)
            size = min(size, max(self.initial_box, 0.9))  # logits are of numbers below 1
            boxes.append(torch.cat((centres, torch.full_like(centres, size)), dim=-1).logit())
        return _joined(boxes)


class ConditionalAttention(Attention):
    """Cross-attention of Conditional DETR (Meng et al. 2021) and DAB-DETR (Liu et al. 2022).

    In every head, content and position are concatenated, so they are compared separately. The
    query's position is the sine of its box's centre, scaled by an MLP of its content.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__(dim, num_heads, dropout)
        self.scale = MLP(dim, dim, dim, 2)
        self.query_position = nn.Linear(dim, dim)
        self.key_position = nn.Linear(dim, dim)

    def attend_memory(
        self, x: Tensor, position: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Attend as in `Attention.attend_memory`; returns [B, T, D].

        `position` is the sine of the reference centres [B, T, D], `keys_values` this layer's pair
        from `project_memory_conditional`.
        """
        dim = x.shape[-1]
        content = F.linear(x, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        place = self.query_position(position * self.scale(x))
        query = torch.cat([self.split_heads(content), self.split_heads(place)], dim=-1)
        return self.attend_heads(query, *keys_values, mask)


def project_memory_conditional(
    layers: Sequence[ConditionalAttention], memory: Tensor, position: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Compute keys and values of all decoder layers in two matrix products, as `project_memory`.

    Returns:
        A pair per layer: keys (content, position) [B, H, S, 2 D / H], values [B, H, S, D / H].
    """
    dim = memory.shape[-1]
    weight = torch.cat([layer.in_proj_weight[dim:] for layer in layers])
    bias = torch.cat([layer.in_proj_bias[dim:] for layer in layers])
    contents = F.linear(memory, weight, bias).chunk(len(layers), dim=-1)
    place_weight = torch.cat([layer.key_position.weight for layer in layers])
    place_bias = torch.cat([layer.key_position.bias for layer in layers])
    places = F.linear(position, place_weight, place_bias).chunk(len(layers), dim=-1)
    pairs = []
    for layer, content, place in zip(layers, contents, places, strict=True):
        key, value = content.chunk(2, dim=-1)
        place = layer.split_heads(place).expand(memory.shape[0], -1, -1, -1)
        pairs.append((torch.cat([layer.split_heads(key), place], dim=-1), layer.split_heads(value)))
    return pairs


@dataclass(frozen=True, slots=True)
class NoisedQueries:
    """Denoising queries, which come before the learned ones."""

    content: Tensor
    """[B, P, D]."""
    box_logits: Tensor
    """[B, P, 4], logits of cxcywh."""
    mask: Tensor
    """bool [B, 1, T, T], True where a query may attend to a query."""
    slots: Tensor
    """int64 [G * N], see `DenoisingOutputs`."""
    targets: Tensor
    """int64 [G * N]."""


class Denoiser(nn.Module):
    """Makes noised copies of true boxes that the decoder must restore (DN-DETR, Li et al. 2022).

    Draws from torch's global random generator of the device.
    """

    def __init__(
        self, dim: int, num_classes: int, *, groups: int, label_noise: float, box_noise: float
    ) -> None:
        """Set the noise; `box_noise` changes the size by that part, the centre by half of it."""
        super().__init__()
        self.groups, self.label_noise, self.box_noise = groups, label_noise, box_noise
        self.label_embed = nn.Embedding(num_classes, dim)

    def forward(self, targets: Targets, num_queries: int) -> NoisedQueries:
        """Noise the targets.

        P is G times the most boxes of an image; images with fewer have unused queries, which no
        query attends to.
        """
        batch, width = len(targets.counts), max(1, *targets.counts)
        device, dtype = targets.boxes_cxcywh.device, self.label_embed.weight.dtype
        slots, sources = _slots(targets.counts, self.groups, width)
        mask = _denoising_mask(slots, batch, self.groups, width, num_queries)
        slots, sources, mask = (x.to(device, non_blocking=True) for x in (slots, sources, mask))
        labels = torch.zeros(batch * self.groups * width, dtype=torch.int64, device=device)
        labels[slots] = self._noised_labels(targets.labels[sources])
        boxes_cxcywh = torch.full((len(labels), 4), 0.5, dtype=dtype, device=device)
        boxes_cxcywh[slots] = self._noised_boxes(targets.boxes_cxcywh[sources].to(dtype))
        shape = (batch, self.groups * width)
        return NoisedQueries(
            self.label_embed(labels).view(*shape, -1),
            boxes_cxcywh.clamp(1e-3, 1 - 1e-3).logit().view(*shape, -1),
            mask,
            slots,
            sources,
        )

    def _noised_labels(self, labels: Tensor) -> Tensor:
        random = torch.randint_like(labels, self.label_embed.num_embeddings)
        swap = torch.rand(labels.shape, device=labels.device) < self.label_noise
        return torch.where(swap, random, labels)

    def _noised_boxes(self, boxes_cxcywh: Tensor) -> Tensor:
        size = boxes_cxcywh[:, 2:]
        noise = (torch.rand_like(boxes_cxcywh) * 2 - 1) * self.box_noise
        return boxes_cxcywh + noise * torch.cat((size / 2, size), dim=-1)


def _slots(counts: tuple[int, ...], groups: int, width: int) -> tuple[Tensor, Tensor]:
    """Index of each noised copy among the B * P queries, and the target it is a copy of."""
    slots, targets, first = [], [], 0
    for image, count in enumerate(counts):
        for group in range(groups):
            start = (image * groups + group) * width
            slots.append(torch.arange(start, start + count))
            targets.append(torch.arange(first, first + count))
        first += count
    return torch.cat(slots), torch.cat(targets)


def _denoising_mask(slots: Tensor, batch: int, groups: int, width: int, num_queries: int) -> Tensor:
    """Bool [B, 1, T, T]: noised queries attend to their own group and to the learned queries.

    Learned queries attend to each other only; no query attends to an unused one.
    """
    queries = groups * width
    used = torch.zeros(batch * queries, dtype=torch.bool)
    used[slots] = True
    group = torch.arange(groups).repeat_interleave(width)
    same_group = (group[:, None] == group)[None] & used.view(batch, 1, queries)
    mask = torch.zeros(batch, queries + num_queries, queries + num_queries, dtype=torch.bool)
    mask[:, :queries, :queries] = same_group
    mask[:, :, queries:] = True
    return mask[:, None]


class FastDetr(Detector):
    """Learned query content, positions from proposed boxes, one sigmoid per class."""

    def __init__(
        self,
        backbone: Backbone,
        transformer: Transformer,
        *,
        num_classes: int,
        num_queries: int,
        initial_box: float = 0.1,
    ) -> None:
        dim = transformer.encoder.dim
        position = GridPosition(dim, temperature=_TEMPERATURE, centred=True)
        # Normalised token by token: statistics over the image would depend on its padding.
        super().__init__(backbone, transformer, nn.LayerNorm(dim), position)
        self.proposal_head = ProposalHead(dim, num_classes, initial_box)
        self.query_content = nn.Embedding(num_queries, dim)
        self.query_position = MLP(2 * dim, dim, dim, 2)
        self.class_embed = class_head(dim, num_classes)
        self.bbox_embed = box_head(dim)
        self.denoiser: Denoiser | None = None

    def forward(
        self, images: Tensor, padding_mask: Tensor | None, targets: Targets | None = None
    ) -> Outputs:
        """Detect objects as in `Detector.forward`; logits are [L, B, Q, K]."""
        memory = self.encode(images, padding_mask)
        num_queries = self.query_content.num_embeddings
        with without_autocast(images.device):
            proposals, box_logits = self.proposal_head(memory, num_queries)
        content = self.query_content.weight.expand(images.shape[0], -1, -1)
        noised = None
        if self.denoiser is not None and self.training and targets is not None:
            noised = self.denoiser(targets, num_queries)
            content = torch.cat((noised.content, content), dim=1)
            box_logits = torch.cat((noised.box_logits, box_logits), dim=1)
        logits, boxes_cxcywh = self._decode(content, box_logits, memory, noised)
        if self.denoiser is None or noised is None:
            return Outputs(logits, boxes_cxcywh, proposals)
        split = noised.content.shape[1]
        denoising = DenoisingOutputs(
            logits[:, :, :split],
            boxes_cxcywh[:, :, :split],
            noised.slots,
            noised.targets,
            self.denoiser.groups,
        )
        return Outputs(logits[:, :, split:], boxes_cxcywh[:, :, split:], proposals, denoising)

    def _decode(
        self, x: Tensor, box_logits: Tensor, memory: Memory, noised: NoisedQueries | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [L, B, T, K] and boxes cxcywh [L, B, T, 4] of all layers.

        `x` is the content [B, T, D]; `box_logits` are the reference boxes [B, T, 4], which each
        layer refines; `noised` is read for its mask.
        """
        decoder = self.transformer.decoder
        layers = decoder.active_layers
        cross = [cast(ConditionalAttention, layer.multihead_attn) for layer in layers]
        keys_values = project_memory_conditional(cross, memory.tokens, memory.position)
        mask = None if noised is None else noised.mask
        states, boxes_cxcywh = [], []
        for index, pair in enumerate(keys_values):
            position, centre = self._positions(box_logits)
            x = decoder.run(index, x, position, centre, pair, mask, memory.mask)
            with without_autocast(x.device):
                state = decoder.norm(full_precision(x))
                refined = self.bbox_embed(state) + box_logits
            states.append(state)
            boxes_cxcywh.append(refined.sigmoid())
            # Detached: each layer learns from its own loss only (Deformable DETR).
            box_logits = refined.detach()
        dropped = len(decoder.layers) - len(layers)  # they repeat the prediction before them
        states += states[-1:] * dropped
        boxes_cxcywh += boxes_cxcywh[-1:] * dropped
        if self.last_layer_only:
            states, boxes_cxcywh = states[-1:], boxes_cxcywh[-1:]
        with without_autocast(x.device):
            return self.class_embed(torch.stack(states)), torch.stack(boxes_cxcywh)

    def _positions(self, box_logits: Tensor) -> tuple[Tensor, Tensor]:
        """The queries' position [B, T, D], and the sine of their centres [B, T, D]."""
        dim = self.query_content.embedding_dim
        x, y, width, height = (box_logits.sigmoid() * (2 * math.pi)).unbind(-1)
        radians = torch.stack((y, x, height, width), dim=-1)
        encoded = sine(radians, dim // 2, _TEMPERATURE).flatten(-2)
        position: Tensor = self.query_position(encoded)
        return position, encoded[..., :dim]


def build_model(model: params.Model, num_classes: int) -> Detector:
    """Build a detector for K classes with random weights, in training mode.

    With preset detr and frozen norms its state dict has exactly the names of the reference
    implementation (Carion et al. 2020). Pretrained weights: see `runkey.model.weights`.

    Raises:
        ParamsError: the backbone does not have what the parameters ask of it.
    """
    backbone, transformer, queries = build_backbone(model), _transformer(model), model.num_queries
    if model.preset == "detr":
        return Detr(backbone, transformer, num_classes=num_classes, num_queries=queries)
    detector = FastDetr(
        backbone,
        transformer,
        num_classes=num_classes,
        num_queries=queries,
        initial_box=model.initial_box,
    )
    if model.denoising.groups:
        detector.denoiser = Denoiser(model.hidden_dim, num_classes, **dict(model.denoising))
    return detector


def _transformer(model: params.Model) -> Transformer:
    sizes = (model.hidden_dim, model.num_heads, model.feedforward_dim, model.dropout)
    cross = Attention if model.preset == "detr" else ConditionalAttention
    encoder = [EncoderLayer(*sizes) for _ in range(model.encoder_layers)]
    decoder = [DecoderLayer(*sizes, cross) for _ in range(model.decoder_layers)]
    return Transformer(
        Stack(encoder, model.hidden_dim, norm=False, checkpointing=model.checkpointing),
        Stack(decoder, model.hidden_dim, norm=True, checkpointing=model.checkpointing),
    )
