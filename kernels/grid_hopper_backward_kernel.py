"""The gradients of grid attention on Hopper: one kernel, for queries or for keys and values.

A tile's 128 rows stay, boxes of 64 columns pass by. For d_q the rows are queries and the columns
keys; for d_k and d_v it is the other way round, with inverse windows. Either way scores are
rows1 @ columns1.T and their gradients come from rows2 @ columns2.T, where 1 is q or k and 2 is
d_out or v.
"""

# Triton gives annotations of a kernel a meaning of its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vistoken.kernels.hopper_boxes import (
    columns_of,
    corner_of,
    decode_tile,
    hide_unseen,
    next_box,
    tile_of_turn,
    windows_of,
)
from vistoken.kernels.hopper_tile import LOG2_E, advance, ring


@gluon.jit
def _produce(
    rows, columns, global_rows, extras, smem, bars, tables, shape, plan, N_EXTRA,
    RBOX: gl.constexpr, HALF: gl.constexpr, CBOX: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    rows1, rows2, out1, out2 = rows
    columns1, columns2 = columns
    global1, global2, global_out1, global_out2 = global_rows
    extra1, extra2 = extras
    r_smem, c1_smem, c2_smem = smem
    r_full, r_empty, c1_full, c1_empty, c2_full, c2_empty = bars
    T, H, W, heads, group = shape
    BLOCK: gl.constexpr = CBOX[0] * CBOX[1] * CBOX[2]
    n_extra = (N_EXTRA + BLOCK - 1) // BLOCK
    stage = 0
    phase = 1
    r_phase = 1
    turn = 0
    index = tile_of_turn(turn, plan, global1 is not None)
    while index < plan[0]:
        is_global, plane, place, tile_t, tile_h, tile_w = decode_tile(
            index, plan, global1 is not None
        )
        batch = plane // heads
        head = plane - batch * heads
        lo_t, lo_h, hi_h, lo_w, hi_w, boxes = columns_of(
            tables, shape, plan, is_global, tile_t, tile_h, tile_w, CBOX
        )
        mbarrier.wait(r_empty, r_phase)
        mbarrier.expect(r_full, 4 * 64 * D * 2)
        for half in gl.static_range(2):
            t0, h0, w0 = corner_of(is_global, place, tile_t, tile_h, tile_w, half, RBOX, HALF)
            if is_global:
                if global1 is not None:
                    tma.async_copy_global_to_shared(
                        global1, [batch, t0, head * D], r_full,
                        r_smem.index(half).reshape([1, 64, D]),
                    )  # fmt: skip
                    tma.async_copy_global_to_shared(
                        global2, [batch, t0, head * D], r_full,
                        r_smem.index(2 + half).reshape([1, 64, D]),
                    )  # fmt: skip
            else:
                box = [batch, t0, h0, w0, head * D]
                tma.async_copy_global_to_shared(rows1, box, r_full, r_smem.index(half))
                tma.async_copy_global_to_shared(rows2, box, r_full, r_smem.index(2 + half))
        r_phase ^= 1
        for member in range(group if KEYS else 1):
            other = (head * group + member if KEYS else head // group) * D
            t = lo_t
            h = lo_h
            w = lo_w
            for i in range(n_extra + boxes):
                c1_into = c1_smem.index(stage)
                c2_into = c2_smem.index(stage)
                mbarrier.wait(c1_empty.index(stage), phase)
                mbarrier.expect(c1_full.index(stage), BLOCK * D * 2)
                mbarrier.wait(c2_empty.index(stage), phase)
                mbarrier.expect(c2_full.index(stage), BLOCK * D * 2)
                if i < n_extra:
                    if extra1 is not None:
                        token = [batch, i * BLOCK, other]
                        tma.async_copy_global_to_shared(
                            extra1, token, c1_full.index(stage), c1_into.reshape([1, BLOCK, D])
                        )
                        tma.async_copy_global_to_shared(
                            extra2, token, c2_full.index(stage), c2_into.reshape([1, BLOCK, D])
                        )
                else:
                    spot = [batch, t, h, w, other]
                    tma.async_copy_global_to_shared(columns1, spot, c1_full.index(stage), c1_into)
                    tma.async_copy_global_to_shared(columns2, spot, c2_full.index(stage), c2_into)
                    t, h, w = next_box(t, h, w, lo_h, hi_h, lo_w, hi_w, CBOX)
                stage, phase = advance(stage, phase, STAGES)
        turn += 1
        index = tile_of_turn(turn, plan, global1 is not None)


@gluon.jit
def _column_statistics(
    statistics, i, n_extra, N_EXTRA, batch, head, heads, t, h, w, shape, column,
    CBOX: gl.constexpr,
):  # fmt: skip
    """The log-sum-exp (base 2) and delta of the queries that are a box's columns."""
    lse, delta, extra_lse, extra_delta = statistics
    T, H, W, _heads, _group = shape
    BLOCK: gl.constexpr = CBOX[0] * CBOX[1] * CBOX[2]
    if i < n_extra:
        token = i * BLOCK + column
        at = (batch.to(gl.int64) * N_EXTRA + token) * heads + head
        on = token < N_EXTRA
        top = gl.load(extra_lse + at, mask=on, other=0.0)
        shift = gl.load(extra_delta + at, mask=on, other=0.0)
    else:
        column_t = t + column // (CBOX[1] * CBOX[2])
        column_h = h + column // CBOX[2] % CBOX[1]
        column_w = w + column % CBOX[2]
        at = (((batch.to(gl.int64) * T + column_t) * H + column_h) * W + column_w) * heads + head
        on = (column_t >= 0) & (column_t < T) & (column_h >= 0) & (column_h < H)
        on = on & (column_w >= 0) & (column_w < W)
        top = gl.load(lse + at, mask=on, other=0.0)
        shift = gl.load(delta + at, mask=on, other=0.0)
    return top * LOG2_E, shift


@gluon.jit
def _consume(
    rows, columns, global_rows, extras, smem, bars, tables, statistics, shape, plan, N_EXTRA,
    n_global_rows, scale, radius, RBOX: gl.constexpr, HALF: gl.constexpr, CBOX: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, KEYS: gl.constexpr, DISC: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    rows1, rows2, out1, out2 = rows
    global1, global2, global_out1, global_out2 = global_rows
    r_smem, c1_smem, c2_smem = smem
    r_full, r_empty, c1_full, c1_empty, c2_full, c2_empty = bars
    lse, delta, extra_lse, extra_delta = statistics
    T, H, W, heads, group = shape
    BLOCK: gl.constexpr = CBOX[0] * CBOX[1] * CBOX[2]
    dtype: gl.constexpr = rows1.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    across: gl.constexpr = gl.SliceLayout(0, scores)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    n_extra = (N_EXTRA + BLOCK - 1) // BLOCK
    row = gl.arange(0, 64, gl.SliceLayout(1, scores))
    column = gl.arange(0, BLOCK, across)
    spread = gl.arange(0, BLOCK, line)
    scale2 = scale * LOG2_E
    stage = 0
    phase = 0
    r_phase = 0
    turn = 0
    index = tile_of_turn(turn, plan, global1 is not None)
    while index < plan[0]:
        is_global, plane, place, tile_t, tile_h, tile_w = decode_tile(
            index, plan, global1 is not None
        )
        batch = plane // heads
        head = plane - batch * heads
        lo_t, lo_h, hi_h, lo_w, hi_w, boxes = columns_of(
            tables, shape, plan, is_global, tile_t, tile_h, tile_w, CBOX
        )
        t0, h0, w0 = corner_of(is_global, place, tile_t, tile_h, tile_w, GROUP, RBOX, HALF)
        windows, inner, corner, row_t, row_h, row_w = windows_of(
            tables, shape, is_global, t0, h0, w0, row, radius, HALF, DISC
        )
        ends = (lo_h, hi_h, lo_w, hi_w)
        top = gl.zeros([64], gl.float32, gl.SliceLayout(1, scores))
        shift = gl.zeros([64], gl.float32, gl.SliceLayout(1, scores))
        if not KEYS:
            at = ((batch.to(gl.int64) * T + row_t) * H + row_h) * W + row_w
            on = (row_t < T) & (row_h < H) & (row_w < W)
            if global1 is not None:
                # two loads, one of them off: a branch that is never taken trips older compilers
                token = batch.to(gl.int64) * n_global_rows + t0 + row
                apart = is_global & (t0 + row < n_global_rows)
                top = gl.load(extra_lse + token * heads + head, mask=apart, other=0.0)
                shift = gl.load(extra_delta + token * heads + head, mask=apart, other=0.0)
                on = on & (is_global == 0)
            top += gl.load(lse + at * heads + head, mask=on, other=0.0)
            shift += gl.load(delta + at * heads + head, mask=on, other=0.0)
            top = top * LOG2_E
        acc1 = gl.zeros([64, D], gl.float32, output)
        acc2 = acc1
        empty = gl.zeros([64, BLOCK], gl.float32, scores)
        r1 = r_smem.index(GROUP).reshape([64, D])
        r2 = r_smem.index(2 + GROUP).reshape([64, D])
        mbarrier.wait(r_full, r_phase)
        for member in range(group if KEYS else 1):
            t = lo_t
            h = lo_h
            w = lo_w
            for i in range(n_extra + boxes):
                c1 = c1_smem.index(stage).reshape([BLOCK, D])
                c2 = c2_smem.index(stage).reshape([BLOCK, D])
                mbarrier.wait(c1_full.index(stage), phase)
                s = warpgroup_mma(r1, c1.permute((1, 0)), empty, use_acc=False, is_async=True)
                mbarrier.wait(c2_full.index(stage), phase)
                dp = warpgroup_mma(r2, c2.permute((1, 0)), empty, use_acc=False, is_async=True)
                if KEYS:
                    high, low = _column_statistics(
                        statistics, i, n_extra, N_EXTRA, batch, head * group + member,
                        heads * group, t, h, w, shape, spread, CBOX,
                    )  # fmt: skip
                s = warpgroup_mma_wait(1, [s])
                s, t, h, w = hide_unseen(
                    s, i, t, h, w, n_extra, N_EXTRA, windows, inner, ends, corner, column,
                    CBOX, HALF, DISC,
                )  # fmt: skip
                # statistics of columns fill registers: each is spread out when it is needed
                if KEYS:
                    p = gl.exp2(s * scale2 - gl.convert_layout(high, across)[None, :])
                else:
                    p = gl.exp2(s * scale2 - top[:, None])
                dp = warpgroup_mma_wait(0, [dp])
                if KEYS:
                    ds = p * (dp - gl.convert_layout(low, across)[None, :])
                else:
                    ds = p * (dp - shift[:, None])
                if KEYS:
                    weights = gl.convert_layout(p.to(dtype), operand)
                    acc2 = warpgroup_mma(weights, c2, acc2, is_async=True)
                    slope = gl.convert_layout(ds.to(dtype), operand)
                    acc1 = warpgroup_mma(slope, c1, acc1, is_async=True)
                    acc1, acc2 = warpgroup_mma_wait(0, [acc1, acc2])
                else:
                    slope = gl.convert_layout(ds.to(dtype), operand)
                    acc1 = warpgroup_mma(slope, c1, acc1, is_async=True)
                    acc1 = warpgroup_mma_wait(0, [acc1])
                mbarrier.arrive(c1_empty.index(stage), count=1)
                mbarrier.arrive(c2_empty.index(stage), count=1)
                stage, phase = advance(stage, phase, STAGES)
        r1.store((acc1 * scale).to(dtype))
        if KEYS:
            r2.store(acc2.to(dtype))
        fence_async_shared()
        if is_global:
            if global_out1 is not None:
                spot = [batch, t0, head * D]
                tma.async_copy_shared_to_global(
                    global_out1, spot, r_smem.index(GROUP).reshape([1, 64, D])
                )
                if KEYS:
                    tma.async_copy_shared_to_global(
                        global_out2, spot, r_smem.index(2 + GROUP).reshape([1, 64, D])
                    )
        else:
            box = [batch, t0, h0, w0, head * D]
            tma.async_copy_shared_to_global(out1, box, r_smem.index(GROUP))
            if KEYS:
                tma.async_copy_shared_to_global(out2, box, r_smem.index(2 + GROUP))
        tma.store_wait(0)
        mbarrier.arrive(r_empty, count=1)
        r_phase ^= 1
        turn += 1
        index = tile_of_turn(turn, plan, global1 is not None)


@gluon.jit
def hopper_grid_gradients(
    rows1, rows2, out1, out2, columns1, columns2, global1, global2, global_out1, global_out2,
    extra1, extra2, tables, lse, delta, extra_lse, extra_delta,
    T, H, W, heads, group, n_tiles, n_global, per_head, global_tiles, tiles_t, tiles_h, tiles_w,
    rounds, N_EXTRA, n_global_rows, scale, radius, RBOX: gl.constexpr, HALF: gl.constexpr,
    CBOX: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, KEYS: gl.constexpr,
    DISC: gl.constexpr,
):  # fmt: skip
    """One program a streaming multiprocessor: it takes tiles of 128 rows until none is left."""
    dtype: gl.constexpr = rows1.dtype
    r_smem = gl.allocate_shared_memory(dtype, [4] + rows1.block_type.shape, rows1.layout)
    c1_smem = gl.allocate_shared_memory(
        dtype, [STAGES] + columns1.block_type.shape, columns1.layout
    )
    c2_smem = gl.allocate_shared_memory(
        dtype, [STAGES] + columns1.block_type.shape, columns1.layout
    )
    r_full, r_empty = ring(1, 2)
    c1_full, c1_empty = ring(STAGES, 2)
    c2_full, c2_empty = ring(STAGES, 2)
    rows = (rows1, rows2, out1, out2)
    columns = (columns1, columns2)
    global_rows = (global1, global2, global_out1, global_out2)
    extras = (extra1, extra2)
    smem = (r_smem, c1_smem, c2_smem)
    bars = (r_full.index(0), r_empty.index(0), c1_full, c1_empty, c2_full, c2_empty)
    statistics = (lse, delta, extra_lse, extra_delta)
    shape = (T, H, W, heads, group)
    plan = (n_tiles, n_global, per_head, global_tiles, tiles_t, tiles_h, tiles_w, rounds)
    gl.warp_specialize(
        [
            (_consume, (rows, columns, global_rows, extras, smem, bars, tables, statistics, shape,
                        plan, N_EXTRA, n_global_rows, scale, radius, RBOX, HALF, CBOX, D, STAGES,
                        KEYS, DISC, 0)),
            (_consume, (rows, columns, global_rows, extras, smem, bars, tables, statistics, shape,
                        plan, N_EXTRA, n_global_rows, scale, radius, RBOX, HALF, CBOX, D, STAGES,
                        KEYS, DISC, 1)),
            (_produce, (rows, columns, global_rows, extras, smem, bars, tables, shape, plan,
                        N_EXTRA, RBOX, HALF, CBOX, D, STAGES, KEYS)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
