"""Which visual tokens a row keeps: the subsets of training and those of the evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_llava_data import Batch

# Shares of the ways to choose, among rows that lose tokens.
WAYS = {"random": 0.3, "blocks": 0.15, "things": 0.25, "grid": 0.1, "cls": 0.2}
SHORTENED = 0.4  # of the rows lose tokens
BLIND = 0.02  # of the rows see no picture at all, so that there is a prior to be measured
LEAST, MOST = 16, 448  # of 576


def top(scores: Tensor, count: Tensor) -> Tensor:
    """Keep the `count` [B] highest of scores [B, N]: bool [B, N]."""
    rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
    return rank < count[:, None]


def spread_order(grid: int) -> Tensor:
    """An order of the patches in which every beginning is spread evenly: float [N], first highest.

    Farthest-point order on the torus, so that it may be rolled.
    """
    n = grid * grid
    place = torch.stack([torch.arange(n) // grid, torch.arange(n) % grid], dim=1)
    gap = (place[:, None] - place[None, :]).abs()
    distance = torch.minimum(gap, grid - gap).float().pow(2).sum(dim=-1)
    nearest, scores, current = torch.full((n,), 1e9), torch.zeros(n), 0
    for i in range(n):
        scores[current] = float(n - i)
        nearest = torch.minimum(nearest, distance[current])
        nearest[current] = -1.0
        current = int(nearest.argmax())
    return scores


def quota_scores(attention: Tensor, grid: int, keep: int, cells: int = 4) -> Tensor:
    """Scores whose top `keep` are half a quota by cells x cells regions, half by attention."""
    b, n = attention.shape
    side = grid // cells
    patch = torch.arange(n, device=attention.device)
    cell = (patch // grid // side).clamp(max=cells - 1) * cells
    cell = cell + (patch % grid // side).clamp(max=cells - 1)
    same = cell[:, None] == cell[None, :]
    better = attention[:, None, :] > attention[:, :, None]
    place = (same & better).sum(dim=-1)  # how many of the same region come before
    quota = max(1, keep // (2 * cells * cells))
    return attention + (place < quota).float() * (1 + attention.amax(dim=1, keepdim=True))


def training_subsets(batch: Batch, attention: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Draw for every row whether and how it loses tokens: keep bool [B, N], renumber bool [B]."""
    b, n = attention.shape
    grid, device = round(n**0.5), attention.device
    noise = torch.rand(b, n, device=device)
    owned = (batch.owner >= 0).float()
    center = torch.rand(b, 3, 2, device=device) * grid
    patch = torch.arange(n, device=device)
    at = torch.stack([patch // grid, patch % grid], dim=1).float()
    near = (at[None, None] - center[:, :, None]).abs().amax(dim=-1).amin(dim=1)
    shift = int(torch.randint(0, n, ()))
    rolled = spread.to(device).view(grid, grid).roll((shift // grid, shift % grid), (0, 1))
    relative = attention.float() / attention.float().amax(dim=1, keepdim=True).clamp(min=1e-9)
    scores = {
        "random": noise,
        "blocks": -near + 0.5 * noise,
        "things": noise + owned * 1.5 * torch.rand(b, 1, device=device),
        "grid": rolled.reshape(1, n) + 0 * noise,
        "cls": relative + 0.05 * noise,
    }
    way = torch.multinomial(torch.tensor(list(WAYS.values()), device=device), b, replacement=True)
    chosen = torch.stack([scores[name] for name in WAYS])[way, torch.arange(b, device=device)]
    u = torch.rand(b, device=device)
    least, most = max(1, LEAST * n // 576), max(2, MOST * n // 576)
    count = (least * (most / least) ** u).round().long()
    luck = torch.rand(b, device=device)
    count = torch.where(luck < SHORTENED, count, torch.full_like(count, n))
    count = torch.where(luck < BLIND, torch.zeros_like(count), count)
    return top(chosen, count), torch.rand(b, device=device) < 0.5


def evaluation_subset(
    name: str, keep: int, attention: Tensor, owner: Tensor, spread: Tensor, seed: int
) -> Tensor:
    """The tokens that a way of choosing keeps in evaluation: bool [B, N]."""
    b, n = attention.shape
    grid, device = round(n**0.5), attention.device
    noise = torch.rand(b, n, generator=torch.Generator().manual_seed(seed)).to(device)
    if name == "random":
        scores = noise
    elif name == "uniform":
        scores = spread.to(device).expand(b, -1)
    elif name == "cls_topk":
        scores = attention
    elif name == "cls_quota":
        scores = quota_scores(attention, grid, keep)
    else:  # "things": the patches of things first, which only the truth can tell
        scores = (owner >= 0).float() + noise
    return top(scores, torch.full((b,), keep, device=device))


def concentration(attention: Tensor, owner: Tensor, budget: int) -> dict[str, float]:
    """How much of the [CLS] attention and of its top patches lies on things, beside their area."""
    owned = (owner >= 0).float()
    first = top(attention, torch.full((len(owner),), budget, device=owner.device)).float()
    reached = torch.stack([((owner == i) & (first > 0)).any(dim=1) for i in range(8)], dim=1)
    there = F.one_hot(owner.long().clamp(min=0), 8).amax(dim=1).bool()
    there[:, 0] = (owner == 0).any(dim=1)
    return {
        "area_of_things": owned.mean().item(),
        "attention_on_things": ((attention * owned).sum(dim=1) / attention.sum(dim=1))
        .mean()
        .item(),
        f"top_{budget}_on_things": (first * owned).sum(dim=1).mean().item() / budget,
        f"things_reached_by_top_{budget}": (reached & there).sum().item() / there.sum().item(),
    }
