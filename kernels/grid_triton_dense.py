"""Tokens beside the grid in Triton: global queries, which see all keys, and the gradients of both.

A few rows meet all tokens of the grid, so the columns are cut into parts that programs take in
parallel; each writes its own fp32 result, and the parts are added afterwards, always in one order.
"""

# Triton gives annotations of a kernel a meaning of its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.triton_box import head_of, offsets
from vistoken.kernels.triton_launch import Launch, options, shared_options, strides
from vistoken.kernels.triton_tile import (
    FLOOR,
    key_gradient_step,
    load_lse,
    load_tile,
    log2_scale,
    query_gradient_step,
    softmax_end,
    softmax_step,
    store_tile,
)

PROGRAMS = 512  # how many programs a launch should have at least
PART = 512  # tokens that a part has at least


@triton.jit
def dense_forward_kernel(
    q_base, k_base, v_base, out_base, lse_base, extra_k_base, extra_v_base,
    q_strides, k_strides, v_strides, extra_k_strides, extra_v_strides, grid,
    queries, heads, share, extra, parts, part_tokens, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXTRA: tl.constexpr,
    FLIP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the output and log-sum-exp of each part, fp32 [parts, B, G, heads, ...]."""
    tile, part, head, batch = _program(tl.cdiv(queries, ROWS), parts, heads)
    m = tile * ROWS + tl.arange(0, ROWS)
    inside = m < queries
    q = load_tile(
        head_of(q_base, batch, head, q_strides), m.to(tl.int64) * q_strides[3], inside,
        True, D, BLOCK_D,
    )  # fmt: skip
    if FLIP:
        q = -q
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], FLOOR, tl.float32)

    k_head = head_of(k_base, batch, head // share, k_strides)
    v_head = head_of(v_base, batch, head // share, v_strides)
    begin, end = _part(part, part_tokens, grid)
    for first in range(begin, end, COLUMNS):
        there, t, h, w = _tokens(first, end, grid, COLUMNS)
        k = load_tile(k_head, offsets(t, h, w, k_strides), there, True, D, BLOCK_D)
        v = load_tile(v_head, offsets(t, h, w, v_strides), there, True, DV, BLOCK_DV)
        acc, total, top = softmax_step(
            q, k, v, there[None, :], acc, total, top, scale, True, PRECISION, UPCAST
        )
    if EXTRA:
        k_head = head_of(extra_k_base, batch, head // share, extra_k_strides)
        v_head = head_of(extra_v_base, batch, head // share, extra_v_strides)
        for first in range(0, tl.where(part == parts - 1, extra, 0), COLUMNS):
            n = first + tl.arange(0, COLUMNS)
            there = n < extra
            n = n.to(tl.int64)
            k = load_tile(k_head, n * extra_k_strides[3], there, True, D, BLOCK_D)
            v = load_tile(v_head, n * extra_v_strides[3], there, True, DV, BLOCK_DV)
            acc, total, top = softmax_step(
                q, k, v, there[None, :], acc, total, top, scale, True, PRECISION, UPCAST
            )
    out, lse = softmax_end(acc, total, top)
    batches = tl.num_programs(0) // (tl.cdiv(queries, ROWS) * parts * heads)
    row = ((part.to(tl.int64) * batches + batch) * queries + m) * heads + head
    store_tile(out_base, row * DV, inside, out, DV, BLOCK_DV)
    tl.store(lse_base + row, lse, mask=inside)


@triton.jit
def dense_query_gradient_kernel(
    q_base, k_base, v_base, d_out_base, out_base, lse_base, d_lse_base, delta_base, d_q_base,
    extra_k_base, extra_v_base,
    q_strides, k_strides, v_strides, d_out_strides, out_strides, extra_k_strides, extra_v_strides,
    grid, queries, heads, share, extra, parts, part_tokens, scale, softmax_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXTRA: tl.constexpr, D_LSE: tl.constexpr,
    FLIP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write d_q of each part, fp32 [parts, B, G, heads, D], and delta [B, G, heads]."""
    tile, part, head, batch = _program(tl.cdiv(queries, ROWS), parts, heads)
    m = tile * ROWS + tl.arange(0, ROWS)
    inside = m < queries
    rows = m.to(tl.int64)
    q = load_tile(
        head_of(q_base, batch, head, q_strides), rows * q_strides[3], inside, True, D, BLOCK_D
    )
    d_out = load_tile(
        head_of(d_out_base, batch, head, d_out_strides), rows * d_out_strides[3], inside,
        True, DV, BLOCK_DV,
    )  # fmt: skip
    out = load_tile(
        head_of(out_base, batch, head, out_strides), rows * out_strides[3], inside,
        True, DV, BLOCK_DV,
    )  # fmt: skip
    row = (batch.to(tl.int64) * queries + m) * heads + head
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    if D_LSE:
        delta -= tl.load(d_lse_base + row, mask=inside, other=0.0)
    tl.store(delta_base + row, delta, mask=inside & (part == 0))
    lse = load_lse(lse_base + row, inside, True)
    if FLIP:
        q = -q
    d_q = tl.zeros([ROWS, BLOCK_D], tl.float32)

    k_head = head_of(k_base, batch, head // share, k_strides)
    v_head = head_of(v_base, batch, head // share, v_strides)
    begin, end = _part(part, part_tokens, grid)
    for first in range(begin, end, COLUMNS):
        there, t, h, w = _tokens(first, end, grid, COLUMNS)
        k = load_tile(k_head, offsets(t, h, w, k_strides), there, True, D, BLOCK_D)
        v = load_tile(v_head, offsets(t, h, w, v_strides), there, True, DV, BLOCK_DV)
        d_q = query_gradient_step(
            q, k, v, d_out, lse, delta, there[None, :], d_q, scale, True, PRECISION, UPCAST
        )
    if EXTRA:
        k_head = head_of(extra_k_base, batch, head // share, extra_k_strides)
        v_head = head_of(extra_v_base, batch, head // share, extra_v_strides)
        for first in range(0, tl.where(part == parts - 1, extra, 0), COLUMNS):
            n = first + tl.arange(0, COLUMNS)
            there = n < extra
            n = n.to(tl.int64)
            k = load_tile(k_head, n * extra_k_strides[3], there, True, D, BLOCK_D)
            v = load_tile(v_head, n * extra_v_strides[3], there, True, DV, BLOCK_DV)
            d_q = query_gradient_step(
                q, k, v, d_out, lse, delta, there[None, :], d_q, scale, True, PRECISION, UPCAST
            )
    batches = tl.num_programs(0) // (tl.cdiv(queries, ROWS) * parts * heads)
    row += part.to(tl.int64) * batches * queries * heads
    store_tile(d_q_base, row * D, inside, d_q * softmax_scale, D, BLOCK_D)


@triton.jit
def dense_key_gradient_kernel(
    k_base, v_base, q_base, d_out_base, lse_base, delta_base, d_k_base, d_v_base,
    global_q_base, global_d_out_base, global_lse_base, global_delta_base,
    k_strides, v_strides, q_strides, d_out_strides, global_q_strides, global_d_out_strides, grid,
    keys, kv_heads, share, global_queries, parts, part_tokens, scale, softmax_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GLOBAL: tl.constexpr,
    FLIP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write d_k and d_v of the extra keys of each part, fp32 [parts, B, N, kv_heads, ...]."""
    tile, part, kv_head, batch = _program(tl.cdiv(keys, ROWS), parts, kv_heads)
    heads = kv_heads * share
    m = tile * ROWS + tl.arange(0, ROWS)
    inside = m < keys
    rows = m.to(tl.int64)
    k = load_tile(
        head_of(k_base, batch, kv_head, k_strides), rows * k_strides[3], inside, True, D, BLOCK_D
    )
    v = load_tile(
        head_of(v_base, batch, kv_head, v_strides), rows * v_strides[3], inside, True, DV, BLOCK_DV
    )
    if FLIP:
        k = -k
    d_k = tl.zeros([ROWS, BLOCK_D], tl.float32)
    d_v = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    begin, end = _part(part, part_tokens, grid)
    tokens = grid[0] * grid[1] * grid[2]
    for member in range(share):
        head = kv_head * share + member
        q_head = head_of(q_base, batch, head, q_strides)
        d_out_head = head_of(d_out_base, batch, head, d_out_strides)
        for first in range(begin, end, COLUMNS):
            there, t, h, w = _tokens(first, end, grid, COLUMNS)
            q = load_tile(q_head, offsets(t, h, w, q_strides), there, True, D, BLOCK_D)
            d_out = load_tile(
                d_out_head, offsets(t, h, w, d_out_strides), there, True, DV, BLOCK_DV
            )
            n = (first + tl.arange(0, COLUMNS)).to(tl.int64)
            row = (batch.to(tl.int64) * tokens + n) * heads + head
            lse = load_lse(lse_base + row, there, True)
            delta = tl.load(delta_base + row, mask=there, other=0.0)
            d_k, d_v = key_gradient_step(
                k, v, q, d_out, lse, delta, True, d_k, d_v, scale, False, PRECISION, UPCAST
            )
        if GLOBAL:
            q_head = head_of(global_q_base, batch, head, global_q_strides)
            d_out_head = head_of(global_d_out_base, batch, head, global_d_out_strides)
            for first in range(0, tl.where(part == parts - 1, global_queries, 0), COLUMNS):
                n = first + tl.arange(0, COLUMNS)
                there = n < global_queries
                n = n.to(tl.int64)
                q = load_tile(q_head, n * global_q_strides[3], there, True, D, BLOCK_D)
                d_out = load_tile(
                    d_out_head, n * global_d_out_strides[3], there, True, DV, BLOCK_DV
                )
                row = (batch.to(tl.int64) * global_queries + n) * heads + head
                lse = load_lse(global_lse_base + row, there, True)
                delta = tl.load(global_delta_base + row, mask=there, other=0.0)
                d_k, d_v = key_gradient_step(
                    k, v, q, d_out, lse, delta, True, d_k, d_v, scale, False, PRECISION, UPCAST
                )
    batches = tl.num_programs(0) // (tl.cdiv(keys, ROWS) * parts * kv_heads)
    row = ((part.to(tl.int64) * batches + batch) * keys + m) * kv_heads + kv_head
    store_tile(d_k_base, row * D, inside, d_k * softmax_scale, D, BLOCK_D)
    store_tile(d_v_base, row * DV, inside, d_v, DV, BLOCK_DV)


@triton.jit
def _program(tiles, parts, heads):
    """Tile, part, head and batch entry of this program."""
    program = tl.program_id(0)
    rest = program // tiles
    return program % tiles, rest % parts, (rest // parts) % heads, rest // parts // heads


@triton.jit
def _part(part, part_tokens, grid):
    """First token of a part, and the one after its last."""
    begin = part * part_tokens
    return begin, tl.minimum(begin + part_tokens, grid[0] * grid[1] * grid[2])


@triton.jit
def _tokens(first, end, grid, COLUMNS: tl.constexpr):
    """Coordinates of the tokens from `first`, and which of them come before `end`."""
    n = first + tl.arange(0, COLUMNS)
    return n < end, n // (grid[1] * grid[2]), (n // grid[2]) % grid[1], n % grid[2]


# --- host side -----------------------------------------------------------------------------------


def _parts(tokens: int, programs: int, columns: int) -> tuple[int, int]:
    """Parts into which `tokens` columns are cut, and the tokens of one, whole blocks of them."""
    most = max(1, tokens // max(PART, columns))
    parts = max(1, min(most, -(-PROGRAMS // max(programs, 1))))
    size = -(-tokens // (parts * columns)) * columns
    return -(-tokens // size), size


def dense_forward(
    global_q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return output [B, G, Hq, Dv] and log-sum-exp [B, G, Hq] of queries that see every key."""
    launch, outs, lses = dense_forward_launch(global_q, k, v, scale, extra_k, extra_v)
    launch.run()
    if len(outs) == 1:
        return outs[0].to(global_q.dtype), lses[0]
    lse = lses.logsumexp(0)
    out = (outs * (lses - lse).exp()[..., None]).sum(0)
    return out.to(global_q.dtype), lse


def dense_forward_launch(
    global_q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
) -> tuple[Launch, Tensor, Tensor]:
    """Return the launch of `dense_forward_kernel` and the parts it fills."""
    batch, queries, heads, _ = global_q.shape
    config = options("forward", global_q, v)
    rows, columns = min(config.queries), max(config.keys)
    tiles = triton.cdiv(queries, rows) * heads * batch
    parts, size = _parts(k.shape[1:4].numel(), tiles, columns)
    outs = global_q.new_empty(parts, batch, queries, heads, v.shape[-1], dtype=torch.float32)
    lses = outs.new_empty(outs.shape[:-1])
    extra = 0 if extra_k is None else extra_k.shape[1]
    if extra_k is None or extra_v is None:
        extra_k, extra_v = k, v
    arguments = (
        global_q, k, v, outs, lses, extra_k, extra_v,
        *map(strides, (global_q, k, v, extra_k, extra_v)), tuple(k.shape[1:4]),
        queries, heads, heads // k.shape[-2], extra, parts, size, log2_scale(scale),
    )  # fmt: skip
    constants = dict(
        ROWS=rows, COLUMNS=columns, EXTRA=extra > 0, FLIP=scale < 0, **shared_options(global_q, v)
    )
    return (
        Launch(dense_forward_kernel, tiles * parts, rows, arguments, constants, config),
        outs,
        lses,
    )


def dense_query_gradient(
    d_out: Tensor,
    d_lse: Tensor | None,
    global_q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return d_global_q and the delta of the global queries."""
    batch, queries, heads, dim = global_q.shape
    config = options("query_gradient", global_q, v)
    rows, columns = min(config.queries), max(config.keys)
    tiles = triton.cdiv(queries, rows) * heads * batch
    parts, size = _parts(k.shape[1:4].numel(), tiles, columns)
    d_q = global_q.new_empty(parts, batch, queries, heads, dim, dtype=torch.float32)
    delta = torch.empty_like(lse)
    extra = 0 if extra_k is None else extra_k.shape[1]
    if extra_k is None or extra_v is None:
        extra_k, extra_v = k, v
    arguments = (
        global_q, k, v, d_out, out, lse, lse if d_lse is None else d_lse, delta, d_q,
        extra_k, extra_v, *map(strides, (global_q, k, v, d_out, out, extra_k, extra_v)),
        tuple(k.shape[1:4]),
        queries, heads, heads // k.shape[-2], extra, parts, size, log2_scale(scale), scale,
    )  # fmt: skip
    constants = dict(
        ROWS=rows, COLUMNS=columns, EXTRA=extra > 0, D_LSE=d_lse is not None, FLIP=scale < 0,
        **shared_options(global_q, v),
    )  # fmt: skip
    Launch(dense_query_gradient_kernel, tiles * parts, rows, arguments, constants, config).run()
    return d_q.sum(0).to(global_q.dtype), delta


def dense_key_gradient(
    d_out: Tensor,
    d_global_out: Tensor | None,
    q: Tensor,
    extra_k: Tensor,
    extra_v: Tensor,
    scale: float,
    global_q: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    global_lse: Tensor | None,
    global_delta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the extra keys and values, which every query sees."""
    batch, keys, kv_heads, dim = extra_k.shape
    config = options("key_gradient", q, extra_v)
    rows, columns = min(config.keys), max(config.queries)
    tiles = triton.cdiv(keys, rows) * kv_heads * batch
    parts, size = _parts(q.shape[1:4].numel(), tiles, columns)
    d_k = q.new_empty(parts, batch, keys, kv_heads, dim, dtype=torch.float32)
    d_v = d_k.new_empty(*d_k.shape[:-1], extra_v.shape[-1])
    queries = 0 if global_q is None else global_q.shape[1]
    if queries == 0:
        global_q, d_global_out, global_lse, global_delta = q, d_out, lse, delta
    arguments = (
        extra_k, extra_v, q, d_out, lse, delta, d_k, d_v,
        global_q, d_global_out, global_lse, global_delta,
        *map(strides, (extra_k, extra_v, q, d_out, global_q, d_global_out)),  # type: ignore[arg-type]
        tuple(q.shape[1:4]),
        keys, kv_heads, q.shape[-2] // kv_heads, queries, parts, size, log2_scale(scale), scale,
    )  # fmt: skip
    constants = dict(
        ROWS=rows, COLUMNS=columns, GLOBAL=queries > 0, FLIP=scale < 0,
        **shared_options(q, extra_v),
    )  # fmt: skip
    Launch(dense_key_gradient_kernel, tiles * parts, rows, arguments, constants, config).run()
    return d_k.sum(0).to(extra_k.dtype), d_v.sum(0).to(extra_v.dtype)
