"""Two-stage selection: the encoder's tokens propose boxes, the best become reference boxes.

As in Deformable DETR's two-stage variant (Zhu et al. 2021) and DINO (Zhang et al. 2022).
Boxes are handled as logits (their inverse sigmoid), so a refinement is an addition.
Shapes: B images, S tokens, Q queries, K classes, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runkey.model.boxes import full_precision
from runkey.model.detector import Memory
from runkey.model.layers import MLP
from runkey.model.position import grid_centres
from runkey.model.targets import Proposals

# Width and height that a token's proposal starts from, as a part of the image's.
_START_SIZE = 0.1
# Logit of a chance of 1 in 100: most queries match nothing (RetinaNet, Lin et al. 2017).
PRIOR_LOGIT = -math.log((1 - 0.01) / 0.01)


def class_head(dim: int, num_classes: int) -> nn.Linear:
    """A linear layer whose scores start near 0.01."""
    head = nn.Linear(dim, num_classes)
    nn.init.constant_(head.bias, PRIOR_LOGIT)
    return head


def box_head(dim: int) -> MLP:
    """An MLP whose refinements start at zero."""
    head = MLP(dim, dim, 4, 3)
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return head


class ProposalHead(nn.Module):
    """Class and box of every token of the encoder, and the choice of reference boxes."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.class_embed = class_head(dim, num_classes)
        self.bbox_embed = box_head(dim)

    def forward(self, memory: Memory, num_queries: int) -> tuple[Proposals, Tensor]:
        """Propose.

        Args:
            memory: the encoder's tokens; call without autocast.
            num_queries: Q.

        Returns:
            The proposals of all tokens, and the logits of the best Q boxes [B, Q, 4], detached.
        """
        tokens = full_precision(memory.tokens)
        padding = None if memory.padding is None else memory.padding.flatten(1)
        logits = self.class_embed(tokens)
        box_logits = self.bbox_embed(tokens) + start_boxes(memory).to(tokens.dtype)
        best = _best(logits.detach(), box_logits.detach(), padding, num_queries)
        return Proposals(logits, box_logits.sigmoid(), padding), best


def start_boxes(memory: Memory) -> Tensor:
    """float32 [B or 1, S, 4]: logits of a box of one size about each token's centre."""
    centres = grid_centres(memory.padding, memory.shape, memory.tokens.device)
    return torch.cat((centres, torch.full_like(centres, _START_SIZE)), dim=-1).logit()


def _best(logits: Tensor, box_logits: Tensor, padding: Tensor | None, count: int) -> Tensor:
    """The box logits [B, count, 4] of the tokens with the highest score in any class."""
    scores = logits.amax(-1)
    if padding is not None:
        scores = scores.masked_fill(padding, -math.inf)
        # What padding proposes must not depend on how much padding there is.
        box_logits = box_logits.masked_fill(padding[..., None], 0.0)
    missing = count - scores.shape[1]
    if missing > 0:
        scores = F.pad(scores, (0, missing), value=-math.inf)
        box_logits = F.pad(box_logits, (0, 0, 0, missing))
    index = scores.topk(count, dim=1).indices
    return box_logits.take_along_dim(index[..., None], dim=1)
