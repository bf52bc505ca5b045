"""One step of attention between a tile of rows and a tile of columns, as parts of Triton kernels.

Scores are kept unscaled; `scale` is |softmax scale| * log2(e) and positive (a negative softmax
scale turns the sign of the row operand, and 0 is given as a tiny number), so that exponentials are
powers of two and the largest score needs no product per element. A hidden pair scores -inf; the
running maximum starts at a finite floor, so no difference of infinities ever arises.
"""

# Triton gives annotations of a kernel a meaning of its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
TINY_SCALE = 1e-37  # stands for 0: scores vanish, and -inf stays -inf
FLOOR = tl.constexpr(-1e28)  # below every score, and finite
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_LN_2 = tl.constexpr(LN_2)
_LOG2_E = tl.constexpr(LOG2_E)


def log2_scale(scale: float) -> float:
    """Return the `scale` of the steps for a softmax scale of any sign."""
    return max(abs(scale) * LOG2_E, TINY_SCALE)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b in fp32. UPCAST: through fp32 operands, as the interpreter needs it for bf16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_add(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b in fp32; a is rounded to the dtype of b."""
    a = a.to(b.dtype)
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_tile(
    base, offsets, inside, CHECK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """Load [rows, BLOCK_WIDTH] at base + offsets; zero beyond WIDTH and, with CHECK, not inside."""
    lane = tl.arange(0, BLOCK_WIDTH)
    pointers = base + offsets[:, None] + lane[None, :]
    if CHECK:
        if WIDTH == BLOCK_WIDTH:
            return tl.load(pointers, mask=inside[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=inside[:, None] & (lane < WIDTH)[None, :], other=0.0)
    else:
        if WIDTH == BLOCK_WIDTH:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(lane < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(base, offsets, inside, tile, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Store [rows, BLOCK_WIDTH] at base + offsets, up to WIDTH, in the rows that are inside."""
    lane = tl.arange(0, BLOCK_WIDTH)
    pointers = base + offsets[:, None] + lane[None, :]
    mask = inside[:, None] & (lane < WIDTH)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def softmax_step(
    q,
    k,
    v,
    seen,
    acc,
    total,
    top,
    scale,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add keys and values k [n, D], v [n, Dv] to the running softmax of q [m, D].

    seen: bool [m, n], or [1, n]; read with MASKED only. acc [m, Dv], total [m] and top [m] are the
    weighted sum, the sum of weights and the largest scaled score.
    """
    score = dot(q, tl.trans(k), PRECISION, UPCAST)
    if MASKED:
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1) * scale)
    weight = tl.exp2(score * scale - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weight, 1)
    acc = dot_add(weight, v, acc * shrink[:, None], PRECISION, UPCAST)
    return acc, total, higher


@triton.jit
def softmax_end(acc, total, top):
    """The output [m, Dv] and the natural log-sum-exp [m]; a row that saw nothing has 0 and -inf."""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(total)) * _LN_2)
    return tl.where(empty[:, None], 0.0, acc / total[:, None]), lse


@triton.jit
def load_lse(pointers, inside, CHECK: tl.constexpr):
    """The log-sum-exp in powers of two; +inf, with which all weights are 0, where there is none.

    Without CHECK all are inside, and all saw a key.
    """
    if CHECK:
        lse = tl.load(pointers, mask=inside, other=float("-inf"))
        return tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)
    else:
        return tl.load(pointers) * _LOG2_E


@triton.jit
def query_gradient_step(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    seen,
    d_q,
    scale,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add what keys k [n, D] contribute to d_q [m, D], before the softmax scale."""
    score = dot(q, tl.trans(k), PRECISION, UPCAST)
    if MASKED:
        score = tl.where(seen, score, float("-inf"))
    weight = tl.exp2(score * scale - lse[:, None])
    slope = dot(d_out, tl.trans(v), PRECISION, UPCAST)
    slope = weight * (slope - delta[:, None])
    return dot_add(slope, k, d_q, PRECISION, UPCAST)


@triton.jit
def key_gradient_step(
    k,
    v,
    q,
    d_out,
    lse,
    delta,
    seen,
    d_k,
    d_v,
    scale,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add what queries q [n, D] contribute to d_k [m, D], before the softmax scale, and d_v."""
    score = dot(k, tl.trans(q), PRECISION, UPCAST)
    if MASKED:
        score = tl.where(seen, score, float("-inf"))
    weight = tl.exp2(score * scale - lse[None, :])
    d_v = dot_add(weight, d_out, d_v, PRECISION, UPCAST)
    slope = dot(v, tl.trans(d_out), PRECISION, UPCAST)
    slope = weight * (slope - delta[None, :])
    d_k = dot_add(slope, q, d_k, PRECISION, UPCAST)
    return d_k, d_v
