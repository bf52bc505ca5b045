"""Token merging: bipartite matching, the size-weighted mean of matched tokens, its inverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vistoken.errors import MethodError
from vistoken.kernels.gather import gather_tokens

_TIER = 4.0  # more than the distance between two cosines


@dataclass(frozen=True)
class MergePlan:
    """Which of N tokens merge into which.

    All indices are int64 into the N tokens behind the first `protected` entries, which stay as
    they are. kept [B, N - r]: the tokens that stay, ascending. source [B, r]: those that leave,
    the most similar first. target [B, r]: where each goes, always one that stays; -1 where padding
    is dropped.
    """

    kept: Tensor
    source: Tensor
    target: Tensor
    protected: int = 0

    @property
    def merged(self) -> int:
        """How many tokens leave each row."""
        return self.source.shape[1]

    @property
    def tokens(self) -> int:
        """How many tokens N each row had, without the protected ones."""
        return self.kept.shape[1] + self.merged


@torch.no_grad()
def match(
    metric: Tensor,
    r: int,
    *,
    protected: int = 0,
    order: Tensor | None = None,
    visible: Tensor | None = None,
    release: bool = False,
) -> MergePlan:
    """Choose the r pairs of most similar tokens across two halves of each row.

    metric [B, protected + N, D], any floating dtype, compared by cosine in fp32. The sequence
    alternates between the sets A (positions 0, 2, ...) and B (positions 1, 3, ...), the first
    `protected` entries (CLS, registers) included in the count but never matched. Every token of A
    links to its most similar token of B; the r strongest links merge, A into B. Several may meet
    in one B. Ties go to the token that comes first. At most N // 2 merge: r is cut to that.

    order [B, N], a permutation of the tokens behind the protected ones, is the sequence in which
    they alternate; None is the sequence in which they lie (see `released_order`).

    visible [B, N] marks tokens that count; the others are padding, which never mixes with them.
    Then the sets alternate over the visible tokens only, and all padding leaves before any visible
    token does: it merges into the row's first padding token, which itself leaves last. With
    `release` (for the last merge of a sequence) it leaves before visible tokens as well; it and
    what was to merge into it then are dropped. So a sequence of merges down to K tokens, the last
    one with `release`, leaves exactly min(K, visible) visible tokens in each row, whatever the
    mask.

    Not differentiable, never waits for the device. Bolya et al., "Token Merging: Your ViT But
    Faster", ICLR 2023, arXiv 2210.09461; padding is our addition.
    """
    tokens = metric.shape[1] - protected
    if r < 0 or not 0 <= protected <= metric.shape[1]:
        raise MethodError(
            f"match: r must not be negative and protected at most {metric.shape[1]}, the length of "
            f"metric, got {r} and {protected}."
        )
    for name, given in (("visible", visible), ("order", order)):
        if given is not None and given.shape != (metric.shape[0], tokens):
            raise MethodError(
                f"match: {name} must be {[metric.shape[0], tokens]}, got {list(given.shape)}."
            )
    r = min(r, tokens // 2)
    if r == 0:
        kept = torch.arange(tokens, device=metric.device).expand(metric.shape[0], tokens)
        return MergePlan(kept, kept[:, :0], kept[:, :0], protected)
    with torch.autocast(metric.device.type, enabled=False):
        unit = F.normalize(metric[:, protected:].float(), dim=-1)
        if order is not None:
            unit = gather_tokens(unit, order)
            visible = None if visible is None else visible.gather(1, order)
        if visible is None:
            source, target = _strongest(unit, r, protected)
        else:
            source, target = _strongest_visible(unit, r, protected, visible, release)
    if order is not None:
        source = order.gather(1, source)
        target = torch.where(target < 0, target, order.gather(1, target.clamp(min=0)))
    kept = _leaves(source, tokens).sort(dim=1, stable=True).indices[:, : tokens - r]
    return MergePlan(kept, source, target, protected)


def _leaves(source: Tensor, tokens: int) -> Tensor:
    """Mark [B, N] uint8 the tokens that leave."""
    stays = torch.zeros(source.shape[0], tokens, dtype=torch.uint8, device=source.device)
    return stays.scatter_(1, source, 1)


@torch.no_grad()
def released_order(plan: MergePlan, order: Tensor | None = None) -> Tensor:
    """Return the sequence [B, N - r] in which the official code leaves the tokens of one merge.

    First what stayed of A, then B, each in the sequence `order` that `match` was given. The result
    counts the tokens that stayed in the order of `plan.kept`, ready for the next `match`.
    """
    leaves, first = _leaves(plan.source, plan.tokens), plan.protected % 2
    if order is None:
        order = torch.arange(plan.tokens, device=leaves.device).expand(leaves.shape)
    sets = torch.cat([order[:, first::2], order[:, 1 - first :: 2]], 1)
    stay = leaves.gather(1, sets).sort(dim=1, stable=True).indices[:, : plan.kept.shape[1]]
    return ((1 - leaves.long()).cumsum(1) - 1).gather(1, sets.gather(1, stay))


def _strongest(unit: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor]:
    """The r strongest links from A to B, as token indices [B, r] and [B, r]."""
    first = protected % 2  # the first token of A; that of B is the other of 0 and 1
    best, link = (unit[:, first::2] @ unit[:, 1 - first :: 2].mT).max(-1)
    order = best.sort(dim=-1, descending=True, stable=True).indices[:, :r]
    return order * 2 + first, link.gather(1, order) * 2 + (1 - first)


def _strongest_visible(
    unit: Tensor, r: int, protected: int, visible: Tensor, release: bool
) -> tuple[Tensor, Tensor]:
    """The same where padding leaves first; needs the full map of similarities."""
    padding = ~visible
    even = (visible.cumsum(1) - 1 + protected) % 2 == 0
    sink = padding & (padding.cumsum(1) == 1)
    leaving = (visible & even) | (padding & ~sink)
    staying = (visible & ~even) | sink
    paired = leaving[:, :, None] & staying[:, None, :]
    paired &= visible[:, :, None] == visible[:, None, :]
    cosine = (unit @ unit.mT).nan_to_num(-1.0)
    best, link = cosine.masked_fill(~paired, -torch.inf).max(-1)
    # padding in 4 + [-1, 1], visible tokens in [-1, 1], the sink between them or below them
    rank = torch.where(padding, best + _TIER, best)
    rank = rank.masked_fill(sink, _TIER / 2 if release else -_TIER / 2)
    source = rank.sort(dim=-1, descending=True, stable=True).indices[:, :r]
    sink_leaves = sink.gather(1, source).any(1, keepdim=True)
    dropped = padding.gather(1, source) & sink_leaves
    return source, link.gather(1, source).masked_fill(dropped, -1)


def merge(x: Tensor, sizes: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """Replace every token that stays by the size-weighted mean of itself and what merged into it.

    x [B, P + N, C] and sizes [B, P + N], of which the first P = plan.protected are left alone.
    Returns the tokens [B, P + N - r, C] in x's dtype, in the order of `plan.kept`, and their sizes
    in fp32. Sums are taken in fp32 (fp64 for fp64 input) and in one order, so the result is the
    same in every run; tokens into which nothing merged are not changed by a bit. Without merges x
    and sizes themselves come back. Differentiable in x and sizes.
    """
    _check("merge", x, plan, plan.tokens)
    if plan.merged == 0:
        return x, sizes
    p = plan.protected
    with torch.autocast(x.device.type, enabled=False):
        high = torch.promote_types(x.dtype, torch.float32)
        own = sizes[:, p:].gather(1, plan.kept)
        given = sizes[:, p:].gather(1, plan.source)
        mass = (plan.kept[:, :, None] == plan.target[:, None, :]) * given.to(high)[:, None, :]
        total = mass.sum(-1) + own
        stays = gather_tokens(x[:, p:], plan.kept) * (own / total)[..., None]
        leaves = gather_tokens(x[:, p:], plan.source).to(high)
        mean = torch.baddbmm(stays.to(high), mass / total[..., None], leaves).to(x.dtype)
    total = total.float()
    if p == 0:
        return mean, total
    return torch.cat([x[:, :p], mean], 1), torch.cat([sizes[:, :p].float(), total], 1)


def unmerge(x: Tensor, plan: MergePlan) -> Tensor:
    """Give every token that left a copy of the one it merged into: x [B, P + N - r, C] to N.

    Undoes the shape of one `merge`, for dense predictions; plans of several layers are undone in
    reverse order. Dropped padding comes back as zeros. Differentiable; without merges x itself.
    """
    _check("unmerge", x, plan, plan.kept.shape[1])
    if plan.merged == 0:
        return x
    stay = plan.kept.shape[1]
    place = torch.arange(stay, device=x.device).expand(x.shape[0], stay)
    place = torch.zeros_like(plan.kept[:, :1]).repeat(1, plan.tokens).scatter(1, plan.kept, place)
    dropped = plan.target < 0
    place = place.scatter(1, plan.source, place.gather(1, plan.target.clamp(min=0)))
    whole = gather_tokens(x[:, plan.protected :], place)
    gone = torch.zeros_like(place, dtype=torch.bool).scatter(1, plan.source, dropped)
    gone = gone.reshape(*gone.shape, *([1] * (x.dim() - 2)))
    return torch.cat([x[:, : plan.protected], whole.masked_fill(gone, 0)], 1)


def _check(name: str, x: Tensor, plan: MergePlan, tokens: int) -> None:
    expected = (plan.kept.shape[0], plan.protected + tokens)
    if x.shape[:2] != expected:
        raise MethodError(
            f"{name}: the plan is for {list(expected)} rows and tokens, got {list(x.shape[:2])}."
        )
