"""A slow reading of VisionZip: one picture after the other, loops over tokens in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor


def shares(total: int, weights: list[int]) -> list[int]:
    """Largest remainder in exact fractions, one leftover at a time."""
    exact = [Fraction(total * w, max(sum(weights), 1)) for w in weights]
    parts = [math.floor(x) for x in exact]
    while sum(parts) < total:
        gaps = [x - p for x, p in zip(exact, parts, strict=True)]
        parts[gaps.index(max(gaps))] += 1
    return parts


@dataclass
class Expected:
    """Roles of one picture's tokens: anchors with those that joined each."""

    dominant: list[int]
    groups: dict[int, list[int]]

    @property
    def kept(self) -> list[int]:
        return sorted(self.dominant + list(self.groups))


def roles(
    attention: Tensor, keys: Tensor, tiles: list[int], keep: int, contextual: float
) -> Expected:
    """attention [N], keys [H, N, D] of one picture, its tokens' tile numbers."""
    members = [[i for i, t in enumerate(tiles) if t == tile] for tile in range(max(tiles) + 1)]
    budgets = shares(keep, [len(m) for m in members])
    count = contextual
    if isinstance(contextual, float):
        count = math.floor(contextual * keep + 0.5)
    merged, metric = shares(int(count), budgets), keys.double().mean(0)
    found = Expected([], {})
    for tokens, budget, anchors in zip(members, budgets, merged, strict=True):
        ranked = sorted(tokens, key=lambda i: (-attention[i].item(), i))
        best = ranked[: budget - anchors]
        rest = [i for i in tokens if i not in best]
        ends = rest[:: max(len(rest) // anchors, 1)][:anchors] if anchors else []
        found.dominant += best
        found.groups |= {i: [] for i in ends}
        for i in rest:
            if i not in ends and ends:
                alike = [torch.cosine_similarity(metric[i], metric[j], dim=0) for j in ends]
                found.groups[ends[alike.index(max(alike))]].append(i)
    return found


def merged_feature(encoded: Tensor, anchor: int, joined: list[int], mode: str) -> Tensor:
    """Feature [E] in fp64 of a contextual token, from encoded [N, E]."""
    own, others = encoded[anchor].double(), encoded[joined].double()
    if not joined:
        return own
    if mode == "released":
        return own + others.mean(0)
    return torch.cat([own[None], others]).mean(0)
