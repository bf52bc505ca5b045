"""Rows of attention: what chosen queries read, without the map they belong to."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 26  # probabilities held at once: 256 MiB


def attention_row(
    query: Tensor, keys: Tensor, scale: float, allowed: Tensor | None = None
) -> Tensor:
    """Return softmax(query · keys * scale) over the keys, in fp32.

    query [..., Q, D] and keys [..., K, D] in any floating dtype; the products, the softmax and
    the result [..., Q, K] are fp32. With fewer key heads than query heads (query [B, H, Q, D],
    keys [B, H / g, K, D]), g neighbouring query heads share one. `allowed` [..., Q, K] bool, which
    broadcasts against the result, marks the keys that each query may see; a query that sees none
    gets zeros. For one query among K keys this costs O(K · D) where the map costs O(K² · D).
    """
    with torch.autocast(query.device.type, enabled=False):
        query, keys = query.float(), keys.float().transpose(-1, -2)
        if query.dim() == 4 and query.shape[1] > keys.shape[1] > 1:
            grouped = query.unflatten(1, (keys.shape[1], -1))
            logits = (grouped @ keys[:, :, None]).flatten(1, 2) * scale
        else:
            logits = query @ keys * scale
        if allowed is None:
            return logits.softmax(dim=-1)
        lowest = torch.finfo(torch.float32).min  # finite: a row that sees nothing stays a number
        return logits.masked_fill(~allowed, lowest).softmax(dim=-1) * allowed


def attention_received(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return the mean over the queries of softmax(query · keys * scale), in fp32.

    query [..., Q, D] and keys [..., K, D] in any floating dtype; the result [..., K] says how much
    attention each key receives. Computed for some queries at a time, so that no map is held.
    """
    leading = query[..., 0, 0].numel()
    step = max(1, _CHUNK // (leading * keys.shape[-2]))
    total = torch.zeros(keys.shape[:-1], dtype=torch.float32, device=keys.device)
    for some in query.split(step, dim=-2):
        total = total + attention_row(some, keys, scale).sum(dim=-2)
    return total / query.shape[-2]
