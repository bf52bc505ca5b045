"""The gradient of the queries of grid attention in Triton: a program per tile of queries."""

# Triton gives annotations of a kernel a meaning of its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

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
    load_lse,
    load_tile,
    log2_scale,
    query_gradient_step,
    store_tile,
)
from vistoken.kernels.windows import Window


@triton.jit
def query_gradient_kernel(
    q_base, k_base, v_base, d_out_base, out_base, lse_base, d_lse_base, delta_base, d_q_base,
    extra_k_base, extra_v_base, tiles, groups, lists, limits,
    q_strides, k_strides, v_strides, d_out_strides, out_strides, extra_k_strides, extra_v_strides,
    pitch,
    programs, heads, share, extra, radius, scale, softmax_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, SIDES: tl.constexpr, HIDDEN: tl.constexpr, WORDS: tl.constexpr,
    WIDE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
    EXTRA: tl.constexpr, BLOCK_EXTRA: tl.constexpr,
    D_LSE: tl.constexpr, FLIP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write d_q, and delta = rowsum(d_out * out) - d_lse for the gradients of the keys."""
    program = tl.program_id(0)
    tile = program % programs
    head = (program // programs) % heads
    batch = program // programs // heads
    start_t, start_h, start_w, first, masked, full = find_boxes(tile, tiles, groups, pitch)

    # the queries
    t, h, w, inside = find_rows(tile, tiles, pitch, ROWS)
    row = number_of(batch, t, h, w, head, heads, pitch)
    q = load_tile(
        head_of(q_base, batch, head, q_strides), offsets(t, h, w, q_strides), inside,
        True, D, BLOCK_D,
    )  # fmt: skip
    d_out = load_tile(
        head_of(d_out_base, batch, head, d_out_strides), offsets(t, h, w, d_out_strides), inside,
        True, DV, BLOCK_DV,
    )  # fmt: skip
    out = load_tile(
        head_of(out_base, batch, head, out_strides), offsets(t, h, w, out_strides), inside,
        True, DV, BLOCK_DV,
    )  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    if D_LSE:
        delta -= tl.load(d_lse_base + row, mask=inside, other=0.0)
    tl.store(delta_base + row, delta, mask=inside)
    lse = load_lse(lse_base + row, inside, True)
    if FLIP:
        q = -q

    # the keys
    k_head = head_of(k_base, batch, head // share, k_strides)
    v_head = head_of(v_base, batch, head // share, v_strides)
    lane_t, lane_h, lane_w = lanes(SIDES[0], SIDES[1], SIDES[2])
    k_lanes = lane_offsets(lane_t, lane_h, lane_w, k_strides, WIDE)
    v_lanes = lane_offsets(lane_t, lane_h, lane_w, v_strides, WIDE)
    d_q = tl.zeros([ROWS[0] * ROWS[1] * ROWS[2], BLOCK_D], tl.float32)

    if MASKED:
        sight = row_sight(limits, t, h, w, inside, start_t, start_h, start_w, pitch, HIDDEN, WORDS)
        entry = tl.load(lists + first)
        for i in range(first, first + masked):
            following = tl.load(lists + i + 1)
            box_t, box_h, box_w, k_t, k_h, k_w = box_of(
                entry, start_t, start_h, start_w, pitch, SIDES
            )
            key_t, key_h, key_w = k_t + lane_t, k_h + lane_h, k_w + lane_w
            there = within(key_t, key_h, key_w, pitch, HIDDEN)
            k = load_tile(
                k_head + offsets(k_t, k_h, k_w, k_strides), k_lanes, there, True, D, BLOCK_D
            )
            v = load_tile(
                v_head + offsets(k_t, k_h, k_w, v_strides), v_lanes, there, True, DV, BLOCK_DV
            )
            seen = visible(
                sight, box_t, box_h, box_w, lane_t, lane_h, lane_w, key_t, key_h, key_w, there,
                radius, SIDES, HIDDEN, WORDS,
            )  # fmt: skip
            d_q = query_gradient_step(
                q, k, v, d_out, lse, delta, seen, d_q, scale, True, PRECISION, UPCAST
            )
            entry = following
    if FULL:
        first += masked
        entry = tl.load(lists + first)
        for i in range(first, first + full):
            following = tl.load(lists + i + 1)
            _, _, _, k_t, k_h, k_w = box_of(entry, start_t, start_h, start_w, pitch, SIDES)
            k = load_tile(
                k_head + offsets(k_t, k_h, k_w, k_strides), k_lanes, True, False, D, BLOCK_D
            )
            v = load_tile(
                v_head + offsets(k_t, k_h, k_w, v_strides), v_lanes, True, False, DV, BLOCK_DV
            )
            d_q = query_gradient_step(
                q, k, v, d_out, lse, delta, True, d_q, scale, False, PRECISION, UPCAST
            )
            entry = following
    if EXTRA:
        k_head = head_of(extra_k_base, batch, head // share, extra_k_strides)
        v_head = head_of(extra_v_base, batch, head // share, extra_v_strides)
        for begin in range(0, extra, BLOCK_EXTRA):
            n = begin + tl.arange(0, BLOCK_EXTRA)
            there = n < extra
            k = load_tile(k_head, n.to(tl.int64) * extra_k_strides[3], there, True, D, BLOCK_D)
            v = load_tile(v_head, n.to(tl.int64) * extra_v_strides[3], there, True, DV, BLOCK_DV)
            d_q = query_gradient_step(
                q, k, v, d_out, lse, delta, there[None, :], d_q, scale, True, PRECISION, UPCAST
            )
    t, h, w, inside = find_rows(tile, tiles, pitch, ROWS)
    row = number_of(batch, t, h, w, head, heads, pitch)
    store_tile(d_q_base, row * D, inside, d_q * softmax_scale, D, BLOCK_D)


def query_gradient_launch(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    config: Config | None = None,
) -> tuple[Launch, Tensor, Tensor]:
    """Return the launch of `query_gradient_kernel`, and the d_q and delta it fills."""
    window = without_disc(window)
    heads, dim = q.shape[-2:]
    config = config or options("query_gradient", q, v, window)
    tiles = choose_tiles(window, dim, config.queries, config.keys)
    tables = plan(window, tiles.q, tiles.kv, False, q.device)
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty_like(lse)
    extra = 0 if extra_k is None else extra_k.shape[1]
    if extra_k is None or extra_v is None:
        extra_k, extra_v = k, v
    arguments = (
        q, k, v, d_out, out, lse, lse if d_lse is None else d_lse, delta, d_q, extra_k, extra_v,
        tables.tiles, tables.groups, tables.lists, tables.limits,
        *map(strides, (q, k, v, d_out, out, extra_k, extra_v)), tables.pitch,
        tables.programs, heads, heads // k.shape[-2], extra, window.radius, log2_scale(scale),
        scale,
    )  # fmt: skip
    constants = dict(
        ROWS=tiles.q, SIDES=tiles.kv, HIDDEN=tables.hidden, WORDS=tables.words,
        WIDE=exceeds_int32(tiles.kv, k, v),
        MASKED=tables.masked, FULL=tables.full, EXTRA=extra > 0, BLOCK_EXTRA=tiles.keys,
        D_LSE=d_lse is not None, FLIP=scale < 0, **shared_options(q, v),
    )  # fmt: skip
    programs = tables.programs * heads * q.shape[0]
    return (
        Launch(query_gradient_kernel, programs, tiles.queries, arguments, constants, config),
        d_q,
        delta,
    )
