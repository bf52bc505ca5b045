"""`pick_diverse` as one Triton program per picture, which holds the distances in registers."""

# Triton gives annotations of a kernel a meaning of its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.greedy import LOWEST

_LOWEST = tl.constexpr(LOWEST)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _pick_diverse_kernel(
    similarity_ptr,
    weight_ptr,
    first_ptr,
    picks_ptr,
    tokens,
    keep,
    BLOCK: tl.constexpr,
):
    picture = tl.program_id(0).to(tl.int64)
    similarity_ptr += picture * tokens * tokens
    picks_ptr += picture * keep
    lane = tl.arange(0, BLOCK)
    inside = lane < tokens
    weight = tl.load(weight_ptr + picture * tokens + lane, mask=inside, other=0.0)
    distance = tl.full([BLOCK], _INF, tl.float32)
    free = inside
    pick = tl.load(first_ptr + picture).to(tl.int32)
    tl.store(picks_ptr, pick.to(tl.int64))
    for step in range(1, keep):
        free = free & (lane != pick)
        row = tl.load(similarity_ptr + pick.to(tl.int64) * tokens + lane, mask=inside, other=1.0)
        gap = 1.0 - row
        gap = tl.where(gap < 0.0, 0.0, gap)
        distance = tl.where(gap < distance, gap, distance)
        score = weight * distance
        score = tl.where(score > _LOWEST, score, _LOWEST)
        score = tl.where(free, score, -_INF)
        pick = tl.argmax(score, 0).to(tl.int32)  # the lower index among equals
        tl.store(picks_ptr + step, pick.to(tl.int64))


def pick_diverse_triton(similarity: Tensor, weight: Tensor, first: Tensor, keep: int) -> Tensor:
    """One launch for fp32 similarity [B, N, N]; see `vistoken.kernels.greedy.pick_diverse`."""
    pictures, tokens = weight.shape
    picks = torch.empty(pictures, keep, dtype=torch.int64, device=weight.device)
    block = triton.next_power_of_2(max(tokens, 2))
    _pick_diverse_kernel[(pictures,)](
        similarity.contiguous(),
        weight.contiguous(),
        first.long().contiguous(),
        picks,
        tokens,
        keep,
        BLOCK=block,
        num_warps=min(max(block // 512, 4), 32),
    )
    return picks
