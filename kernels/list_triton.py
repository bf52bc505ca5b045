"""Attention along block lists as Triton programs, one for each tile of queries and head."""

# Triton gives annotations of a kernel a meaning of its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistoken.kernels import list_hopper
from vistoken.kernels.block_mask import BlockMask
from vistoken.kernels.list_launch import key_block_lists, list_strides
from vistoken.kernels.list_triton_launch import list_config, list_launch
from vistoken.kernels.triton_launch import DTYPES, LARGEST_HEAD, Launch, rows_in_line
from vistoken.kernels.triton_tile import (
    FLOOR,
    INTERPRETED,
    load_tile,
    log2_scale,
    softmax_end,
    softmax_step,
    store_tile,
)


@triton.jit
def load_bits(
    table_ptr,
    entry,
    row,
    inner,
    TILE_KV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """Which pairs of a tile are seen: bool [rows, TILE_KV], or [TILE_KV, rows] with KEYS_FIRST.

    row: of the block, for each row of the tile; inner: of the block, the tile's first key. One word
    is read per row and 32 keys; which word a key takes is known when the kernel is compiled.
    """
    WORDS: tl.constexpr = (BLOCK_KV + 31) // 32
    SPAN: tl.constexpr = (TILE_KV + 31) // 32
    words = table_ptr + (entry.to(tl.int64) * BLOCK_Q + row) * WORDS + inner // 32
    key = tl.expand_dims(tl.arange(0, TILE_KV), 1 if KEYS_FIRST else 0)
    shift = key + inner % 32 if TILE_KV < 32 else key % 32
    bit = tl.expand_dims(tl.load(words), 0 if KEYS_FIRST else 1) >> shift
    for i in tl.static_range(1, SPAN):
        word = tl.expand_dims(tl.load(words + i), 0 if KEYS_FIRST else 1)
        bit = tl.where(key // 32 == i, word >> shift, bit)
    return (bit & 1) != 0


@triton.jit
def seen_pairs(
    valid, table_ptr, bits_ptr, place, row, inner,
    TILE_KV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, RAGGED: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """Which pairs of a tile [rows, TILE_KV] are seen; of a full block, those with a valid key."""
    seen = valid[None, :]
    if PARTIAL:
        entry = tl.load(bits_ptr + place)
        bits = load_bits(table_ptr, entry, row, inner, TILE_KV, BLOCK_Q, BLOCK_KV, False)
        seen = bits & seen if RAGGED else bits
    return seen


@triton.jit
def valid_keys(column, first, block, inner, lengths_ptr, kv_tokens, RAGGED: tl.constexpr):
    """Which keys of a tile count: those of the sequence, and of them the valid ones of a block."""
    valid = column >= 0
    if RAGGED:
        valid = column < kv_tokens - first
        if lengths_ptr is not None:
            valid = valid & (column < tl.load(lengths_ptr + block) - inner)
    return valid


@triton.jit
def _see_blocks(
    acc, total, top, q, k_ptr, v_ptr, k_stride, v_stride, index_ptr, bits_ptr, table_ptr,
    lengths_ptr, count, kv_tokens, scale, row,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_KV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, RAGGED: tl.constexpr,
    PARTIAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The running softmax over the first `count` key blocks of one list."""
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
        acc, total, top = softmax_step(
            q, k, v, seen, acc, total, top, scale, RAGGED or PARTIAL, PRECISION, UPCAST
        )
    return acc, total, top


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, full_count_ptr, full_index_ptr, partial_count_ptr,
    partial_index_ptr, partial_bits_ptr, table_ptr, lengths_ptr, q_strides, k_strides, v_strides,
    list_strides, heads, group, q_tokens, kv_tokens, tiles, full_width, partial_width, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    RAGGED: tl.constexpr, PARTIAL: tl.constexpr, FLIP: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Strides are (batch, token, head), those of the lists (batch, head, batch of lengths)."""
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    token = tile.to(tl.int64) * TILE_Q + tl.arange(0, TILE_Q)
    row = tile % (BLOCK_Q // TILE_Q) * TILE_Q + tl.arange(0, TILE_Q)
    inside = token < q_tokens
    q_ptr += batch * q_strides[0] + head * q_strides[2]
    q = load_tile(q_ptr, token * q_strides[1], inside, True, D, BLOCK_D)
    if FLIP:
        q = (-q.to(tl.float32)).to(q.dtype)
    k_ptr += batch * k_strides[0] + head // group * k_strides[2]
    v_ptr += batch * v_strides[0] + head // group * v_strides[2]
    lists = batch * list_strides[0] + head * list_strides[1] + tile // (BLOCK_Q // TILE_Q)
    if lengths_ptr is not None:
        lengths_ptr += batch * list_strides[2]

    acc = tl.zeros([TILE_Q, BLOCK_DV], tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    top = tl.full([TILE_Q], FLOOR, tl.float32)
    acc, total, top = _see_blocks(
        acc, total, top, q, k_ptr, v_ptr, k_strides[1], v_strides[1],
        full_index_ptr + lists * full_width, None, None, lengths_ptr,
        tl.load(full_count_ptr + lists), kv_tokens, scale, row,
        D, DV, BLOCK_D, BLOCK_DV, TILE_KV, BLOCK_Q, BLOCK_KV, RAGGED, False, PRECISION, UPCAST,
    )  # fmt: skip
    if PARTIAL:
        acc, total, top = _see_blocks(
            acc, total, top, q, k_ptr, v_ptr, k_strides[1], v_strides[1],
            partial_index_ptr + lists * partial_width, partial_bits_ptr + lists * partial_width,
            table_ptr, lengths_ptr, tl.load(partial_count_ptr + lists), kv_tokens, scale, row,
            D, DV, BLOCK_D, BLOCK_DV, TILE_KV, BLOCK_Q, BLOCK_KV, RAGGED, True, PRECISION, UPCAST,
        )  # fmt: skip

    out, lse = softmax_end(acc, total, top)
    line = (batch * q_tokens + token) * heads + head
    tl.store(lse_ptr + line, lse, mask=inside)
    store_tile(out_ptr, line * DV, inside, out, DV, BLOCK_DV)


# --- host side -----------------------------------------------------------------------------------


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> str | None:
    """Return why the kernels cannot run on these tensors, or None where they can."""
    if not q.is_cuda and not INTERPRETED:
        return f"the tensors are on {q.device.type}, not on a CUDA device"
    if q.dtype not in DTYPES:
        return f"the dtype is {q.dtype}; it takes float32, float16 and bfloat16"
    widest = max(q.shape[-1], v.shape[-1])
    if widest > LARGEST_HEAD:
        return f"the head size is {widest}, at most {LARGEST_HEAD} fit one program"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as `vistoken.kernels.list_reference.forward`, without autograd."""
    q, k, v = rows_in_line(q, k, v)
    if list_hopper.why_not(q, k, v, mask, scale) is None:
        return list_hopper.forward(q, k, v, mask, scale)
    launch, out, lse = forward_launch(q, k, v, mask, scale)
    launch.run()
    return out, lse


def forward_launch(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
) -> tuple[Launch, Tensor, Tensor]:
    """Return the launch of the kernel, and the output and log-sum-exp it fills."""
    batch, tokens, heads, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[-1])
    lse = q.new_empty(batch, tokens, heads, dtype=torch.float32)
    config = list_config("forward", q, v, mask)
    tiles = mask.q_blocks * (mask.block_q // config.queries[0])
    arguments = (
        q, k, v, out, lse, *key_block_lists(mask),
        q.stride()[:3], k.stride()[:3], v.stride()[:3], list_strides(mask),
        heads, heads // k.shape[2], tokens, k.shape[1], tiles,
        mask.full_index.shape[-1], mask.partial_index.shape[-1], log2_scale(scale),
    )  # fmt: skip
    programs, rows = tiles * batch * heads, config.queries[0]
    launch = list_launch(forward_kernel, programs, rows, arguments, q, v, mask, scale, config)
    return launch, out, lse
