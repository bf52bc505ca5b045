"""The gate before a time of `bench_kernels`: sampled results against dense attention in fp64.

Some tiles of queries, at the corners, in the middle and at random, are computed densely in fp64
from the same inputs; for the gradients of keys and values, some tiles of keys. The error of each
tile may be 1.5 times that of the same dense computation in the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vistoken.eval.bench_kernels_cases import Case, Inputs, visible
from vistoken.eval.timing import CheckFailed

TILE = 32
LIMIT = 1.5  # times the error of dense attention in the same dtype
LSE_LIMIT = 1e-4  # nats; of a window of 6,400 normal keys, a missing one costs 1.6e-4
FLOOR = {torch.float32: 1e-5}  # errors that small are right, whatever those of dense attention are

Seen = Callable[[Case, Tensor, Tensor], Tensor]


@dataclass
class Check:
    """The largest errors over all sampled tiles: of a result, and as a multiple of dense ones."""

    tiles: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def compare(self, name: str, found: Tensor, exact: Tensor, plain: Tensor) -> None:
        """Take in one tile of a result, its fp64 value, and that of plain dense attention.

        Raises `CheckFailed` where the error is too large; NaN is.
        """
        error, usual = (_distance(x, exact) for x in (found, plain))
        usual = max(usual, FLOOR.get(found.dtype, 0.0) / LIMIT)
        self._note(name, error, error / usual)
        if not error <= LIMIT * usual:
            raise CheckFailed(
                f"{name} is off by {error:.2e}; dense attention in {found.dtype} by {usual:.2e}"
            )

    def compare_lse(self, found: Tensor, exact: Tensor) -> None:
        """Take in one tile of the log-sum-exp; raises `CheckFailed` where it is wrong."""
        error = float((found.double() - exact).abs().max())
        self._note("lse", error, error / LSE_LIMIT)
        if not error <= LSE_LIMIT:
            raise CheckFailed(f"lse is off by {error:.2e}, more than {LSE_LIMIT:.0e}")

    def _note(self, name: str, error: float, ratio: float) -> None:
        self.tiles += 1
        self.errors[name] = max(error, self.errors.get(name, 0.0))
        self.ratios[name] = max(ratio, self.ratios.get(name, 0.0))

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain values."""
        return asdict(self)


def _distance(found: Tensor, exact: Tensor) -> float:
    """Relative Frobenius distance."""
    return float((found.double() - exact).norm() / exact.norm())


def sees_all(case: Case, queries: Tensor, keys: Tensor) -> Tensor:
    """Return what `visible` returns for dense attention."""
    return torch.ones(len(queries), len(keys), dtype=torch.bool, device=queries.device)


def sample_tiles(case: Case, device: torch.device) -> list[Tensor]:
    """Return the tokens of some tiles: text, first, middle, last of the grid, and two at random."""
    begin, end = case.text, max(case.tokens - TILE, case.text)
    generator = torch.Generator().manual_seed(case.tokens)
    starts = [0, begin, (begin + end) // 2, end]
    starts += torch.randint(begin, end + 1, (2,), generator=generator).tolist()
    return [
        torch.arange(start, min(start + TILE, case.tokens), device=device)
        for start in dict.fromkeys(starts)
    ]


def _heads(case: Case) -> Iterator[tuple[int, int]]:
    """The first head of the first row of the batch, and the last one of the last."""
    yield from dict.fromkeys(((0, 0), (case.batch - 1, case.heads - 1)))


@torch.no_grad()
def check_forward(
    case: Case, given: Inputs, out: Tensor, lse: Tensor | None = None, seen: Seen = visible
) -> Check:
    """Compare sampled tiles of a forward with dense attention; raises `CheckFailed`.

    out [batch, tokens, heads, dim], lse [batch, tokens, heads] where there is one.
    """
    check = Check()
    if out.shape != given.q.shape:
        raise CheckFailed(f"the output has the shape {list(out.shape)}, not {list(given.q.shape)}")
    every = torch.arange(case.tokens, device=out.device)
    for tile in sample_tiles(case, out.device):
        mask = seen(case, tile, every)
        for b, h in _heads(case):
            q, k, v = given.q[b, tile, h], given.k[b, :, h], given.v[b, :, h]
            logits = _logits(q, k, mask)
            exact = logits.softmax(-1) @ v.double()
            check.compare("out", out[b, tile, h], exact, _plain(q, k, v, mask))
            if lse is not None:
                check.compare_lse(lse[b, tile, h], logits.logsumexp(-1))
    return check


def _logits(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Scaled and masked logits in fp64: q [m, dim], k [n, dim], mask [m, n]."""
    scale = q.shape[-1] ** -0.5
    return (q.double() @ k.double().mT * scale).masked_fill_(~mask, -torch.inf)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Dense attention in the dtype of the inputs, as torch computes it."""
    q, k, v = (x[None, None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)[0, 0]


@torch.no_grad()
def check_backward(
    case: Case, given: Inputs, out: Tensor, lse: Tensor, grads: Sequence[Tensor]
) -> Check:
    """Compare sampled tiles of dq, dk and dv with dense attention; raises `CheckFailed`.

    out and lse are those of the forward, which `check_forward` has seen; the gradients of keys are
    computed from them.
    """
    check = Check()
    every = torch.arange(case.tokens, device=out.device)
    for tile in sample_tiles(case, out.device):
        rows, columns = visible(case, tile, every), visible(case, every, tile)
        for b, h in _heads(case):
            one = Inputs(*(x[b, :, h] for x in (given.q, given.k, given.v, given.d_out)))
            dq, dk, dv = (x[b, tile, h] for x in grads)
            check.compare("dq", dq, *_query_gradient(one, tile, rows))
            exact, plain = _key_gradients(one, tile, columns, out[b, :, h], lse[b, :, h])
            check.compare("dk", dk, exact[0], plain[0])
            check.compare("dv", dv, exact[1], plain[1])
    return check


def _query_gradient(one: Inputs, tile: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """dq of a tile of one head, in fp64 and by torch's dense attention."""
    k, v, d_out = one.k.double(), one.v.double(), one.d_out[tile].double()
    weights = _logits(one.q[tile], one.k, mask).softmax(-1)
    d_weights = d_out @ v.mT
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
    exact = d_logits @ k * one.q.shape[-1] ** -0.5
    with torch.enable_grad():
        q = one.q[tile].detach().requires_grad_()
        out = _plain(q, one.k, one.v, mask)
        (plain,) = torch.autograd.grad(out, q, one.d_out[tile])
    return exact, plain


def _key_gradients(
    one: Inputs, tile: Tensor, mask: Tensor, out: Tensor, lse: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(dk, dv) of a tile of one head in fp64, and with weights rounded to the inputs' dtype."""
    scale, dtype = one.q.shape[-1] ** -0.5, one.q.dtype
    q, d_out = one.q.double(), one.d_out.double()
    logits = _logits(one.q, one.k[tile], mask)
    weights = (logits - lse.double()[:, None]).exp()
    delta = (d_out * out.double()).sum(-1, keepdim=True)
    d_logits = weights * (d_out @ one.v[tile].double().mT - delta)
    exact = d_logits.mT @ q * scale, weights.mT @ d_out
    rounded = d_logits.to(dtype).double(), weights.to(dtype).double()
    plain = (rounded[0].mT @ q * scale).to(dtype), (rounded[1].mT @ d_out).to(dtype)
    return exact, plain
