"""One row of attention: what a single query reads, without the map it belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_row(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return softmax(query · keys * scale) over the keys, in fp32.

    query [..., Q, D] and keys [..., K, D] in any floating dtype; the products, the softmax and
    the result [..., Q, K] are fp32. For one query among K keys this costs O(K · D) where the
    whole map costs O(K² · D).
    """
    with torch.autocast(query.device.type, enabled=False):
        logits = query.float() @ keys.float().transpose(-1, -2) * scale
        return logits.softmax(dim=-1)
