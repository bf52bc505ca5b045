"""Grid attention on Hopper: a producer warp feeds two warpgroups that overlap softmax and wgmma."""

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
from vistoken.kernels.hopper_tile import LN2, advance, ring, weigh


@gluon.jit
def _produce(
    descs, extras, smem, bars, tables, shape, plan, N_EXTRA,
    QBOX: gl.constexpr, HALF: gl.constexpr, KBOX: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc, o_desc = descs
    gq_desc, go_desc, xk_desc, xv_desc = extras
    q_smem, k_smem, v_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    T, H, W, heads, group = shape
    n_tiles = plan[0]
    BLOCK: gl.constexpr = KBOX[0] * KBOX[1] * KBOX[2]
    n_extra = (N_EXTRA + BLOCK - 1) // BLOCK
    stage = 0
    phase = 1
    q_stage = 0
    q_phase = 1
    turn = 0
    index = tile_of_turn(turn, plan, gq_desc is not None)
    while index < n_tiles:
        is_global, plane, place, tile_t, tile_h, tile_w = decode_tile(
            index, plan, gq_desc is not None
        )
        batch = plane // heads
        head = plane - batch * heads
        t, h, hi_h, w, hi_w, boxes = columns_of(
            tables, shape, plan, is_global, tile_t, tile_h, tile_w, KBOX
        )
        lo_h = h
        lo_w = w
        mbarrier.wait(q_empty.index(q_stage), q_phase)
        mbarrier.expect(q_full.index(q_stage), 2 * 64 * D * 2)
        for half in gl.static_range(2):
            t0, h0, w0 = corner_of(is_global, place, tile_t, tile_h, tile_w, half, QBOX, HALF)
            if is_global:
                if gq_desc is not None:
                    tma.async_copy_global_to_shared(
                        gq_desc, [batch, t0, head * D], q_full.index(q_stage),
                        q_smem.index(2 * q_stage + half).reshape([1, 64, D]),
                    )  # fmt: skip
            else:
                tma.async_copy_global_to_shared(
                    q_desc, [batch, t0, h0, w0, head * D], q_full.index(q_stage),
                    q_smem.index(2 * q_stage + half),
                )  # fmt: skip
        q_stage, q_phase = advance(q_stage, q_phase, Q_STAGES)
        kv = head // group * D
        for i in range(n_extra + boxes):
            k_into = k_smem.index(stage)
            v_into = v_smem.index(stage)
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), BLOCK * D * 2)
            if i < n_extra:
                if xk_desc is not None:
                    tma.async_copy_global_to_shared(
                        xk_desc, [batch, i * BLOCK, kv], k_full.index(stage),
                        k_into.reshape([1, BLOCK, D]),
                    )  # fmt: skip
            else:
                tma.async_copy_global_to_shared(
                    k_desc, [batch, t, h, w, kv], k_full.index(stage), k_into
                )
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), BLOCK * D * 2)
            if i < n_extra:
                if xv_desc is not None:
                    tma.async_copy_global_to_shared(
                        xv_desc, [batch, i * BLOCK, kv], v_full.index(stage),
                        v_into.reshape([1, BLOCK, D]),
                    )  # fmt: skip
            else:
                tma.async_copy_global_to_shared(
                    v_desc, [batch, t, h, w, kv], v_full.index(stage), v_into
                )
                t, h, w = next_box(t, h, w, lo_h, hi_h, lo_w, hi_w, KBOX)
            stage, phase = advance(stage, phase, STAGES)
        turn += 1
        index = tile_of_turn(turn, plan, gq_desc is not None)


@gluon.jit
def _consume(
    descs, extras, smem, bars, tables, lse, lse_global, shape, plan, N_EXTRA, pitches, scale,
    radius, QBOX: gl.constexpr, HALF: gl.constexpr, KBOX: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    GROUP: gl.constexpr, DISC: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc, o_desc = descs
    gq_desc, go_desc, xk_desc, xv_desc = extras
    q_smem, k_smem, v_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    T, H, W, heads, group = shape
    n_tiles = plan[0]
    BLOCK: gl.constexpr = KBOX[0] * KBOX[1] * KBOX[2]
    dtype: gl.constexpr = q_desc.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    n_extra = (N_EXTRA + BLOCK - 1) // BLOCK
    row = gl.arange(0, 64, gl.SliceLayout(1, scores))
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, scores))
    stage = 0
    phase = 0
    q_stage = 0
    q_phase = 0
    turn = 0
    index = tile_of_turn(turn, plan, gq_desc is not None)
    while index < n_tiles:
        is_global, plane, place, tile_t, tile_h, tile_w = decode_tile(
            index, plan, gq_desc is not None
        )
        batch = plane // heads
        head = plane - batch * heads
        lo_t, lo_h, hi_h, lo_w, hi_w, steps = columns_of(
            tables, shape, plan, is_global, tile_t, tile_h, tile_w, KBOX
        )
        steps += n_extra
        t0, h0, w0 = corner_of(is_global, place, tile_t, tile_h, tile_w, GROUP, QBOX, HALF)
        windows, inner, corner, q_t, q_h, q_w = windows_of(
            tables, shape, is_global, t0, h0, w0, row, radius, HALF, DISC
        )
        ends = (lo_h, hi_h, lo_w, hi_w)
        q_into = q_smem.index(2 * q_stage + GROUP)
        q = q_into.reshape([64, D])
        acc = gl.zeros([64, D], gl.float32, output)
        empty = gl.zeros([64, BLOCK], gl.float32, scores)
        mbarrier.wait(q_full.index(q_stage), q_phase)
        mbarrier.wait(k_full.index(stage), phase)
        k = k_smem.index(stage).reshape([BLOCK, D]).permute((1, 0))
        s = warpgroup_mma(q, k, empty, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        s, t, h, w = hide_unseen(
            s, 0, lo_t, lo_h, lo_w, n_extra, N_EXTRA, windows, inner, ends, corner, column,
            KBOX, HALF, DISC,
        )  # fmt: skip
        top = gl.max(s, 1) * scale
        e = gl.exp2(s * scale - top[:, None])
        mass = gl.sum(e, 1)
        p = gl.convert_layout(e.to(dtype), weights)
        if turn > 0:
            # the output of the tile before has been read out of its buffer by now
            tma.store_wait(0)
            before = gl.where(q_stage == 0, Q_STAGES - 1, q_stage - 1)
            mbarrier.arrive(q_empty.index(before), count=1)
        last = stage
        last_phase = phase
        stage, phase = advance(stage, phase, STAGES)
        for i in range(1, steps):
            mbarrier.wait(k_full.index(stage), phase)
            k = k_smem.index(stage).reshape([BLOCK, D]).permute((1, 0))
            s = warpgroup_mma(q, k, empty, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(last), last_phase)
            v = v_smem.index(last).reshape([BLOCK, D])
            acc = warpgroup_mma(p, v, acc, is_async=True)
            s = warpgroup_mma_wait(1, [s])
            mbarrier.arrive(k_empty.index(stage), count=1)
            s, t, h, w = hide_unseen(
                s, i, t, h, w, n_extra, N_EXTRA, windows, inner, ends, corner, column,
                KBOX, HALF, DISC,
            )  # fmt: skip
            e, alpha, top, mass = weigh(s, top, mass, scale)
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(v_empty.index(last), count=1)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, output))[:, None]
            p = gl.convert_layout(e.to(dtype), weights)
            last = stage
            last_phase = phase
            stage, phase = advance(stage, phase, STAGES)
        mbarrier.wait(v_full.index(last), last_phase)
        v = v_smem.index(last).reshape([BLOCK, D])
        acc = warpgroup_mma(p, v, acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(v_empty.index(last), count=1)

        acc = acc / gl.convert_layout(mass, gl.SliceLayout(1, output))[:, None]
        q.store(acc.to(dtype))
        fence_async_shared()
        value = top * LN2 + gl.log(mass)
        if is_global:
            if go_desc is not None:
                tma.async_copy_shared_to_global(
                    go_desc, [batch, t0, head * D], q_into.reshape([1, 64, D])
                )
                token = batch.to(gl.int64) * pitches[1] + t0 + row
                gl.store(lse_global + token * heads + head, value, mask=t0 + row < pitches[2])
        else:
            tma.async_copy_shared_to_global(o_desc, [batch, t0, h0, w0, head * D], q_into)
            token = batch.to(gl.int64) * pitches[0] + (q_t * H + q_h) * W + q_w
            gl.store(lse + token * heads + head, value, mask=(q_t < T) & (q_h < H) & (q_w < W))
        q_stage, q_phase = advance(q_stage, q_phase, Q_STAGES)
        turn += 1
        index = tile_of_turn(turn, plan, gq_desc is not None)
    tma.store_wait(0)


@gluon.jit
def hopper_grid_forward(
    q_desc, k_desc, v_desc, o_desc, gq_desc, go_desc, xk_desc, xv_desc, tables, lse, lse_global,
    T, H, W, heads, group, n_tiles, n_global, per_head, global_tiles, tiles_t, tiles_h, tiles_w,
    rounds, N_EXTRA, n_queries, pitch, global_pitch, scale, radius, QBOX: gl.constexpr,
    HALF: gl.constexpr, KBOX: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr, DISC: gl.constexpr,
):  # fmt: skip
    """One program a streaming multiprocessor: it takes tiles of 128 queries until none is left."""
    dtype: gl.constexpr = q_desc.dtype
    # a tile's queries, which its output overwrites: the next tile's are read in the meantime
    q_smem = gl.allocate_shared_memory(
        dtype, [2 * Q_STAGES] + q_desc.block_type.shape, q_desc.layout
    )
    k_smem = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_full, q_empty = ring(Q_STAGES, 2)
    k_full, k_empty = ring(STAGES, 2)
    v_full, v_empty = ring(STAGES, 2)
    descs = (q_desc, k_desc, v_desc, o_desc)
    extras = (gq_desc, go_desc, xk_desc, xv_desc)
    smem = (q_smem, k_smem, v_smem)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    shape = (T, H, W, heads, group)
    plan = (n_tiles, n_global, per_head, global_tiles, tiles_t, tiles_h, tiles_w, rounds)
    # tokens of a batch entry in the tensors of log-sum-exps, and how many global queries there are
    pitches = (pitch, global_pitch, n_queries)
    gl.warp_specialize(
        [
            (_consume, (descs, extras, smem, bars, tables, lse, lse_global, shape, plan, N_EXTRA,
                        pitches, scale, radius, QBOX, HALF, KBOX, D, STAGES, Q_STAGES, 0, DISC)),
            (_consume, (descs, extras, smem, bars, tables, lse, lse_global, shape, plan, N_EXTRA,
                        pitches, scale, radius, QBOX, HALF, KBOX, D, STAGES, Q_STAGES, 1, DISC)),
            (_produce, (descs, extras, smem, bars, tables, shape, plan, N_EXTRA, QBOX, HALF,
                        KBOX, D, STAGES, Q_STAGES)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
