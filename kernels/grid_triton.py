"""Grid attention in portable Triton: the forward pass over tiles of queries, and its host side."""

# Triton gives annotations of a kernel a meaning of its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels import grid_hopper
from vistoken.kernels.grid_plan import plan
from vistoken.kernels.grid_triton_dense import dense_forward
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
    DTYPES,
    LARGEST_HEAD,
    Config,
    Launch,
    exceeds_int32,
    options,
    rows_in_line,
    shared_options,
    strides,
    why_not_device,
)
from vistoken.kernels.triton_tile import (
    FLOOR,
    INTERPRETED,
    load_tile,
    log2_scale,
    softmax_end,
    softmax_step,
    store_tile,
)
from vistoken.kernels.windows import Window

LARGEST_RADIUS = 32000


@triton.jit
def forward_kernel(
    q_base, k_base, v_base, out_base, lse_base, extra_k_base, extra_v_base,
    tiles, groups, lists, limits,
    q_strides, k_strides, v_strides, extra_k_strides, extra_v_strides,
    pitch,
    programs, heads, share, extra, radius, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, SIDES: tl.constexpr, HIDDEN: tl.constexpr, WORDS: tl.constexpr,
    WIDE: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
    EXTRA: tl.constexpr, BLOCK_EXTRA: tl.constexpr,
    FLIP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program % programs
    head = (program // programs) % heads
    batch = program // programs // heads
    start_t, start_h, start_w, first, masked, full = find_boxes(tile, tiles, groups, pitch)

    # the queries
    t, h, w, inside = find_rows(tile, tiles, pitch, ROWS)
    q = load_tile(
        head_of(q_base, batch, head, q_strides), offsets(t, h, w, q_strides), inside,
        True, D, BLOCK_D,
    )  # fmt: skip
    if FLIP:
        q = -q

    # the keys
    k_head = head_of(k_base, batch, head // share, k_strides)
    v_head = head_of(v_base, batch, head // share, v_strides)
    lane_t, lane_h, lane_w = lanes(SIDES[0], SIDES[1], SIDES[2])
    k_lanes = lane_offsets(lane_t, lane_h, lane_w, k_strides, WIDE)
    v_lanes = lane_offsets(lane_t, lane_h, lane_w, v_strides, WIDE)

    rows: tl.constexpr = ROWS[0] * ROWS[1] * ROWS[2]
    acc = tl.zeros([rows, BLOCK_DV], tl.float32)
    total = tl.zeros([rows], tl.float32)
    top = tl.full([rows], FLOOR, tl.float32)

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
            acc, total, top = softmax_step(
                q, k, v, seen, acc, total, top, scale, True, PRECISION, UPCAST
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
            acc, total, top = softmax_step(
                q, k, v, True, acc, total, top, scale, False, PRECISION, UPCAST
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
            acc, total, top = softmax_step(
                q, k, v, there[None, :], acc, total, top, scale, True, PRECISION, UPCAST
            )

    out, lse = softmax_end(acc, total, top)
    t, h, w, inside = find_rows(tile, tiles, pitch, ROWS)
    row = number_of(batch, t, h, w, head, heads, pitch)
    store_tile(out_base, row * DV, inside, out, DV, BLOCK_DV)
    tl.store(lse_base + row, lse, mask=inside)


# --- host side -----------------------------------------------------------------------------------


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    global_q: Tensor | None = None,
) -> str | None:
    """Return why the kernels cannot run on these tensors, or None where they can."""
    if not q.is_cuda and not INTERPRETED:
        return f"the tensors are on {q.device.type}, not on a CUDA device"
    if q.dtype not in DTYPES:
        return f"the dtype is {q.dtype}; it takes float32, float16 and bfloat16"
    widest = max(q.shape[-1], v.shape[-1])
    if widest > LARGEST_HEAD:
        return f"the head size is {widest}, at most {LARGEST_HEAD} fit one program"
    if window.radius > LARGEST_RADIUS and not window.full:
        return f"the radius is {window.radius}, at most {LARGEST_RADIUS} has a 32-bit square"
    return None if INTERPRETED else why_not_device(q.device)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    global_q: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (out, lse, global_out, global_lse) as `vistoken.kernels.grid_reference.forward`."""
    q, k, v, extra_k, extra_v, global_q = rows_in_line(q, k, v, extra_k, extra_v, global_q)
    if grid_hopper.why_not(q, k, v, window, scale, extra_k, extra_v, global_q) is None:
        return grid_hopper.forward(q, k, v, window, scale, extra_k, extra_v, global_q)
    launch, out, lse = forward_launch(q, k, v, window, scale, extra_k, extra_v)
    launch.run()
    if global_q is None:
        return out, lse, None, None
    return out, lse, *dense_forward(global_q, k, v, scale, extra_k, extra_v)


def forward_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Launch, Tensor, Tensor]:
    """Return the launch of `forward_kernel`, and the output and log-sum-exp it fills."""
    window = without_disc(window)
    heads, dim = q.shape[-2:]
    config = config or options("forward", q, v, window)
    tiles = choose_tiles(window, dim, config.queries, config.keys)
    tables = plan(window, tiles.q, tiles.kv, False, q.device)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    extra = 0 if extra_k is None else extra_k.shape[1]
    if extra_k is None or extra_v is None:
        extra_k, extra_v = k, v
    arguments = (
        q, k, v, out, lse, extra_k, extra_v,
        tables.tiles, tables.groups, tables.lists, tables.limits,
        strides(q), strides(k), strides(v), strides(extra_k), strides(extra_v),
        tables.pitch,
        tables.programs, heads, heads // k.shape[-2], extra, window.radius, log2_scale(scale),
    )  # fmt: skip
    constants = dict(
        ROWS=tiles.q, SIDES=tiles.kv, HIDDEN=tables.hidden, WORDS=tables.words,
        WIDE=exceeds_int32(tiles.kv, k, v),
        MASKED=tables.masked, FULL=tables.full, EXTRA=extra > 0, BLOCK_EXTRA=tiles.keys,
        FLIP=scale < 0, **shared_options(q, v),
    )  # fmt: skip
    programs = tables.programs * heads * q.shape[0]
    return Launch(forward_kernel, programs, tiles.queries, arguments, constants, config), out, lse
