"""Gradients of attention along block lists: one launch for queries, one for keys and values.

No program adds to what another one writes, so two runs give the same bits.
"""

# Triton gives annotations of a kernel a meaning of its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.block_mask import BlockMask
from vistoken.kernels.list_launch import key_block_lists, list_strides
from vistoken.kernels.list_triton import load_bits, seen_pairs, valid_keys
from vistoken.kernels.list_triton_launch import list_config, list_launch
from vistoken.kernels.triton_launch import Launch, rows_in_line
from vistoken.kernels.triton_tile import (
    key_gradient_step,
    load_lse,
    load_tile,
    log2_scale,
    query_gradient_step,
    store_tile,
)


@triton.jit
def _see_blocks(
    d_q, q, d_out, lse, delta, k_ptr, v_ptr, k_stride, v_stride, index_ptr, bits_ptr, table_ptr,
    lengths_ptr, count, kv_tokens, scale, row,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_KV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, RAGGED: tl.constexpr,
    PARTIAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d_q, before the softmax scale, with the first `count` key blocks of one list."""
    PARTS: tl.constexpr = BLOCK_KV // TILE_KV
    column = tl.arange(0, TILE_KV)
    k_offset = column.to(tl.int64) * k_stride
    v_offset = column.to(tl.int64) * v_stride
    for step in range(0, count * PARTS):
        place = step // PARTS
        inner = (step % PARTS) * TILE_KV
        block = tl.load(index_ptr + place)
        first = block.to(tl.int64) * BLOCK_KV + inner
        valid = valid_keys(column, first, block, inner, lengths_ptr, kv_tokens, RAGGED)
        k = load_tile(k_ptr + first * k_stride, k_offset, valid, RAGGED, D, BLOCK_D)
        v = load_tile(v_ptr + first * v_stride, v_offset, valid, RAGGED, DV, BLOCK_DV)
        seen = seen_pairs(
            valid, table_ptr, bits_ptr, place, row, inner,
            TILE_KV, BLOCK_Q, BLOCK_KV, RAGGED, PARTIAL,
        )  # fmt: skip
        d_q = query_gradient_step(
            q, k, v, d_out, lse, delta, seen, d_q, scale, RAGGED or PARTIAL, PRECISION, UPCAST
        )
    return d_q


@triton.jit
def query_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, d_out_ptr, d_lse_ptr, d_q_ptr, delta_ptr, full_count_ptr,
    full_index_ptr, partial_count_ptr, partial_index_ptr, partial_bits_ptr, table_ptr, lengths_ptr,
    q_strides, k_strides, v_strides, d_out_strides, list_strides, heads, group, q_tokens, kv_tokens,
    tiles, full_width, partial_width, scale, softmax_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    RAGGED: tl.constexpr, PARTIAL: tl.constexpr, FLIP: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """d_q of one tile of queries, and rowsum(out * d_out) - d_lse, which the other kernel reads."""
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    token = tile.to(tl.int64) * TILE_Q + tl.arange(0, TILE_Q)
    row = tile % (BLOCK_Q // TILE_Q) * TILE_Q + tl.arange(0, TILE_Q)
    inside = token < q_tokens
    line = (batch * q_tokens + token) * heads + head
    q_ptr += batch * q_strides[0] + head * q_strides[2]
    q = load_tile(q_ptr, token * q_strides[1], inside, True, D, BLOCK_D)
    if FLIP:
        q = (-q.to(tl.float32)).to(q.dtype)
    d_out_ptr += batch * d_out_strides[0] + head * d_out_strides[2]
    d_out = load_tile(d_out_ptr, token * d_out_strides[1], inside, True, DV, BLOCK_DV)
    out = load_tile(out_ptr, line * DV, inside, True, DV, BLOCK_DV)
    lse = load_lse(lse_ptr + line, inside, True)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    if d_lse_ptr is not None:
        delta -= tl.load(d_lse_ptr + line, mask=inside, other=0.0)
    delta = tl.where(lse == float("inf"), 0.0, delta)  # sees no key, so d_lse has no effect
    tl.store(delta_ptr + line, delta, mask=inside)

    k_ptr += batch * k_strides[0] + head // group * k_strides[2]
    v_ptr += batch * v_strides[0] + head // group * v_strides[2]
    lists = batch * list_strides[0] + head * list_strides[1] + tile // (BLOCK_Q // TILE_Q)
    if lengths_ptr is not None:
        lengths_ptr += batch * list_strides[2]
    d_q = _see_blocks(
        tl.zeros([TILE_Q, BLOCK_D], tl.float32), q, d_out, lse, delta,
        k_ptr, v_ptr, k_strides[1], v_strides[1],
        full_index_ptr + lists * full_width, None, None, lengths_ptr,
        tl.load(full_count_ptr + lists), kv_tokens, scale, row,
        D, DV, BLOCK_D, BLOCK_DV, TILE_KV, BLOCK_Q, BLOCK_KV, RAGGED, False, PRECISION, UPCAST,
    )  # fmt: skip
    if PARTIAL:
        d_q = _see_blocks(
            d_q, q, d_out, lse, delta, k_ptr, v_ptr, k_strides[1], v_strides[1],
            partial_index_ptr + lists * partial_width, partial_bits_ptr + lists * partial_width,
            table_ptr, lengths_ptr, tl.load(partial_count_ptr + lists), kv_tokens, scale, row,
            D, DV, BLOCK_D, BLOCK_DV, TILE_KV, BLOCK_Q, BLOCK_KV, RAGGED, True, PRECISION, UPCAST,
        )  # fmt: skip
    store_tile(d_q_ptr, line * D, inside, d_q * softmax_scale, D, BLOCK_D)


@triton.jit
def _seen_by_blocks(
    d_k, d_v, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, q_stride, d_out_stride, heads, index_ptr,
    bits_ptr, table_ptr, count, q_tokens, scale, inner,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    PARTIAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d_k, before the softmax scale, and d_v with the `count` query blocks of one list."""
    PARTS: tl.constexpr = BLOCK_Q // TILE_Q
    offset = tl.arange(0, TILE_Q)
    q_offset = offset.to(tl.int64) * q_stride
    d_out_offset = offset.to(tl.int64) * d_out_stride
    for step in range(0, count * PARTS):
        place = step // PARTS
        row = (step % PARTS) * TILE_Q + offset
        first = tl.load(index_ptr + place).to(tl.int64) * BLOCK_Q + (step % PARTS) * TILE_Q
        inside = offset < q_tokens - first
        q = load_tile(q_ptr + first * q_stride, q_offset, inside, True, D, BLOCK_D)
        d_out = load_tile(
            d_out_ptr + first * d_out_stride, d_out_offset, inside, True, DV, BLOCK_DV
        )
        lse = load_lse(lse_ptr + (first + offset) * heads, inside, True)
        delta = tl.load(delta_ptr + (first + offset) * heads, mask=inside, other=0.0)
        seen = inside[None, :]
        if PARTIAL:
            entry = tl.load(bits_ptr + place)
            seen = load_bits(table_ptr, entry, row, inner, TILE_KV, BLOCK_Q, BLOCK_KV, True)
        d_k, d_v = key_gradient_step(
            k, v, q, d_out, lse, delta, seen, d_k, d_v, scale, PARTIAL, PRECISION, UPCAST
        )
    return d_k, d_v


@triton.jit
def key_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, d_out_ptr, d_k_ptr, d_v_ptr, full_start_ptr,
    full_index_ptr, partial_start_ptr, partial_index_ptr, partial_bits_ptr, table_ptr, lengths_ptr,
    q_strides, k_strides, v_strides, d_out_strides, list_strides, heads, kv_heads, q_tokens,
    kv_tokens, kv_blocks, full_width, partial_width, scale, softmax_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    RAGGED: tl.constexpr, PARTIAL: tl.constexpr, FLIP: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """d_k and d_v of one tile of keys of one kv head, over all query heads that read it.

    list_strides: (batch, head, batch of lengths), the first two in whole tables of lists.
    """
    tiles = kv_blocks * (BLOCK_KV // TILE_KV)
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    block = tile // (BLOCK_KV // TILE_KV)
    inner = tile % (BLOCK_KV // TILE_KV) * TILE_KV
    column = tl.arange(0, TILE_KV)
    token = tile.to(tl.int64) * TILE_KV + column
    inside = token < kv_tokens
    if lengths_ptr is not None:
        lengths_ptr += batch * list_strides[2]
    first = tile.to(tl.int64) * TILE_KV
    valid = valid_keys(column, first, block, inner, lengths_ptr, kv_tokens, True)
    k_ptr += batch * k_strides[0] + kv_head * k_strides[2]
    k = load_tile(k_ptr, token * k_strides[1], valid, True, D, BLOCK_D)
    if FLIP:
        k = (-k.to(tl.float32)).to(k.dtype)
    v_ptr += batch * v_strides[0] + kv_head * v_strides[2]
    v = load_tile(v_ptr, token * v_strides[1], valid, True, DV, BLOCK_DV)

    d_k = tl.zeros([TILE_KV, BLOCK_D], tl.float32)
    d_v = tl.zeros([TILE_KV, BLOCK_DV], tl.float32)
    group = heads // kv_heads
    for member in range(0, group):
        head = kv_head * group + member
        lists = batch * list_strides[0] + head * list_strides[1]
        starts = lists * (kv_blocks + 1) + block
        q_head = q_ptr + batch * q_strides[0] + head * q_strides[2]
        d_out_head = d_out_ptr + batch * d_out_strides[0] + head * d_out_strides[2]
        line = batch * q_tokens * heads + head
        start = tl.load(full_start_ptr + starts)
        d_k, d_v = _seen_by_blocks(
            d_k, d_v, k, v, q_head, d_out_head, lse_ptr + line, delta_ptr + line,
            q_strides[1], d_out_strides[1], heads,
            full_index_ptr + lists * full_width + start, None, None,
            tl.load(full_start_ptr + starts + 1) - start, q_tokens, scale, inner,
            D, DV, BLOCK_D, BLOCK_DV, TILE_Q, TILE_KV, BLOCK_Q, BLOCK_KV, False, PRECISION, UPCAST,
        )  # fmt: skip
        if PARTIAL:
            start = tl.load(partial_start_ptr + starts)
            entries = lists * partial_width + start
            d_k, d_v = _seen_by_blocks(
                d_k, d_v, k, v, q_head, d_out_head, lse_ptr + line, delta_ptr + line,
                q_strides[1], d_out_strides[1], heads,
                partial_index_ptr + entries, partial_bits_ptr + entries, table_ptr,
                tl.load(partial_start_ptr + starts + 1) - start, q_tokens, scale, inner,
                D, DV, BLOCK_D, BLOCK_DV, TILE_Q, TILE_KV, BLOCK_Q, BLOCK_KV,
                True, PRECISION, UPCAST,
            )  # fmt: skip
    if RAGGED:  # what was not loaded met the queries as zeros
        d_k = tl.where(valid[:, None], d_k, 0.0)
        d_v = tl.where(valid[:, None], d_v, 0.0)
    line = (batch * kv_tokens + token) * kv_heads + kv_head
    store_tile(d_k_ptr, line * D, inside, d_k * softmax_scale, D, BLOCK_D)
    store_tile(d_v_ptr, line * DV, inside, d_v, DV, BLOCK_DV)


# --- host side -----------------------------------------------------------------------------------


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (d_q, d_k, d_v), given what `vistoken.kernels.list_triton.forward` returned.

    d_out [B, S, Hq, Dv]; d_lse [B, S, Hq] fp32 or None; out and lse are contiguous.
    """
    q, k, v, d_out = rows_in_line(q, k, v, d_out)
    d_lse = None if d_lse is None else d_lse.contiguous()
    launch, d_q, delta = query_launch(d_out, d_lse, q, k, v, mask, scale, out, lse)
    launch.run()
    launch, d_k, d_v = key_launch(d_out, q, k, v, mask, scale, lse, delta)
    launch.run()
    return d_q, d_k, d_v


def query_launch(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Launch, Tensor, Tensor]:
    """Return the launch of `query_kernel`, and the d_q and delta that it fills."""
    batch, tokens, heads, width = q.shape
    d_q, delta = q.new_empty(batch, tokens, heads, width), torch.empty_like(lse)
    config = list_config("query_gradient", q, v, mask)
    tiles = mask.q_blocks * (mask.block_q // config.queries[0])
    arguments = (
        q, k, v, out, lse, d_out, d_lse, d_q, delta, *key_block_lists(mask),
        *(x.stride()[:3] for x in (q, k, v, d_out)), list_strides(mask),
        heads, heads // k.shape[2], tokens, k.shape[1], tiles,
        mask.full_index.shape[-1], mask.partial_index.shape[-1], log2_scale(scale), scale,
    )  # fmt: skip
    programs, rows = tiles * batch * heads, config.queries[0]
    launch = list_launch(query_kernel, programs, rows, arguments, q, v, mask, scale, config)
    return launch, d_q, delta


def key_launch(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    lse: Tensor,
    delta: Tensor,
) -> tuple[Launch, Tensor, Tensor]:
    """Return the launch of `key_kernel`, and the d_k and d_v that it fills."""
    batch, tokens, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    d_k, d_v = (x.new_empty(batch, keys, kv_heads, x.shape[-1]) for x in (k, v))
    config = list_config("key_gradient", q, v, mask)
    lists = mask.transposed()
    b, h = lists.full_start.shape[:2]
    steps = (0 if b == 1 else h), (0 if h == 1 else 1), list_strides(mask)[2]
    arguments = (
        q, k, v, lse, delta, d_out, d_k, d_v,
        lists.full_start, lists.full_index,
        lists.partial_start, lists.partial_index, lists.partial_bits, *key_block_lists(mask)[-2:],
        *(x.stride()[:3] for x in (q, k, v, d_out)), steps,
        heads, kv_heads, tokens, keys, mask.kv_blocks,
        lists.full_index.shape[-1], lists.partial_index.shape[-1], log2_scale(scale), scale,
    )  # fmt: skip
    programs = mask.kv_blocks * (mask.block_kv // config.keys[0]) * batch * kv_heads
    rows = config.keys[0]
    launch = list_launch(key_kernel, programs, rows, arguments, q, v, mask, scale, config)
    return launch, d_k, d_v
