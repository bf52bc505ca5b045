"""The row sums that a backward pass of attention needs, without a copy of its inputs."""

# Triton gives annotations of a kernel a meaning of its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _delta(d_out, out, d_lse, delta, rows, D: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    on = row < rows
    gradient = tl.load(d_out + at, mask=on[:, None], other=0.0).to(tl.float32)
    value = tl.load(out + at, mask=on[:, None], other=0.0).to(tl.float32)
    total = tl.sum(gradient * value, 1)
    if d_lse is not None:
        total -= tl.load(d_lse + row, mask=on, other=0.0)
    tl.store(delta + row, total, mask=on)


def row_delta(d_out: Tensor, out: Tensor, d_lse: Tensor | None) -> Tensor:
    """Return sum(d_out * out) - d_lse of every row, fp32 [...] for d_out and out [..., D].

    d_out and out are contiguous, D is a power of two; d_lse [...] fp32 or None.
    """
    delta = torch.empty(out.shape[:-1], dtype=torch.float32, device=out.device)
    rows, width = delta.numel(), out.shape[-1]
    if rows:
        d_lse = None if d_lse is None else d_lse.contiguous()
        _delta[(triton.cdiv(rows, 64),)](d_out, out, d_lse, delta, rows, D=width, ROWS=64)
    return delta
