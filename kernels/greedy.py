"""Greedy choice of tokens that are weighty and far from those already chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from vistoken.kernels.backends import choose_backend

LARGEST = 16384  # tokens that the Triton kernel holds in one program
# Scores that are no numbers count as this: below every real score, above a token already chosen.
LOWEST = torch.finfo(torch.float32).min
_TINY = torch.finfo(torch.float32).tiny


def product_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Return left [B, M, K] @ right [B, K, N] in fp32, accumulated in fp32.

    On CUDA two half-precision factors of one dtype are multiplied as they are, which is exact in
    fp32 and needs no copy; whatever else is converted first.
    """
    with torch.autocast(left.device.type, enabled=False):
        half = left.dtype == right.dtype and left.dtype in (torch.float16, torch.bfloat16)
        if half and left.is_cuda and torch.version.hip is None:
            return torch.bmm(left, right, out_dtype=torch.float32)
        return torch.bmm(left.float(), right.float())


def cosine_matrix(features: Tensor) -> Tensor:
    """Return the cosines [B, N, N] fp32 between the rows of `features` [B, N, C].

    A row of zeros has cosine 0 with every row. Takes two matrices N x N per picture, never
    N x N x C, and records no gradient.
    """
    features = features.detach()
    cosine = product_fp32(features, features.mT)
    square = cosine.diagonal(dim1=-2, dim2=-1).clone()
    # sqrt(a * a) is a: twin rows are at distance 0 exactly, which sqrt(a) * sqrt(a) would miss
    norms = (square[:, :, None] * square[:, None, :]).sqrt_().clamp_(min=_TINY)
    return cosine.div_(norms)


def pick_diverse(
    similarity: Tensor,
    weight: Tensor,
    first: Tensor,
    keep: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return `keep` different tokens [B, keep] int64 in the order of their choice.

    similarity [B, N, N] and weight [B, N], non-negative, are read in fp32; first [B] int64 is the
    first choice. Then, again and again, the token i with the largest
    weight_i * min over the chosen j of max(0, 1 - similarity_ji) is chosen; ties go to the lower
    index. A shorter `keep` gives the first picks of a longer one. Scores that are not a number
    come last; 1 <= keep <= N.

    backend: `reference` is plain torch, 8 launches a pick; `triton` is one launch and the same
    picks. By default CUDA tensors of up to 16384 tokens take `triton` where it is installed.
    """
    similarity, weight = similarity.detach().float(), weight.detach().float()
    if choose_backend("pick_diverse", backend, weight, LARGEST, "tokens") == "reference":
        return _reference(similarity, weight, first, keep)
    from vistoken.kernels.greedy_triton import pick_diverse_triton

    return pick_diverse_triton(similarity, weight, first, keep)


def _reference(similarity: Tensor, weight: Tensor, first: Tensor, keep: int) -> Tensor:
    pick = first.long()[:, None]
    picks = [pick]
    distance = torch.full_like(weight, torch.inf)
    taken = torch.zeros_like(weight, dtype=torch.bool)
    for _ in range(keep - 1):
        taken.scatter_(1, pick, True)
        row = similarity.gather(1, pick[..., None].expand(-1, -1, weight.shape[-1]))[:, 0]
        gap = (1 - row).clamp(min=0)
        distance = torch.where(gap < distance, gap, distance)  # leaves out what is no number
        score = weight * distance
        score = torch.where(score > LOWEST, score, LOWEST).masked_fill_(taken, -torch.inf)
        pick = score.argmax(dim=-1, keepdim=True)
        picks.append(pick)
    return torch.cat(picks, dim=1)
