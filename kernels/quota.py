"""Splits a budget over groups in proportion to weights, in whole tokens and within group sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from vistoken.kernels.backends import choose_backend

LARGEST = 128  # groups that the Triton kernel holds in one program
_TINY = torch.finfo(torch.float32).tiny
# fp32 shares that miss a whole number by less than this part count as whole, so that equal weights
# get equal quotas; the floors still sum to at most the total, as long as total * SLACK < 1
SLACK = 2.0**-17


def split_quota(
    weight: Tensor,
    sizes: Tensor,
    keep: int,
    *,
    spread_leftover: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Return quotas [B, K] int64 that sum to `keep` in every row, each at most `sizes` [K].

    weight [B, K] is non-negative, of any scale, and is read in fp32; a row of zeros counts as
    equal weights. A group gets
    floor(weight share * keep). What the floors leave over goes to the heaviest group, or with
    `spread_leftover` one each to the heaviest groups. Groups that overflow give their surplus to
    those with room, in proportion to weight * room and again in floors, for as many rounds as
    there are groups; what then is missing goes to the heaviest group with room, and past its size
    to the next. Ties go to the lower index. `keep` may not exceed the sum of the sizes.

    backend: `reference` is plain torch, about 10 launches a round; `triton` is one launch. By
    default CUDA tensors of up to 128 groups take `triton` where it is installed.
    """
    if choose_backend("split_quota", backend, weight, LARGEST, "groups") == "reference":
        return _reference(weight.float(), sizes, keep, spread_leftover)
    from vistoken.kernels.quota_triton import split_quota_triton

    return split_quota_triton(weight.float(), sizes, keep, spread_leftover)


def _reference(weight: Tensor, sizes: Tensor, keep: int, spread_leftover: bool) -> Tensor:
    total = weight.sum(-1, keepdim=True)
    share = torch.where(total > 0, weight / total.clamp(min=_TINY), 1 / weight.shape[-1])
    weight = share.clamp(min=_TINY)
    heaviest = weight.argsort(dim=-1, descending=True, stable=True)
    quota = (weight * (keep * (1 + SLACK))).floor().long()
    if spread_leftover:
        missing = keep - quota.sum(-1, keepdim=True)
        quota = quota + (heaviest.argsort(dim=-1) < missing)
    surplus = (quota - sizes).clamp(min=0).sum(-1, keepdim=True)
    quota = quota.minimum(sizes)
    for _ in range(sizes.shape[-1]):
        pull = weight * (sizes - quota)
        part = pull / pull.sum(-1, keepdim=True).clamp(min=_TINY)
        more = (surplus * part * (1 + SLACK)).floor().long()
        larger = (quota + more).minimum(sizes)
        surplus = surplus - (larger - quota).sum(-1, keepdim=True)
        quota = larger
    room = (sizes - quota).gather(1, heaviest)
    missing = keep - quota.sum(-1, keepdim=True)
    given = (missing - (room.cumsum(-1) - room)).clamp(min=0).minimum(room)
    return quota.scatter_add(1, heaviest, given)
