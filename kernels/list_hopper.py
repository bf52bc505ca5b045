"""Attention along block lists on Hopper with Gluon: the host side of `list_hopper_kernel`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vistoken.kernels.block_mask import BlockMask
from vistoken.kernels.hopper_launch import (
    QUERIES,
    REGISTERS,
    STAGES,
    list_descriptor,
    why_not_here,
)
from vistoken.kernels.list_launch import key_block_lists, list_strides

KEYS = (64, 128)  # of a block


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> str | None:
    """Return why the kernel cannot run on these tensors, or None where it can."""
    if mask.block_q % QUERIES or mask.block_kv not in KEYS:
        return (
            f"it takes query blocks of a multiple of {QUERIES} and key blocks of {KEYS} tokens, "
            f"not {mask.block_q} x {mask.block_kv}"
        )
    if mask.lengths is not None:
        return "keys that do not count are hidden by their scores alone, and could hold NaN"
    return why_not_here(q, v, scale)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as `vistoken.kernels.list_reference.forward`."""
    from vistoken.kernels.list_hopper_kernel import hopper_list_forward

    batch, tokens, heads, dim = q.shape
    out = torch.empty((batch, tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, tokens, heads), dtype=torch.float32, device=q.device)
    lists = key_block_lists(mask)
    tiles = -(-tokens // QUERIES)
    hopper_list_forward[(batch * heads * tiles,)](
        list_descriptor(q, QUERIES // 2), list_descriptor(k, mask.block_kv),
        list_descriptor(v, mask.block_kv), list_descriptor(out, QUERIES // 2),
        *lists[:-1], lse, heads, heads // k.shape[2], tokens, mask.kv_tokens, tiles,
        mask.full_index.shape[-1], mask.partial_index.shape[-1], *list_strides(mask)[:2],
        scale * math.log2(math.e), BLOCK_Q=mask.block_q, BLOCK=mask.block_kv, D=dim,
        STAGES=STAGES[dim] * 128 // mask.block_kv,
        RAGGED=mask.kv_tokens % mask.block_kv != 0,
        PARTIAL=mask.table is not None, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return out, lse
