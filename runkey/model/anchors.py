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
    """Class and box of the encoder's tokens, and the choice of reference boxes."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.class_embed = class_head(dim, num_classes)
        self.bbox_embed = box_head(dim)

    def forward(self, memory: Memory, num_queries: int) -> tuple[Proposals, Tensor]:
        """Propose.

        Only the chosen tokens learn: that finds boxes sooner than a loss on all of them does
        (numbered balls: AP .382 after 250 steps and .560 after 500, against .340 and .540).

        Args:
            memory: the encoder's tokens; call without autocast.
            num_queries: Q.

        Returns:
            Proposals of the Q tokens with the highest score in any class, and the logits of their
            boxes [B, Q, 4], detached.
        """
        tokens, starts, scores = self._candidates(memory, num_queries)
        best = scores.topk(num_queries, dim=1).indices[..., None]
        chosen = tokens.take_along_dim(best, dim=1)
        start = starts.expand(len(tokens), -1, -1).take_along_dim(best, dim=1)
        box_logits = self.bbox_embed(chosen) + start.to(tokens.dtype)
        proposals = Proposals(self.class_embed(chosen), box_logits.sigmoid())
        return proposals, box_logits.detach()

    def _candidates(self, memory: Memory, least: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, S, D], start boxes [B or 1, S, 4] and scores [B, S]; S is at least `least`.

        Padding, and filling where there are too few tokens, are all alike and come last: what
        is chosen does not depend on how far an image is padded.
        """
        tokens, starts = full_precision(memory.tokens), start_boxes(memory)
        if memory.padding is not None:
            padding = memory.padding.flatten(1)[..., None]
            tokens = tokens.masked_fill(padding, 0.0)
            starts = starts.masked_fill(padding, 0.0)
        missing = max(0, least - tokens.shape[1])
        if missing:
            tokens, starts = (F.pad(x, (0, 0, 0, missing)) for x in (tokens, starts))
        with torch.no_grad():
            scores: Tensor = self.class_embed(tokens).amax(-1)
            if memory.padding is not None:
                filled = F.pad(padding[..., 0], (0, missing), value=True)
                scores = scores.masked_fill(filled, -math.inf)
            elif missing:
                scores[:, -missing:] = -math.inf
        return tokens, starts, scores


def start_boxes(memory: Memory) -> Tensor:
    """Logits, float32 [B or 1, S, 4], of a box of one size about each token's centre."""
    centres = grid_centres(memory.padding, memory.shape, memory.tokens.device)
    return torch.cat((centres, torch.full_like(centres, _START_SIZE)), dim=-1).logit()
