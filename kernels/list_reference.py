"""Attention along block lists, dense and by definition: what every backend must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from vistoken.kernels.block_mask import BlockMask


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> str | None:
    """Return None: the definition runs on every device and in every floating dtype."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of attention to the blocks of keys that a mask lists.

    q [B, S, Hq, D], k [B, N, Hkv, D], v [B, N, Hkv, Dv]; query head h reads the kv head
    h // (Hq // Hkv). out [B, S, Hq, Dv] has the dtype of q; lse [B, S, Hq] is fp32, and fp64 where
    q is. A query that sees no key has out 0, lse -inf and no gradient. Takes the whole matrix of
    queries by keys; differentiable any number of times.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    seen = mask.visible().to(q.device).movedim(1, 2)  # [b, S, h, N]
    if mask.lengths is not None:  # what lies behind the valid keys may be anything
        there = _valid_keys(mask)[..., None, None].to(q.device)
        k, v = k.masked_fill(~there, 0), v.masked_fill(~there, 0)
    blind = ~seen.any(-1)
    grouped = q.to(wide).unflatten(2, (k.shape[2], -1))
    logits = torch.einsum("bmhrd,bnhd->bmhrn", grouped, k.to(wide)).flatten(2, 3) * scale
    logits = logits.masked_fill(~(seen | blind[..., None]), -torch.inf)
    weights = logits.softmax(-1).unflatten(2, (k.shape[2], -1))
    out = torch.einsum("bmhrn,bnhe->bmhre", weights, v.to(wide)).flatten(2, 3)
    lse = logits.logsumexp(-1).masked_fill(blind, -torch.inf)
    return out.masked_fill(blind[..., None], 0).to(q.dtype), lse


def _valid_keys(mask: BlockMask) -> Tensor:
    """Bool [b, kv_tokens]: the keys that count."""
    if mask.lengths is None:
        return torch.ones(1, mask.kv_tokens, dtype=torch.bool, device=mask.device)
    column = torch.arange(mask.block_kv, device=mask.device)
    return (column < mask.lengths[..., None]).flatten(1)[:, : mask.kv_tokens]
