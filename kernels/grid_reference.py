"""Attention over the windows of a grid, dense and by definition: what every backend must equal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from vistoken.kernels.windows import Window


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    global_q: Tensor | None = None,
) -> str | None:
    """Return None: the definition runs on every device and in every floating dtype."""
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    global_q: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (out, lse, global_out, global_lse) of attention over the windows of a grid.

    q [B, T, H, W, Hq, D], k [B, T, H, W, Hkv, D], v [B, T, H, W, Hkv, Dv]; every query sees
    `extra_k` [B, N, Hkv, D] and `extra_v` [B, N, Hkv, Dv] too, and `global_q` [B, G, Hq, D] sees
    every key. Query head h reads the kv head h // (Hq // Hkv).

    out [B, T, H, W, Hq, Dv] and global_out [B, G, Hq, Dv] have the dtype of q; lse [B, T, H, W, Hq]
    and global_lse [B, G, Hq], the natural logarithm of the sum of exp(scale * q k), are fp32, and
    fp64 where q is. The last two are None without `global_q`. Computed in fp32, or fp64; takes the
    whole matrix of queries by keys; differentiable any number of times.
    """
    visible = window.visible(q.device)
    queries, keys, values = q.flatten(1, 3), k.flatten(1, 3), v.flatten(1, 3)
    tokens = queries.shape[1]
    if extra_k is not None and extra_v is not None:
        keys, values = torch.cat([keys, extra_k], 1), torch.cat([values, extra_v], 1)
        visible = pad(visible, (0, extra_k.shape[1]), value=True)
    if global_q is not None:
        queries = torch.cat([queries, global_q], 1)
        visible = pad(visible, (0, 0, 0, global_q.shape[1]), value=True)
    out, lse = attend(queries, keys, values, visible, scale)
    grid_out = out[:, :tokens].unflatten(1, window.grid)
    grid_lse = lse[:, :tokens].unflatten(1, window.grid)
    if global_q is None:
        return grid_out, grid_lse, None, None
    return grid_out, grid_lse, out[:, tokens:], lse[:, tokens:]


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [B, M, Hq, Dv] and lse [B, M, Hq] of dense attention under a mask.

    q [B, M, Hq, D], k [B, N, Hkv, D], v [B, N, Hkv, Dv]; visible bool [M, N]: every row sees a key.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(2, (k.shape[2], -1))
    logits = torch.einsum("bmhrd,bnhd->bmhrn", grouped, k.to(wide)) * scale
    logits = logits.masked_fill(~visible[:, None, None, :], -torch.inf)
    out = torch.einsum("bmhrn,bnhe->bmhre", logits.softmax(-1), v.to(wide))
    return out.flatten(2, 3).to(q.dtype), logits.logsumexp(-1).flatten(2, 3)
