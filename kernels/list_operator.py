"""Attention along block lists on Triton as one operator that autograd and `torch.compile` know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vistoken.kernels.block_mask import BlockMask, KeyLists

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor[] lists, int block_q, int block_kv, float scale"
_OF_QUERIES = 7  # tensors of a mask; those seen from the keys come after them


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as `list_reference.forward` does, on Triton."""
    with_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    lists = _flatten(mask, with_gradient)
    return _attend(q, k, v, lists, mask.block_q, mask.block_kv, scale)


# --- an operator takes no None in a list of tensors: what is not there has no entries -------------


def _flatten(mask: BlockMask, with_key_lists: bool) -> list[Tensor]:
    """The tensors of a mask, and its lists as its keys see them if a gradient will need these."""
    none = mask.full_count.new_empty(0)
    lists = [
        mask.full_count, mask.full_index, mask.partial_count, mask.partial_index,
        mask.partial_bits, none if mask.table is None else mask.table,
        none if mask.lengths is None else mask.lengths,
    ]  # fmt: skip
    if with_key_lists:
        keys = mask.transposed()
        lists += [
            keys.full_start, keys.full_index,
            keys.partial_start, keys.partial_index, keys.partial_bits,
        ]  # fmt: skip
    return lists


def _restore(
    q: Tensor, k: Tensor, lists: Sequence[Tensor], block_q: int, block_kv: int
) -> BlockMask:
    """The mask that `_flatten` took apart."""
    full_count, full_index, partial_count, partial_index, bits, table, lengths = lists[:_OF_QUERIES]
    of_keys = lists[_OF_QUERIES:]
    return BlockMask(
        q.shape[1], k.shape[1], block_q, block_kv,
        full_count, full_index, partial_count, partial_index, bits,
        table if table.dim() == 3 else None, lengths if lengths.dim() == 2 else None,
        made_key_lists=[KeyLists(*of_keys)] if of_keys else [],
    )  # fmt: skip


@torch.library.custom_op(
    "vistoken::block_sparse_attention",
    mutates_args=(),
    schema=f"({_INPUTS}) -> (Tensor, Tensor)",
)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Sequence[Tensor],
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from vistoken.kernels import list_triton

    with torch.cuda.device_of(q):
        return list_triton.forward(q, k, v, _restore(q, k, lists, block_q, block_kv), scale)


@_attend.register_fake
def _(q, k, v, lists, block_q, block_kv, scale):  # type: ignore[no-untyped-def]
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op(
    "vistoken::block_sparse_attention_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor? d_lse, {_INPUTS}, Tensor out, Tensor lse) "
    "-> (Tensor, Tensor, Tensor)",
)
def _attend_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Sequence[Tensor],
    block_q: int,
    block_kv: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    from vistoken.kernels import list_triton_backward

    mask = _restore(q, k, lists, block_q, block_kv)
    with torch.cuda.device_of(q):
        return list_triton_backward.backward(d_out, d_lse, q, k, v, mask, scale, out, lse)


@_attend_backward.register_fake
def _(d_out, d_lse, q, k, v, lists, block_q, block_kv, scale, out, lse):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lists, ctx.block_q, ctx.block_kv, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *lists)


def _differentiate(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *lists = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    grads = _attend_backward(
        d_out, d_lse, q, k, v, lists, ctx.block_q, ctx.block_kv, ctx.scale, out, lse
    )
    return *grads, [None] * len(lists), None, None, None


_attend.register_autograd(_differentiate, setup_context=_save)
