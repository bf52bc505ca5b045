"""Attention along block lists in plain torch: exact, on every device, for every dtype.

Blocks of queries with equally long lists are one batch. Keys and values are laid out by block once,
and the listed ones are copied for each batch, so that memory is that of a few lists; backward
computes the logits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vistoken.kernels.block_mask import BlockMask
from vistoken.kernels.element_mask import unpack_bits
from vistoken.kernels.tile_softmax import (
    Scratch,
    TileMask,
    attend,
    attend_backward,
    tile_mask,
    without_autocast,
)

_LEAST_ROWS = 64  # of a tile: fewer make slow products
_CPU_LOGITS = 1 << 17  # of a batch, for each core: what its cache holds
_DEVICE_LOGITS = 1 << 25


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> str | None:
    """Return None: plain torch runs on every device and in every floating dtype."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as `list_reference.forward` does.

    Computed in fp32, or in fp64 for fp64 inputs, whose lse is fp64 too. Differentiable once; two
    backward passes give the same bits.
    """
    out, lse = _Attention.apply(q, k, v, mask, scale)
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        q, k, v, mask, scale = inputs
        with without_autocast(q.device):
            out, lse = compute(q, k, v, mask, scale)
        ctx.mask, ctx.scale = mask, scale
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        with without_autocast(q.device):
            grads = backward(d_out, d_lse, q, k, v, ctx.mask, ctx.scale, out, lse)
        return *grads, None, None


def compute(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Do what `forward` does, without a record for autograd."""
    blocks = _Blocks(q, k, v, mask)
    queries = blocks.queries(q).mul_(scale)
    keys, values = blocks.keys(k), blocks.keys(v)
    out = values.new_zeros(*queries.shape[:2], v.shape[-1])
    lse = values.new_full((*queries.shape[:2], 1), -torch.inf)
    for batch in blocks.batches():
        tile_keys, tile_values = batch.gather(keys), batch.gather(values)
        for rows in batch.tiles:
            seen, blind = batch.mask_of(rows, blocks.dtype)
            found, tile_lse = attend(
                queries[batch.units, rows],
                [tile_keys],
                [tile_values],
                seen,
                blocks.scratch,
            )
            if blind is not None:
                found.masked_fill_(blind, 0)
                tile_lse.masked_fill_(blind, -torch.inf)
            out[batch.units, rows] = found
            lse[batch.units, rows] = tile_lse
    return blocks.tokens(out, q).to(q.dtype), blocks.tokens(lse, q)[..., 0]


def backward(
    d_out: Tensor | None,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) from what `compute` returned; a gradient that is None is 0."""
    blocks = _Blocks(q, k, v, mask)
    queries = blocks.queries(q).mul_(scale)
    keys, values = blocks.keys(k), blocks.keys(v)
    outs, lses = blocks.queries(out), blocks.queries(lse[..., None])
    d_outs = torch.zeros_like(outs) if d_out is None else blocks.queries(d_out)
    deltas = (d_outs * outs).sum(-1, keepdim=True)
    if d_lse is not None:
        deltas -= blocks.queries(d_lse[..., None])
    blind = lses == -torch.inf  # of such rows all weights are to be 0, whatever their gradients
    lses, deltas = lses.masked_fill(blind, torch.inf), deltas.masked_fill(blind, 0)
    dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for batch in blocks.batches():
        tile_keys, tile_values = batch.gather(keys), batch.gather(values)
        d_keys, d_values = torch.zeros_like(tile_keys), torch.zeros_like(tile_values)
        for rows in batch.tiles:
            tile_q, tile_d = queries[batch.units, rows], d_outs[batch.units, rows]
            d_tile, weights, d_logits = attend_backward(
                tile_q,
                [tile_keys],
                [tile_values],
                batch.mask_of(rows, blocks.dtype)[0],
                lses[batch.units, rows],
                tile_d,
                deltas[batch.units, rows],
                blocks.scratch,
            )
            dq[batch.units, rows] = d_tile
            d_keys.baddbmm_(d_logits.mT, tile_q)
            d_values.baddbmm_(weights.mT, tile_d)
        batch.scatter_add(dk, d_keys)
        batch.scatter_add(dv, d_values)
    found = blocks.tokens(dq.mul_(scale), q), blocks.key_tokens(dk, k), blocks.key_tokens(dv, v)
    return tuple(x.to(q.dtype) for x in found)  # type: ignore[return-value]


# --- blocks of queries and of keys ---------------------------------------------------------------


class _Batch(NamedTuple):
    """Blocks of queries that are computed at once, all of them with lists of one length.

    units [n]: which ones; listed [n, L]: their key blocks among those of all batch entries and
    heads; tiles: the rows of a block that are computed at once. seen [n, M, columns]: what they see
    of their first keys, None: all of them, as of all keys behind. covers: these are all keys.
    """

    units: Tensor
    listed: Tensor
    tiles: list[slice]
    seen: Tensor | None
    covers: bool

    def gather(self, blocks: Tensor) -> Tensor:
        """The listed ones of the key blocks [blocks, keys, C], as [n, L * keys, C]."""
        return blocks[self.listed.flatten()].view(len(self.units), -1, blocks.shape[-1])

    def scatter_add(self, blocks: Tensor, found: Tensor) -> None:
        """Add found [n, L * keys, C] to the listed ones of the key blocks [blocks, keys, C]."""
        parts = found.view(-1, *blocks.shape[1:])
        if blocks.device.type == "cpu":
            blocks.index_add_(0, self.listed.flatten(), parts)
        else:  # in one order, unlike index_add_
            blocks.index_put_((self.listed.flatten(),), parts, accumulate=True)

    def mask_of(self, rows: slice, dtype: torch.dtype) -> tuple[TileMask | None, Tensor | None]:
        """The mask of some rows, and which of them see no key [n, rows, 1], if some might.

        Queries that see no key get logits of 0, so that nothing is divided by 0.
        """
        if self.seen is None:
            return None, None
        seen = self.seen[:, rows]
        mask = tile_mask(seen, dtype)
        if not self.covers:
            return mask, None
        blind = ~seen.any(-1, keepdim=True)
        return TileMask(mask.keep, mask.bias.masked_fill_(blind, 0)), blind


class _Blocks:
    """The blocks of a call: a unit is a block of the queries of one batch entry and list.

    Query heads that share a kv head and a list are rows of one unit.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> None:
        self.mask = mask.to(q.device)
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.scratch = Scratch(q, self.dtype)
        self.batch, self.kv_heads, self.group = q.shape[0], k.shape[2], q.shape[2] // k.shape[2]
        self.fold = self.group if mask.full_count.shape[1] == 1 else 1
        self.heads = q.shape[2] // self.fold
        cores = torch.get_num_threads()
        self._logits = cores * _CPU_LOGITS if q.device.type == "cpu" else _DEVICE_LOGITS
        self._valid = self._valid_keys()

    def _valid_keys(self) -> Tensor:
        """Bool [b, nk, block_kv]: the keys that count."""
        mask = self.mask
        column = torch.arange(mask.block_kv, device=mask.device)
        token = torch.arange(mask.kv_blocks, device=mask.device)[:, None] * mask.block_kv + column
        valid = (token < mask.kv_tokens)[None]
        return valid if mask.lengths is None else valid & (column < mask.lengths[..., None])

    def queries(self, x: Tensor) -> Tensor:
        """[B, S, Hq, C] as a copy [units, block_q * fold, C]."""
        extra = self.mask.q_blocks * self.mask.block_q - x.shape[1]
        padded = pad(x.to(self.dtype), (0, 0, 0, 0, 0, extra))
        tiles = padded.unflatten(1, (-1, self.mask.block_q)).unflatten(3, (self.heads, self.fold))
        tiles = tiles.permute(0, 3, 1, 2, 4, 5).clone(memory_format=torch.contiguous_format)
        rows = self.mask.block_q * self.fold
        return tiles.view(self.batch * self.heads * self.mask.q_blocks, rows, x.shape[-1])

    def tokens(self, x: Tensor, like: Tensor) -> Tensor:
        """Undo `queries`: [units, block_q * fold, C] to [B, S, Hq, C]."""
        mask = self.mask
        shape = (self.batch, self.heads, mask.q_blocks, mask.block_q, self.fold, x.shape[-1])
        tiles = x.view(shape).permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)
        return tiles[:, : like.shape[1]].contiguous()

    def keys(self, x: Tensor) -> Tensor:
        """[B, N, Hkv, C] as [B * Hkv * nk, block_kv, C], with 0 where no key counts."""
        extra = self.mask.kv_blocks * self.mask.block_kv - x.shape[1]
        padded = pad(x.to(self.dtype), (0, 0, 0, 0, 0, extra))
        tiles = padded.unflatten(1, (-1, self.mask.block_kv)).permute(0, 3, 1, 2, 4)
        if self.mask.lengths is not None:
            tiles = tiles.masked_fill(~self._valid[:, None, :, :, None], 0)
        return tiles.flatten(0, 2).contiguous()

    def key_tokens(self, x: Tensor, like: Tensor) -> Tensor:
        """Undo `keys`: [B * Hkv * nk, block_kv, C] to [B, N, Hkv, C]."""
        tiles = x.view(
            self.batch, self.kv_heads, self.mask.kv_blocks, self.mask.block_kv, x.shape[-1]
        )
        return tiles.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : like.shape[1]].contiguous()

    def batches(self) -> Iterator[_Batch]:
        """Yield all units that have a key block listed, in batches of equally long lists."""
        mask = self.mask
        shape = (self.batch, self.heads, mask.q_blocks)
        partial, full = (
            count.expand(shape).flatten().long().cpu()
            for count in (mask.partial_count, mask.full_count)
        )
        lengths = partial * (mask.kv_blocks + 1) + full
        order = lengths.argsort(stable=True)
        kinds, counts = lengths[order].unique_consecutive(return_counts=True)
        for kind, units in zip(kinds.tolist(), order.split(counts.tolist()), strict=True):
            parts, wholes = divmod(kind, mask.kv_blocks + 1)
            columns = (parts + wholes) * mask.block_kv
            if not columns:
                continue
            rows = mask.block_q * self.fold
            together = max(self._logits // (rows * columns), 1)
            height = min(max(self._logits // (together * columns), _LEAST_ROWS), rows)
            tiles = [slice(i, i + height) for i in range(0, rows, height)]
            for some in units.to(mask.device).split(together):
                yield self._batch(some, parts, wholes, tiles)

    def _batch(self, units: Tensor, parts: int, wholes: int, tiles: list[slice]) -> _Batch:
        mask, shape = self.mask, self.mask.full_count.shape
        place = units % mask.q_blocks
        head = units // mask.q_blocks % self.heads
        entry = units // (mask.q_blocks * self.heads)
        at = entry if shape[0] > 1 else 0, head if shape[1] > 1 else 0, place
        partial = mask.partial_index[at][:, :parts]
        listed = torch.cat([partial, mask.full_index[at][:, :wholes]], 1).long()
        covers = mask.lengths is not None or self._has_short_block(listed)
        seen = None
        if parts and mask.table is not None:
            bits = mask.table[mask.partial_bits[at][:, :parts].long()]  # [n, P, block_q, words]
            seen = unpack_bits(bits, mask.block_kv).transpose(1, 2).flatten(2)
        if covers:
            valid = self._valid[entry[:, None] if len(self._valid) > 1 else 0, listed]
            valid = valid.flatten(1)[:, None].expand(-1, mask.block_q, -1)
            if seen is not None:
                behind = seen.new_ones(len(units), mask.block_q, wholes * mask.block_kv)
                seen = torch.cat([seen, behind], -1)
            seen = valid if seen is None else seen & valid
        if seen is not None and self.fold > 1:
            seen = seen.repeat_interleave(self.fold, 1)
        kv_head = head if self.fold == self.group else head // self.group
        first = (entry * self.kv_heads + kv_head) * mask.kv_blocks
        return _Batch(units, first[:, None] + listed, tiles, seen, covers or not wholes)

    def _has_short_block(self, listed: Tensor) -> bool:
        mask = self.mask
        short = mask.kv_tokens % mask.block_kv != 0
        return short and bool((listed == mask.kv_blocks - 1).any())
