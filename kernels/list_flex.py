"""Attention along block lists by PyTorch's FlexAttention.

On CUDA the kernel is compiled at the first call for a shape. Elsewhere FlexAttention runs
uncompiled, which takes the whole matrix of logits.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vistoken.kernels.block_mask import BlockMask
from vistoken.kernels.element_mask import WORD
from vistoken.kernels.grid_flex import attend, why_not_tensors

_FULL, _OFF = -1, -2
_KERNEL_BLOCK = 128  # tokens of the largest tile that FlexAttention's kernels choose by default
_masks: WeakKeyDictionary[BlockMask, Any] = WeakKeyDictionary()


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> str | None:
    """Return why FlexAttention cannot run with these inputs, or None."""
    if torch.compiler.is_compiling():
        return "FlexAttention along block lists compiles itself: call it outside torch.compile"
    if not min(q.shape[1], k.shape[1]):
        return "FlexAttention needs at least one query and one key"
    return why_not_tensors(q, v, (k,), q.shape[1], k.shape[1])


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as `list_reference.forward` does."""
    if mask.lengths is not None:  # what lies behind the valid keys may be anything
        column = torch.arange(mask.block_kv, device=mask.device)
        hidden = (column >= mask.lengths[..., None]).flatten(1)[:, : mask.kv_tokens, None, None]
        hidden = hidden.to(k.device)
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    if mask.device != q.device:
        mask = mask.to(q.device)
    out, lse = attend(q, k, v, flex_mask(mask), scale, _kernel_options(mask))
    return out, lse


def _kernel_options(mask: BlockMask) -> dict[str, int] | None:
    """Tiles that fit blocks too small for the ones that FlexAttention chooses."""
    least = min(mask.block_q, mask.block_kv)
    if least >= _KERNEL_BLOCK:
        return None
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
    return dict.fromkeys(names, least)


def flex_mask(mask: BlockMask) -> Any:
    """Return FlexAttention's block mask with the same lists, made once for each mask."""
    made = _masks.get(mask)
    if made is None:
        made = _flex_mask(mask)
        _masks[mask] = made
    return made


def _flex_mask(mask: BlockMask) -> Any:
    from torch.nn.attention.flex_attention import BlockMask as FlexMask

    entries = _entries(mask)
    full, partial = entries == _FULL, entries >= 0
    if mask.lengths is not None:  # FlexAttention reads full blocks as they are
        short = (mask.lengths < mask.block_kv)[:, None, None, :]
        full, partial = full & ~short, partial | (full & short)
    return FlexMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=(mask.block_q, mask.block_kv),
        mask_mod=_mask_mod(mask, entries),
        seq_lengths=(mask.q_tokens, mask.kv_tokens),
    )


def _entries(mask: BlockMask) -> Tensor:
    """Of each pair of blocks [b, h, nq, nk]: its entry of the table, _FULL or _OFF; int32."""
    b, h, nq = mask.full_count.shape
    entries = torch.full(
        (b, h, nq, mask.kv_blocks + 1), _OFF, dtype=torch.int32, device=mask.device
    )
    lists = (
        (mask.full_count, mask.full_index, torch.full_like(mask.full_index, _FULL)),
        (mask.partial_count, mask.partial_index, mask.partial_bits),
    )
    for count, index, entry in lists:
        slot = torch.arange(index.shape[-1], device=mask.device)
        place = torch.where(slot < count[..., None], index, mask.kv_blocks)  # the last is cut off
        entries.scatter_(-1, place.long(), entry)
    return entries[..., :-1].contiguous()


def _ordered(listed: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [..., nq] and indices [..., nq, nk] of bool [..., nq, nk], listed ones first."""
    indices = listed.int().argsort(dim=-1, descending=True, stable=True)
    return listed.sum(-1).int(), indices.int()


def _mask_mod(mask: BlockMask, entries: Tensor):  # type: ignore[no-untyped-def]
    """What FlexAttention asks about single pairs: the bit of the pair in the table."""
    block_q, block_kv = mask.block_q, mask.block_kv
    batched, by_head = entries.shape[0] > 1, entries.shape[1] > 1
    table = mask.table
    if table is None:
        table = torch.zeros(1, block_q, 1, dtype=torch.int32, device=mask.device)
    bits = table

    def listed(b, h, q, kv):  # type: ignore[no-untyped-def]
        entry = entries[b if batched else 0, h if by_head else 0, q // block_q, kv // block_kv]
        column = kv % block_kv
        word = bits[entry.clamp(min=0), q % block_q, column // WORD]
        return (entry == _FULL) | ((entry >= 0) & ((word >> (column % WORD)) & 1 == 1))

    if mask.lengths is None:
        return listed
    lengths, many = mask.lengths, mask.lengths.shape[0] > 1

    def valid(b, h, q, kv):  # type: ignore[no-untyped-def]
        counts = kv % block_kv < lengths[b if many else 0, kv // block_kv]
        return listed(b, h, q, kv) & counts

    return valid
