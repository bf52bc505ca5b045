"""DivPrune: the tokens that are farthest from one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vistoken.contract import Selection, Signal, View
from vistoken.errors import MethodError
from vistoken.kernels.greedy import cosine_matrix, pick_diverse
from vistoken.pruning._pruner import Pruner


@dataclass(frozen=True, kw_only=True)
class DivPrune(Pruner):
    """Max-min diversity after the projector: no attention, no text.

    Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    CVPR 2025, arXiv 2503.02175. The first pick is the token whose nearest neighbor is farthest,
    in 1 - cosine of the projected tokens; every next one is the token farthest from its nearest
    pick.

    Official defects that are not reproduced: distances are computed in half precision (here fp32);
    tokens already picked stay candidates, so equal tokens can be picked twice; newline tokens are
    candidates (here they are the `newlines` option's); the picture is taken to begin at the 36th
    token of the prompt.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "DivPrune, CVPR 2025, arXiv 2503.02175"
    tag: ClassVar[str] = "training-free"
    signals: ClassVar[frozenset[Signal]] = frozenset({Signal.FEATURES})

    def select(self, view: View, keep: int) -> Selection:
        """Choose among all tokens of the picture at once."""
        return Selection(select(view.features, keep))


def select(features: Tensor, keep: int) -> Tensor:
    """Return the indices [B, keep] int64, ascending, of the tokens that DivPrune keeps.

    features [B, N, C] projected tokens (any floating dtype; cosines in fp32). keep >= N returns
    all tokens. Ties go to the lower index. Needs N x N cosines per picture; never reads a value
    back to the CPU.
    """
    if features.dim() != 3:
        raise MethodError(f"divprune: features must be [B, N, C], got {list(features.shape)}.")
    if keep < 1:
        raise MethodError(f"divprune: keep must be at least 1, got {keep}.")
    batch, tokens, _ = features.shape
    if keep >= tokens:
        return torch.arange(tokens, device=features.device).repeat(batch, 1)
    cosine = cosine_matrix(features)
    cosine.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)  # no token is its own neighbor
    first = cosine.amax(-1).clamp(max=1).argmin(-1)
    weight = torch.ones_like(cosine[:, 0])
    return pick_diverse(cosine, weight, first, keep).sort(dim=-1).values
