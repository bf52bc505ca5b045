"""Spread: attention-weighted selection that spreads over content and over the picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from vistoken.contract import Selection, Signal, View
from vistoken.errors import MethodError
from vistoken.kernels import cosine_matrix, pick_diverse
from vistoken.method import option
from vistoken.pictures import Part, Picture, plain
from vistoken.pruning._pruner import Pruner

# a token without any attention still counts for a little, so that diversity decides among such
_FLOOR = 1e-4


@dataclass(frozen=True, kw_only=True)
class Spread(Pruner):
    """Keep tokens that are attended to, unlike each other, and not all in one place.

    Our own method, made of what a comparison of the others on one model showed: the [CLS] row
    finds the objects but spends a small budget on few of them, diversity alone spends it on the
    background, and a quota over places helps where the row is peaked. So one greedy rule: the
    token of most attention first, then again and again the token with the largest

        attention ** sharpness * min over the kept of (1 - cosine) * (1 - nearness)

    where cosine compares projected features and nearness = exp(-(distance / reach)²) within one
    raster, distances counted in its longer side. `reach` 0 leaves places out. Reads nothing of the
    text, so a picture's tokens serve every question about it.
    """

    name: ClassVar[str] = "spread"
    paper: ClassVar[str] = "vistoken"
    tag: ClassVar[str] = "training-free"
    signals: ClassVar[frozenset[Signal]] = frozenset({Signal.FEATURES, Signal.CLS_ATTENTION})

    sharpness: float = option(1.5, "exponent on the attention", minimum=0, maximum=8)
    reach: float = option(0.3, "how far a kept token crowds others out", minimum=0, maximum=4)

    def select(self, view: View, keep: int) -> Selection:
        """Choose greedily among the tokens that are left."""
        near = None
        if self.reach > 0:
            near = nearness(view.picture, self.reach, view.device)
            if view.tokens < view.picture.tokens:
                near = near[view.origin[:, :, None], view.origin[:, None, :]]
        return Selection(_select(view.features, view.cls_attention, keep, self.sharpness, near))


def select(
    features: Tensor,
    cls_attention: Tensor,
    keep: int,
    *,
    sharpness: float = 1.5,
    reach: float = 0.3,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Return the indices [B, keep] int64, ascending, of the tokens that Spread keeps.

    features [B, N, C] projected tokens (any floating dtype; computed in fp32); cls_attention
    [B, N], non-negative; `grid` (rows, columns) says where tokens lie and is needed unless `reach`
    is 0. keep >= N returns all tokens. Never reads a value back to the CPU.
    """
    batch, tokens = cls_attention.shape
    if features.shape[:2] != (batch, tokens):
        raise MethodError(
            f"spread: features {list(features.shape)} and cls_attention "
            f"{list(cls_attention.shape)} must agree in images and tokens."
        )
    if keep < 1 or sharpness < 0 or reach < 0:
        raise MethodError(
            "spread: keep must be at least 1, sharpness and reach not negative, got "
            f"{keep}, {sharpness} and {reach}."
        )
    if reach > 0 and (grid is None or grid[0] * grid[1] != tokens):
        raise MethodError(f"spread: reach={reach} needs a grid of {tokens} tokens, got {grid!r}.")
    if keep >= tokens:
        return torch.arange(tokens, device=cls_attention.device).repeat(batch, 1)
    near = None if grid is None or reach == 0 else nearness(plain(*grid), reach, features.device)
    return _select(features, cls_attention, keep, sharpness, near)


def _select(
    features: Tensor, attention: Tensor, keep: int, sharpness: float, near: Tensor | None
) -> Tensor:
    # only ratios count; a mean of one keeps the powers in range
    weight = attention.float().nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
    weight = weight / weight.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    weight = weight.clamp(min=_FLOOR) ** sharpness
    similar = cosine_matrix(features)
    if near is not None:
        similar = 1 - (1 - similar) * (1 - near)
    return pick_diverse(similar, weight, weight.argmax(-1), keep).sort(-1).values


# Cached tensors must serve later calls that record gradients, hence not be inference tensors.
@lru_cache(maxsize=8)
@torch.inference_mode(False)
def nearness(picture: Picture, reach: float, device: torch.device) -> Tensor:
    """exp(-(distance / reach)²) of every two tokens of one raster, else 0: [N, N] fp32."""
    return torch.block_diag(*(_within(part, reach, device) for part in picture.parts))


def _within(part: Part, reach: float, device: torch.device) -> Tensor:
    rows, columns = part.grid
    index = torch.arange(rows * columns, device=device)
    place = torch.stack([index // columns, index % columns], dim=1).float() / max(rows, columns)
    return (-torch.cdist(place, place).square() / reach**2).exp()
