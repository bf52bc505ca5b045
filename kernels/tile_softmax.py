"""Softmax attention of batches of query tiles to parts of the keys, in plain torch.

Every tensor here is of the dtype that is computed in, fp32 or fp64, and has one leading axis P of
tiles that are computed at once. Keys and values come as lists of parts, which make one softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class TileMask(NamedTuple):
    """What a tile's queries see of the first of its keys; both [M, K] or [P, M, K].

    keep: all bits set where a key is seen, integers of the size of a logit; bias: 0 there, else
    -inf. Clearing the bits of a logit first makes a hidden key harmless that is not a number, and
    the two passes take a third of the time of one `where`.
    """

    keep: Tensor
    bias: Tensor


def tile_mask(seen: Tensor, dtype: torch.dtype) -> TileMask:
    """Return the mask of bool `seen` for logits of `dtype`."""
    keep = seen.to(_BITS[dtype]).neg_()
    bias = torch.zeros_like(keep, dtype=dtype).masked_fill_(~seen, -torch.inf)
    return TileMask(keep, bias)


def without_autocast(device: torch.device) -> torch.autocast:
    """Return a context in which operations compute in the dtypes that they are given."""
    there = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type if there else "cpu", enabled=False)


class Scratch:
    """Two matrices of logits that calls share: fresh memory for each costs more than a product."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._flat = [like.new_empty(0, dtype=dtype) for _ in range(2)]

    def pair(self, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Return two tensors of a shape; what earlier calls gave is overwritten."""
        size = shape[0] * shape[1] * shape[2]
        for i, flat in enumerate(self._flat):
            if flat.numel() < size:
                self._flat[i] = flat.new_empty(size)
        first, second = (flat[:size].view(shape) for flat in self._flat)
        return first, second


def attend(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    mask: TileMask | None,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """Return out [P, M, Dv] and lse [P, M, 1] of scaled queries q [P, M, D].

    keys [P, K, D] and values [P, K, Dv] of every part; mask: of the first keys, None if all are
    seen. Every query must see a key.
    """
    logits, weights = scratch.pair((*q.shape[:2], _columns(keys)))
    _products(q, keys, out=logits)
    _hide(logits, mask)
    torch.softmax(logits, -1, out=weights)
    # the largest weight is 1 / sum(exp(logit - largest logit))
    lse = logits.amax(-1, keepdim=True).sub_(weights.amax(-1, keepdim=True).log_())
    return _combine(weights, values), lse


def attend_backward(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    mask: TileMask | None,
    lse: Tensor,
    d_out: Tensor,
    delta: Tensor,
    scratch: Scratch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq [P, M, D], the weights [P, M, K] and the gradient of the logits [P, M, K].

    dq is for the scaled queries. delta [P, M, 1]: sum(d_out * out) less the gradient of the lse.
    The last two live until the next call with this scratch.
    """
    weights, d_logits = scratch.pair((*q.shape[:2], _columns(keys)))
    _products(q, keys, out=weights)
    _hide(weights, mask)
    weights.sub_(lse).exp_()
    _products(d_out, values, out=d_logits)
    d_logits.sub_(delta).mul_(weights)
    return _combine(d_logits, keys), weights, d_logits


def _columns(parts: Sequence[Tensor]) -> int:
    return sum(part.shape[1] for part in parts)


def _products(rows: Tensor, parts: Sequence[Tensor], out: Tensor) -> None:
    """Write rows [P, M, D] times each part [P, K, D] into out [P, M, all K]."""
    for part, columns in zip(parts, _slices(out, parts), strict=True):
        torch.bmm(rows, part.mT, out=columns)


def _combine(weights: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Return weights [P, M, all K] times the parts [P, K, D] put together."""
    slices = _slices(weights, parts)
    out = torch.bmm(slices[0], parts[0])
    for columns, part in zip(slices[1:], parts[1:], strict=True):
        out.baddbmm_(columns, part)
    return out


def _slices(whole: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (whole,) if len(parts) == 1 else whole.split([part.shape[1] for part in parts], -1)


def _hide(logits: Tensor, mask: TileMask | None) -> None:
    if mask is None:
        return
    masked = logits[..., : mask.keep.shape[-1]]
    masked.view(mask.keep.dtype).bitwise_and_(mask.keep)
    masked.add_(mask.bias)
