"""`split_quota` as one Triton program per row."""

# Triton gives annotations of a kernel a meaning of its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.quota import SLACK

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _split_quota_kernel(
    weight_ptr,
    sizes_ptr,
    quota_ptr,
    keep,
    target,
    groups,
    SPREAD: tl.constexpr,
    SLACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < groups
    weight = tl.load(weight_ptr + row * groups + lane, mask=inside, other=0.0)
    sizes = tl.load(sizes_ptr + lane, mask=inside, other=0)
    total = tl.sum(weight, 0)
    weight = tl.where(total > 0, weight, 1.0)
    total = tl.where(total > 0, total, groups * 1.0)
    weight = tl.div_rn(weight, tl.zeros_like(weight) + total)
    weight = tl.where(inside, tl.maximum(weight, _TINY), 0.0)
    heavier = (weight[None, :] > weight[:, None]) | (
        (weight[None, :] == weight[:, None]) & (lane[None, :] < lane[:, None])
    )
    rank = tl.sum(heavier.to(tl.int32), 1)

    quota = tl.floor(weight * target).to(tl.int32)
    if SPREAD:
        missing = keep - tl.sum(quota, 0)
        quota += (inside & (rank < missing)).to(tl.int32)
    surplus = tl.sum(tl.maximum(quota - sizes, 0), 0)
    quota = tl.minimum(quota, sizes)
    for _ in range(groups):
        pull = weight * (sizes - quota).to(tl.float32)
        part = tl.div_rn(pull, tl.zeros_like(pull) + tl.maximum(tl.sum(pull, 0), _TINY))
        more = tl.floor(surplus.to(tl.float32) * part * SLACKED).to(tl.int32)
        larger = tl.minimum(quota + more, sizes)
        surplus -= tl.sum(larger - quota, 0)
        quota = larger
    room = sizes - quota
    missing = keep - tl.sum(quota, 0)
    before = tl.sum(tl.where(heavier, room[None, :], 0), 1)
    quota += tl.minimum(tl.maximum(missing - before, 0), room)
    tl.store(quota_ptr + row * groups + lane, quota.to(tl.int64), mask=inside)


def split_quota_triton(weight: Tensor, sizes: Tensor, keep: int, spread_leftover: bool) -> Tensor:
    """One launch for [B, K] fp32 weights; see `vistoken.kernels.split_quota`."""
    rows, groups = weight.shape
    quota = torch.empty(rows, groups, dtype=torch.int64, device=weight.device)
    _split_quota_kernel[(rows,)](
        weight.contiguous(),
        sizes.to(torch.int32).contiguous(),
        quota,
        keep,
        keep * (1 + SLACK),
        groups,
        SPREAD=spread_leftover,
        SLACKED=1 + SLACK,
        BLOCK=triton.next_power_of_2(max(groups, 2)),
        num_warps=1,
    )
    return quota
