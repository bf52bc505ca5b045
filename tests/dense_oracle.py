"""Attention under a mask in fp64, with its gradients by hand, and how far a result may lie from it.

Everything is dense and nothing here imports the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Relative Frobenius distance to fp64 of results and of gradients.
BUDGETS = {torch.float64: (1e-13, 1e-12), torch.float32: (2e-6, 1e-5)}
# In half precision: so many times the distance at which rounding leaves a dense computation whose
# sums are exact. The lse is never rounded to half precision.
TIMES = 1.5
HALF_LSE = 1e-5
# A gradient in which large parts cancel is held to this share of their norm instead of its own.
SHARE = 0.05


class Solution(NamedTuple):
    """Tokens before heads: out [B, M, Hq, Dv], lse [B, M, Hq], gradients like their inputs.

    parts: for every gradient the sums of the absolute values of what it is a sum of.
    """

    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor]
    parts: dict[str, Tensor]
    largest_logit: float


def solve_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    factor: float,
    d_out: Tensor | None = None,
    d_lse: Tensor | None = None,
    low: bool = False,
) -> Solution:
    """q [B, M, Hq, D], k [B, N, Hkv, D], v [B, N, Hkv, Dv]; seen bool [B or 1, Hq or 1, M, N].

    A row that sees nothing has out 0 and lse -inf. Gradients are those of sum(out * d_out) +
    sum(lse * d_lse). low: sums stay exact, but the weights, the gradient of the logits and every
    result are rounded to the dtype of q, as any computation in that dtype must.
    """
    dtype, kv_heads = q.dtype, k.shape[2]
    groups = q.shape[2] // kv_heads

    def cut(x: Tensor) -> Tensor:
        return x.to(dtype).double() if low else x

    def heads_first(x: Tensor, times: int = 1) -> Tensor:
        return x.detach().double().transpose(1, 2).repeat_interleave(times, 1)

    q, k, v = heads_first(q), heads_first(k, groups), heads_first(v, groups)
    logits = (q @ k.mT * factor).masked_fill(~seen, -math.inf)
    lse = logits.logsumexp(-1)
    p = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    out = cut(cut(p) @ v)
    some = logits[logits > -math.inf]
    largest = float(some.abs().max()) if some.numel() else 0.0
    if d_out is None:
        return Solution(out.transpose(1, 2), lse.transpose(1, 2), {}, {}, largest)
    d_out = heads_first(d_out)
    d_lse = torch.zeros_like(lse) if d_lse is None else d_lse.double().transpose(1, 2)
    dp, delta = d_out @ v.mT, (d_out * out).sum(-1) - d_lse
    ds = cut(p * (dp - delta[..., None]))
    rest = (d_out.abs() * out.abs()).sum(-1) + d_lse.abs()
    sizes = p * (dp.abs() + rest[..., None])

    def pack(dq: Tensor, dk: Tensor, dv: Tensor) -> dict[str, Tensor]:
        dk, dv = (x.unflatten(1, (kv_heads, groups)).sum(2) for x in (dk, dv))
        return {name: cut(x.transpose(1, 2)) for name, x in zip("qkv", (dq, dk, dv), strict=True)}

    size = abs(factor)
    grads = pack(ds @ k * factor, ds.mT @ q * factor, cut(p).mT @ d_out)
    parts = pack(sizes @ k.abs() * size, sizes.mT @ q.abs() * size, p.mT @ d_out.abs())
    return Solution(out.transpose(1, 2), lse.transpose(1, 2), grads, parts, largest)


def distance(found: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    """Relative Frobenius distance; other shapes, NaN and other infinities are infinitely far."""
    if found.shape != wanted.shape:
        return math.inf
    found, wanted = found.detach().double(), wanted.detach().double()
    finite = wanted.isfinite()
    if not torch.equal(found[~finite], wanted[~finite]) or not found[finite].isfinite().all():
        return math.inf
    gap = float((found[finite] - wanted[finite]).norm())
    size = max(float(wanted[finite].norm()), floor)
    return gap / size if size else gap


@dataclass(frozen=True)
class Limit:
    """The budget of one computation: its dtype, its number of rows, its largest logit."""

    dtype: torch.dtype
    rows: int
    largest_logit: float

    def check_result(self, name: str, found: Tensor, exact: Tensor, dense: Tensor | None) -> None:
        """dense: the result that is rounded as the dtype must be, for half precision."""
        self._check(name, distance(found, exact), self._allowed(0, found, exact, dense))

    def check_lse(self, name: str, found: Tensor, exact: Tensor) -> None:
        """It is rounded as logits and as numbers around 1 are, however small it is."""
        assert found.dtype == torch.promote_types(self.dtype, torch.float32), name
        far = distance(found, exact, math.sqrt(found.numel()))
        self._check(name, far, self._precise(0) if self.dtype in BUDGETS else HALF_LSE)

    def check_gradient(
        self, name: str, found: Tensor, exact: Tensor, dense: Tensor | None, parts: Tensor
    ) -> None:
        """parts: the absolute values of what the gradient is a sum of."""
        size = float(parts.norm())
        far = distance(found, exact, SHARE * size)
        self._check(name, far, self._allowed(1, found, exact, dense, size))

    def _precise(self, part: int) -> float:
        """exp turns the rounding of a logit of size x into a relative error of x."""
        return BUDGETS[self.dtype][part] * max(1.0, self.largest_logit / 8)

    def _allowed(
        self, part: int, found: Tensor, exact: Tensor, dense: Tensor | None, size: float = 0.0
    ) -> float:
        assert found.dtype == self.dtype
        if dense is None:
            return self._precise(part)
        floor = SHARE * size
        # of a few numbers, how far each is rounded is a matter of luck
        few = min(self.rows, max(found.numel(), 1))
        own = max(float(exact.norm()), floor)
        luck = max(1.0, size / own if own else 1.0) / math.sqrt(few)
        return TIMES * distance(dense, exact, floor) + torch.finfo(self.dtype).eps * (0.02 + luck)

    @staticmethod
    def _check(name: str, far: float, limit: float) -> None:
        assert far <= limit, f"{name} lies {far:.2e} from fp64, limit {limit:.2e}"
