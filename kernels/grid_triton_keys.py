"""The gradients of keys and values of grid attention in Triton: a program per tile of keys.

The queries that see a tile of keys lie in a box, as the keys that a tile of queries sees do.
"""

# Triton gives annotations of a kernel a meaning of its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels.grid_plan import plan
from vistoken.kernels.tiling import choose_tiles, without_disc
from vistoken.kernels.triton_box import (
    box_of,
    find_boxes,
    find_rows,
    head_of,
    lane_offsets,
    lanes,
    number_of,
    offsets,
    row_sight,
    visible,
    within,
)
from vistoken.kernels.triton_launch import (
    Config,
    Launch,
    exceeds_int32,
    options,
    shared_options,
    strides,
)
from vistoken.kernels.triton_tile import (
    key_gradient_step,
    load_lse,
    load_tile,
    log2_scale,
    store_tile,
)
from vistoken.kernels.windows import Window


@triton.jit
def key_gradient_kernel(
    q_base, k_base, v_base, d_out_base, lse_base, delta_base, d_k_base, d_v_base,
    global_q_base, global_d_out_base, global_lse_base, global_delta_base,
    tiles, groups, lists, limits,
    q_strides, k_strides, v_strides, d_out_strides, global_q_strides, global_d_out_strides,
    pitch,
    programs, kv_heads, share, global_queries, radius, scale, softmax_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, SIDES: tl.constexpr, HIDDEN: tl.constexpr, WORDS: tl.constexpr,
    WIDE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
    GLOBAL: tl.constexpr, BLOCK_GLOBAL: tl.constexpr,
    FLIP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write d_k and d_v of a tile of keys, from the queries of the box that sees them."""
    program = tl.program_id(0)
    tile = program % programs
    kv_head = (program // programs) % kv_heads
    batch = program // programs // kv_heads
    heads = kv_heads * share
    start_t, start_h, start_w, first, masked, full = find_boxes(tile, tiles, groups, pitch)

    # the keys
    t, h, w, inside = find_rows(tile, tiles, pitch, ROWS)
    k = load_tile(
        head_of(k_base, batch, kv_head, k_strides), offsets(t, h, w, k_strides), inside,
        True, D, BLOCK_D,
    )  # fmt: skip
    v = load_tile(
        head_of(v_base, batch, kv_head, v_strides), offsets(t, h, w, v_strides), inside,
        True, DV, BLOCK_DV,
    )  # fmt: skip
    if FLIP:
        k = -k

    # the queries
    lane_t, lane_h, lane_w = lanes(SIDES[0], SIDES[1], SIDES[2])
    q_lanes = lane_offsets(lane_t, lane_h, lane_w, q_strides, WIDE)
    d_out_lanes = lane_offsets(lane_t, lane_h, lane_w, d_out_strides, WIDE)
    rows: tl.constexpr = ROWS[0] * ROWS[1] * ROWS[2]
    d_k = tl.zeros([rows, BLOCK_D], tl.float32)
    d_v = tl.zeros([rows, BLOCK_DV], tl.float32)
    if MASKED:
        sight = row_sight(limits, t, h, w, inside, start_t, start_h, start_w, pitch, HIDDEN, WORDS)
    for member in range(share):
        head = kv_head * share + member
        q_head = head_of(q_base, batch, head, q_strides)
        d_out_head = head_of(d_out_base, batch, head, d_out_strides)
        if MASKED:
            entry = tl.load(lists + first)
            for i in range(first, first + masked):
                following = tl.load(lists + i + 1)
                box_t, box_h, box_w, q_t, q_h, q_w = box_of(
                    entry, start_t, start_h, start_w, pitch, SIDES
                )
                query_t, query_h, query_w = q_t + lane_t, q_h + lane_h, q_w + lane_w
                there = within(query_t, query_h, query_w, pitch, HIDDEN)
                q = load_tile(
                    q_head + offsets(q_t, q_h, q_w, q_strides), q_lanes, there, True, D, BLOCK_D
                )
                d_out = load_tile(
                    d_out_head + offsets(q_t, q_h, q_w, d_out_strides), d_out_lanes, there,
                    True, DV, BLOCK_DV,
                )  # fmt: skip
                row = number_of(batch, query_t, query_h, query_w, head, heads, pitch)
                lse = load_lse(lse_base + row, there, True)
                delta = tl.load(delta_base + row, mask=there, other=0.0)
                seen = visible(
                    sight, box_t, box_h, box_w, lane_t, lane_h, lane_w,
                    query_t, query_h, query_w, there, radius, SIDES, HIDDEN, WORDS,
                )  # fmt: skip
                d_k, d_v = key_gradient_step(
                    k, v, q, d_out, lse, delta, seen, d_k, d_v, scale, True, PRECISION, UPCAST
                )
                entry = following
        if FULL:
            start = first + masked
            entry = tl.load(lists + start)
            for i in range(start, start + full):
                following = tl.load(lists + i + 1)
                _, _, _, q_t, q_h, q_w = box_of(entry, start_t, start_h, start_w, pitch, SIDES)
                q = load_tile(
                    q_head + offsets(q_t, q_h, q_w, q_strides), q_lanes, True, False, D, BLOCK_D
                )
                d_out = load_tile(
                    d_out_head + offsets(q_t, q_h, q_w, d_out_strides), d_out_lanes, True,
                    False, DV, BLOCK_DV,
                )  # fmt: skip
                row = number_of(batch, q_t + lane_t, q_h + lane_h, q_w + lane_w, head, heads, pitch)
                lse = load_lse(lse_base + row, True, False)
                delta = tl.load(delta_base + row)
                d_k, d_v = key_gradient_step(
                    k, v, q, d_out, lse, delta, True, d_k, d_v, scale, False, PRECISION, UPCAST
                )
                entry = following
        if GLOBAL:
            q_head = head_of(global_q_base, batch, head, global_q_strides)
            d_out_head = head_of(global_d_out_base, batch, head, global_d_out_strides)
            for begin in range(0, global_queries, BLOCK_GLOBAL):
                n = begin + tl.arange(0, BLOCK_GLOBAL)
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
    t, h, w, inside = find_rows(tile, tiles, pitch, ROWS)
    row = number_of(batch, t, h, w, kv_head, kv_heads, pitch)
    store_tile(d_k_base, row * D, inside, d_k * softmax_scale, D, BLOCK_D)
    store_tile(d_v_base, row * DV, inside, d_v, DV, BLOCK_DV)


def key_gradient_launch(
    d_out: Tensor,
    d_global_out: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    global_q: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    global_lse: Tensor | None,
    global_delta: Tensor | None,
    config: Config | None = None,
) -> tuple[Launch, Tensor, Tensor]:
    """Return the launch of `key_gradient_kernel`, and the d_k and d_v it fills."""
    window = without_disc(window)
    kv_heads, dim = k.shape[-2:]
    config = config or options("key_gradient", q, v, window)
    tiles = choose_tiles(window, dim, config.queries, config.keys, inverse=True)
    tables = plan(window, tiles.kv, tiles.q, True, q.device)
    d_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    queries = 0 if global_q is None else global_q.shape[1]
    if queries == 0:
        global_q, d_global_out, global_lse, global_delta = q, d_out, lse, delta
    strided: list[Any] = [q, k, v, d_out, global_q, d_global_out]
    arguments = (
        q, k, v, d_out, lse, delta, d_k, d_v, global_q, d_global_out, global_lse, global_delta,
        tables.tiles, tables.groups, tables.lists, tables.limits,
        *map(strides, strided), tables.pitch,
        tables.programs, kv_heads, q.shape[-2] // kv_heads, queries, window.radius,
        log2_scale(scale), scale,
    )  # fmt: skip
    constants = dict(
        ROWS=tiles.kv, SIDES=tiles.q, HIDDEN=tables.hidden, WORDS=tables.words,
        WIDE=exceeds_int32(tiles.q, q, d_out),
        MASKED=tables.masked, FULL=tables.full, GLOBAL=queries > 0, BLOCK_GLOBAL=tiles.queries,
        FLIP=scale < 0, **shared_options(q, v),
    )  # fmt: skip
    programs = tables.programs * kv_heads * q.shape[0]
    return Launch(key_gradient_kernel, programs, tiles.keys, arguments, constants, config), d_k, d_v
