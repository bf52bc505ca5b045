"""Attention along block lists on Hopper: a producer warp feeds two warpgroups of 64 queries."""

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

from vistoken.kernels.hopper_tile import LN2, MASKED, advance, ring, weigh


@gluon.jit
def _tile(shape, strides, BLOCK_Q: gl.constexpr):
    """This program's batch, head, first query and the place of its list."""
    heads, group, q_tokens, kv_tokens, tiles, width, partial_width = shape
    list_batch, list_head = strides
    index = gl.program_id(0)
    plane = index // tiles
    first = (index - plane * tiles) * 128
    batch = plane // heads
    head = plane - batch * heads
    return batch, head, first, batch * list_batch + head * list_head + first // BLOCK_Q


@gluon.jit
def _key_block(i, n_partial, at, shape, full_index, partial_index):
    """The i-th key block of a list: those seen in part come first."""
    width = shape[5]
    partial_width = shape[6]
    # two loads with one of them off: no branch in the loop
    part = gl.load(partial_index + at * partial_width + i, mask=i < n_partial, other=0)
    full = gl.load(full_index + at * width + i - n_partial, mask=i >= n_partial, other=0)
    return gl.where(i < n_partial, part, full)


@gluon.jit
def _produce(
    descs, smem, bars, lists, shape, strides,
    BLOCK_Q: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc, o_desc = descs
    q_smem, k_smem, v_smem = smem
    q_full, k_full, k_empty, v_full, v_empty = bars
    full_count, full_index, partial_count, partial_index, partial_bits, table = lists
    batch, head, first, at = _tile(shape, strides, BLOCK_Q)
    mbarrier.expect(q_full, 2 * 64 * D * 2)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(
            q_desc, [batch, first + half * 64, head * D], q_full, q_smem.index(half)
        )
    n_partial = gl.load(partial_count + at)
    steps = n_partial + gl.load(full_count + at)
    kv = head // shape[1] * D
    stage = 0
    phase = 1
    for i in range(steps):
        block = _key_block(i, n_partial, at, shape, full_index, partial_index)
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_full.index(stage), BLOCK * D * 2)
        tma.async_copy_global_to_shared(
            k_desc, [batch, block * BLOCK, kv], k_full.index(stage), k_smem.index(stage)
        )
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_full.index(stage), BLOCK * D * 2)
        tma.async_copy_global_to_shared(
            v_desc, [batch, block * BLOCK, kv], v_full.index(stage), v_smem.index(stage)
        )
        stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _hide(
    s, i, n_partial, at, row, column, lists, shape,
    BLOCK_Q: gl.constexpr, BLOCK: gl.constexpr, RAGGED: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """Mask the scores of the i-th key block of a list where a query does not see a key."""
    full_count, full_index, partial_count, partial_index, partial_bits, table = lists
    if RAGGED:
        block = _key_block(i, n_partial, at, shape, full_index, partial_index)
        valid = gl.minimum(shape[3] - block * BLOCK, BLOCK)
        if valid < BLOCK:
            s = gl.where((column < valid)[None, :], s, MASKED)
    if PARTIAL:  # noqa: SIM102 (decided when the kernel is compiled, unlike the inner one)
        if i < n_partial:
            entry = gl.load(partial_bits + at * shape[6] + i).to(gl.int64)
            words = table + (entry * BLOCK_Q + row) * (BLOCK // 32)
            bit = gl.load(words)[:, None] >> (column % 32)[None, :]
            for word in gl.static_range(1, BLOCK // 32):
                other = gl.load(words + word)[:, None] >> (column % 32)[None, :]
                bit = gl.where((column // 32 == word)[None, :], other, bit)
            s = gl.where((bit & 1) != 0, s, MASKED)
    return s


@gluon.jit
def _consume(
    descs, smem, bars, lists, lse, shape, strides, scale,
    BLOCK_Q: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    RAGGED: gl.constexpr, PARTIAL: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc, o_desc = descs
    q_smem, k_smem, v_smem = smem
    q_full, k_full, k_empty, v_full, v_empty = bars
    full_count, full_index, partial_count, partial_index, partial_bits, table = lists
    heads, group, q_tokens, kv_tokens, tiles, width, partial_width = shape
    dtype: gl.constexpr = q_desc.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    batch, head, first, at = _tile(shape, strides, BLOCK_Q)
    first += GROUP * 64
    n_partial = gl.load(partial_count + at)
    steps = n_partial + gl.load(full_count + at)
    row = gl.arange(0, 64, rows)
    inner = first % BLOCK_Q + row
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, scores))
    top = gl.full([64], MASKED, gl.float32, rows) * scale
    mass = gl.full([64], 0.0, gl.float32, rows)
    acc = gl.zeros([64, D], gl.float32, output)
    empty = gl.zeros([64, BLOCK], gl.float32, scores)
    q = q_smem.index(GROUP).reshape([64, D])
    mbarrier.wait(q_full, 0)
    if steps > 0:
        mbarrier.wait(k_full.index(0), 0)
        k = k_smem.index(0).reshape([BLOCK, D]).permute((1, 0))
        s = warpgroup_mma(q, k, empty, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_empty.index(0), count=1)
        s = _hide(
            s, 0, n_partial, at, inner, column, lists, shape,
            BLOCK_Q, BLOCK, RAGGED, PARTIAL,
        )  # fmt: skip
        e, alpha, top, mass = weigh(s, top, mass, scale)
        p = gl.convert_layout(e.to(dtype), weights)
        last = 0
        last_phase = 0
        stage, phase = advance(0, 0, STAGES)
        for i in range(1, steps):
            mbarrier.wait(k_full.index(stage), phase)
            k = k_smem.index(stage).reshape([BLOCK, D]).permute((1, 0))
            s = warpgroup_mma(q, k, empty, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(last), last_phase)
            v = v_smem.index(last).reshape([BLOCK, D])
            acc = warpgroup_mma(p, v, acc, is_async=True)
            s = warpgroup_mma_wait(1, [s])
            mbarrier.arrive(k_empty.index(stage), count=1)
            s = _hide(
                s, i, n_partial, at, inner, column, lists, shape,
                BLOCK_Q, BLOCK, RAGGED, PARTIAL,
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
    # a row all of whose scores were masked has seen nothing: output 0, mass 0
    blind = top <= MASKED * scale
    share = gl.where(blind, 0.0, 1.0 / gl.where(blind, 1.0, mass))
    acc = acc * gl.convert_layout(share, gl.SliceLayout(1, output))[:, None]
    q.store(acc.to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [batch, first, head * D], q_smem.index(GROUP))
    value = gl.where(blind, float("-inf"), top * LN2 + gl.log(mass))
    token = batch.to(gl.int64) * q_tokens + first + row
    gl.store(lse + token * heads + head, value, mask=first + row < q_tokens)
    tma.store_wait(0)


@gluon.jit
def hopper_list_forward(
    q_desc, k_desc, v_desc, o_desc, full_count, full_index, partial_count, partial_index,
    partial_bits, table, lse, heads, group, q_tokens, kv_tokens, tiles, width,
    partial_width, list_batch, list_head, scale,
    BLOCK_Q: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    RAGGED: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """One program for each tile of 128 queries of a head."""
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_full, _unused = ring(1, 2)
    k_full, k_empty = ring(STAGES, 2)
    v_full, v_empty = ring(STAGES, 2)
    descs = (q_desc, k_desc, v_desc, o_desc)
    smem = (q_smem, k_smem, v_smem)
    bars = (q_full.index(0), k_full, k_empty, v_full, v_empty)
    lists = (full_count, full_index, partial_count, partial_index, partial_bits, table)
    shape = (heads, group, q_tokens, kv_tokens, tiles, width, partial_width)
    strides = (list_batch, list_head)
    gl.warp_specialize(
        [
            (_consume, (descs, smem, bars, lists, lse, shape, strides, scale, BLOCK_Q, BLOCK, D,
                        STAGES, RAGGED, PARTIAL, 0)),
            (_consume, (descs, smem, bars, lists, lse, shape, strides, scale, BLOCK_Q, BLOCK, D,
                        STAGES, RAGGED, PARTIAL, 1)),
            (_produce, (descs, smem, bars, lists, shape, strides, BLOCK_Q, BLOCK, D, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
