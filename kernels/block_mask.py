"""Which blocks of queries see which blocks of keys, as lists that sparse attention walks along."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vistoken.errors import MethodError
from vistoken.kernels.element_mask import WORD, ElementMask, Tokens, examine, reads, unpack_bits


@dataclass(frozen=True, eq=False)
class KeyLists:
    """The lists of a `BlockMask` seen from its key blocks: which query blocks see each of them.

    Key block j is seen by the query blocks index[b, h, start[b, h, j] : start[b, h, j + 1]], in
    rising order. full_start, partial_start [b, h, nk + 1]; full_index [b, h, nq * F];
    partial_index, partial_bits [b, h, nq * P]; all int32.
    """

    full_start: Tensor
    full_index: Tensor
    partial_start: Tensor
    partial_index: Tensor
    partial_bits: Tensor


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Block lists: of every query block, the key blocks seen as a whole and those seen in part.

    Query block i holds the queries i * block_q and following, key block j the keys j * block_kv and
    following; the last ones may be short. b is 1 or the batch, h is 1 or the query heads; n blocks.

    full_count [b, h, nq], full_index [b, h, nq, F]: the first `count` entries are key blocks of
    which every valid key is seen by every query of the block, in rising order.
    partial_count [b, h, nq], partial_index, partial_bits [b, h, nq, P]: key blocks of which the
    pairs in table[partial_bits] are seen. No key block is in both lists. All int32.
    table [M, block_q, ceil(block_kv / 32)] int32: key c of the block is bit c % 32 of word c // 32.
    lengths [b, nk] int32: the first so many keys of each key block are valid; None: all of them.
    """

    q_tokens: int
    kv_tokens: int
    block_q: int
    block_kv: int
    full_count: Tensor
    full_index: Tensor
    partial_count: Tensor
    partial_index: Tensor
    partial_bits: Tensor
    table: Tensor | None = None
    lengths: Tensor | None = None
    made_key_lists: list[KeyLists] = field(default_factory=list, repr=False)  # none or one

    def __post_init__(self) -> None:
        nq, nk = check_blocks(self.q_tokens, self.kv_tokens, self.block_q, self.block_kv)
        b, h, rows = self.full_count.shape
        words = -(-self.block_kv // WORD)
        shapes = {
            "full_count": (b, h, nq),
            "full_index": (b, h, nq, self.full_index.shape[-1]),
            "partial_count": (b, h, nq),
            "partial_index": (b, h, nq, self.partial_index.shape[-1]),
            "partial_bits": tuple(self.partial_index.shape),
        }
        if self.table is not None:
            shapes["table"] = (self.table.shape[0], self.block_q, words)
        if self.lengths is not None:
            shapes["lengths"] = (self.lengths.shape[0], nk)
        for name, shape in shapes.items():
            given = getattr(self, name)
            if tuple(given.shape) != shape or given.dtype != torch.int32:
                raise MethodError(
                    f"{name} of a block mask of {nq} x {nk} blocks must be int32 {shape}, got "
                    f"{given.dtype} {tuple(given.shape)}."
                )
            if given.device != self.device:
                raise MethodError(
                    f"The tensors of a block mask lie on one device, got full_count on "
                    f"{self.device} and {name} on {given.device}."
                )
        if self.table is None and self.partial_index.shape[-1]:
            raise MethodError("A block mask with partial blocks needs the table of their bits.")

    @property
    def q_blocks(self) -> int:
        return -(-self.q_tokens // self.block_q)

    @property
    def kv_blocks(self) -> int:
        return -(-self.kv_tokens // self.block_kv)

    @property
    def device(self) -> torch.device:
        return self.full_count.device

    @property
    def density(self) -> float:
        """Share of the pairs of blocks that are listed, in full or in part."""
        pairs = self.full_count.numel() * self.kv_blocks
        return int(self.full_count.sum() + self.partial_count.sum()) / max(pairs, 1)

    @property
    def full_share(self) -> float:
        """Share of the listed blocks that need no element mask."""
        full, partial = int(self.full_count.sum()), int(self.partial_count.sum())
        return full / max(full + partial, 1)

    def to(self, device: torch.device | str) -> BlockMask:
        """Return the same lists on another device."""
        names = (
            "full_count", "full_index", "partial_count", "partial_index", "partial_bits",
            "table", "lengths",
        )  # fmt: skip
        tensors = {name: getattr(self, name) for name in names}
        moved: dict[str, Any] = {n: t if t is None else t.to(device) for n, t in tensors.items()}
        return replace(self, made_key_lists=[], **moved)

    def transposed(self) -> KeyLists:
        """Return the lists seen from the key blocks, made once; takes no square of any kind."""
        if self.made_key_lists:
            return self.made_key_lists[0]
        nk = self.kv_blocks
        full_start, full_index, _ = _transpose(self.full_count, self.full_index, nk, None)
        lists = KeyLists(
            full_start,
            full_index,
            *_transpose(self.partial_count, self.partial_index, nk, self.partial_bits),
        )
        if not torch.compiler.is_compiling():
            self.made_key_lists.append(lists)
        return lists

    def visible(self) -> Tensor:
        """Return bool [b, h, q_tokens, kv_tokens]: for small ones."""
        b, h, nq = self.full_count.shape
        full = _dense(self.full_count, self.full_index, None, self.kv_blocks) >= 0
        seen = full[..., None, :, None].expand(-1, -1, -1, self.block_q, -1, self.block_kv)
        if self.table is not None:
            bits = _dense(self.partial_count, self.partial_index, self.partial_bits, self.kv_blocks)
            parts = unpack_bits(self.table, self.block_kv)[bits.clamp(min=0).long()]
            parts = parts & (bits >= 0)[..., None, None]
            seen = seen | parts.transpose(3, 4)
        seen = seen.reshape(b, h, nq * self.block_q, self.kv_blocks * self.block_kv)
        if self.lengths is not None:
            valid = torch.arange(self.block_kv, device=self.device) < self.lengths[..., None]
            seen = seen & valid.reshape(-1, 1, 1, seen.shape[-1])
        return seen[:, :, : self.q_tokens, : self.kv_tokens]

    @classmethod
    def from_map(
        cls,
        block_map: Tensor,
        q_tokens: int,
        kv_tokens: int,
        block: int | tuple[int, int] | None = None,
        *,
        mask: ElementMask | None = None,
        lengths: Tensor | None = None,
        batch: int = 1,
        heads: int = 1,
        trim: bool = True,
    ) -> BlockMask:
        """Return the lists of a bool map [nq, nk], [h, nq, nk] or [b, h, nq, nk] of blocks.

        block: tokens of a block, or (of queries, of keys), powers of two from 16 up; by default
        what fits the map. Of the blocks that are on, `mask` says which pairs of tokens are seen.
        It is asked about those blocks only, with indices b, h, q, kv that broadcast, for each of
        `batch` and `heads` if its answer reads them. lengths [b, nk]: valid keys of each key block.
        trim: cut the lists at the longest, which reads one number back from the device.
        """
        if block_map.dtype != torch.bool or block_map.dim() not in (2, 3, 4):
            raise MethodError(
                "A block map is bool [nq, nk], [h, nq, nk] or [b, h, nq, nk], got "
                f"{block_map.dtype} {tuple(block_map.shape)}."
            )
        on = block_map.reshape((1,) * (4 - block_map.dim()) + tuple(block_map.shape))
        nq, nk = on.shape[-2:]
        if block is None:
            block = infer_block(q_tokens, nq, "query"), infer_block(kv_tokens, nk, "key")
        block_q, block_kv = (block, block) if isinstance(block, int) else block
        expected = check_blocks(q_tokens, kv_tokens, block_q, block_kv)
        if (nq, nk) != expected:
            raise MethodError(
                f"{q_tokens} x {kv_tokens} tokens in blocks of {block_q} x {block_kv} are "
                f"{expected[0]} x {expected[1]} blocks, got a map of {nq} x {nk}."
            )
        if mask is not None:
            if reads(mask, 0, on.device):
                on = on.expand(max(batch, on.shape[0]), -1, -1, -1)
            if reads(mask, 1, on.device):
                on = on.expand(-1, max(heads, on.shape[1]), -1, -1)
            return cls.from_pairs(
                on.nonzero(), q_tokens, kv_tokens, (block_q, block_kv), mask=mask, lengths=lengths,
                batch=on.shape[0], heads=on.shape[1],
            )  # fmt: skip
        count, index = _lists_of(on, trim)
        none = index[..., :0]
        return cls(
            q_tokens, kv_tokens, block_q, block_kv, count, index,
            torch.zeros_like(count), none, none, None, _lengths(lengths),
        )  # fmt: skip

    @classmethod
    def from_pairs(
        cls,
        pairs: Tensor,
        q_tokens: int,
        kv_tokens: int,
        block: int | tuple[int, int],
        *,
        mask: ElementMask | None = None,
        full: Tensor | None = None,
        lengths: Tensor | None = None,
        batch: int = 1,
        heads: int = 1,
    ) -> BlockMask:
        """Return the lists of the pairs of blocks `pairs` [n, 4] int64 (b, h, query, key).

        The pairs are all different, in any order. full [n] bool: these need no question to `mask`.
        Others are asked about in chunks and found to be full, partial or empty.
        """
        block_q, block_kv = (block, block) if isinstance(block, int) else block
        nq, nk = check_blocks(q_tokens, kv_tokens, block_q, block_kv)
        rows = (pairs[:, 0] * heads + pairs[:, 1]) * nq + pairs[:, 2]
        order = (rows * nk + pairs[:, 3]).argsort()
        pairs, rows = pairs[order], rows[order]
        bits = torch.full_like(rows, -1)  # -1: full, -2: empty, else the entry of the table
        table = None
        if mask is not None:
            asked = torch.ones_like(rows, dtype=torch.bool) if full is None else ~full[order]
            shape = Tokens(q_tokens, kv_tokens, block_q, block_kv, lengths)
            bits[asked], table = examine(pairs[asked], mask, shape)
        size = (batch, heads, nq)
        whole, part = bits == -1, bits >= 0
        full_count, full_index, _ = _ragged(rows[whole], pairs[whole, 3], None, size)
        lists = _ragged(rows[part], pairs[part, 3], bits[part], size)
        return cls(
            q_tokens, kv_tokens, block_q, block_kv, full_count, full_index, *lists,
            table, _lengths(lengths),
        )  # fmt: skip


# --- sizes ---------------------------------------------------------------------------------------


def check_blocks(q_tokens: int, kv_tokens: int, block_q: int, block_kv: int) -> tuple[int, int]:
    """Return how many blocks of queries and of keys there are."""
    for name, size in (("block_q", block_q), ("block_kv", block_kv)):
        if size < 16 or size & (size - 1):
            raise MethodError(f"{name} must be a power of two of at least 16 tokens, got {size}.")
    return -(-q_tokens // block_q), -(-kv_tokens // block_kv)


def infer_block(tokens: int, blocks: int, what: str) -> int:
    """Return the power of two of which `tokens` tokens make so many blocks."""
    size = 16
    while -(-tokens // size) > max(blocks, 1):
        size *= 2
    if -(-tokens // size) != blocks:
        raise MethodError(
            f"The block map has {blocks} {what} blocks, but {tokens} tokens make so many at no "
            "power of two of at least 16 tokens a block."
        )
    return size


def _lengths(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.reshape(-1, lengths.shape[-1]).int()


# --- lists ---------------------------------------------------------------------------------------


def _lists_of(on: Tensor, trim: bool) -> tuple[Tensor, Tensor]:
    """Counts [..., nq] and indices [..., nq, at most nk] of a bool map [..., nq, nk]."""
    blocks = on.shape[-1]
    count = on.sum(-1, dtype=torch.int32)
    place = torch.where(on, on.cumsum(-1) - 1, blocks)  # what is off goes to a slot that is cut
    numbers = torch.arange(blocks, dtype=torch.int32, device=on.device).expand(on.shape)
    index = torch.zeros(*on.shape[:-1], blocks + 1, dtype=torch.int32, device=on.device)
    index = index.scatter(-1, place, numbers)
    width = int(count.max()) if trim and count.numel() else blocks
    return count, index[..., :width].contiguous()


def _ragged(
    rows: Tensor, columns: Tensor, bits: Tensor | None, size: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [size], indices and bits [*size, longest] of entries sorted by row, then column."""
    total = size[0] * size[1] * size[2]
    count = torch.bincount(rows, minlength=total)
    place = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
    width = int(count.max()) if total else 0
    both = torch.zeros(2, total, width, dtype=torch.int32, device=rows.device)
    both[0, rows, place] = columns.int()
    if bits is not None:
        both[1, rows, place] = bits.int()
    index, entry = both.reshape(2, *size, width)
    return count.int().reshape(size), index, entry


def _transpose(
    count: Tensor, index: Tensor, kv_blocks: int, bits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lists [b, h, nq, F] to starts [b, h, nk + 1] and flat lists [b, h, nq * F] by key block."""
    b, h, nq, width = index.shape
    slot = torch.arange(width, device=index.device)
    listed = slot < count[..., None]
    key = torch.where(listed, index, kv_blocks).reshape(b, h, nq * width)
    key, order = key.sort(dim=-1, stable=True)
    blocks = torch.arange(kv_blocks + 1, dtype=key.dtype, device=key.device)
    start = torch.searchsorted(key, blocks.expand(b, h, -1).contiguous(), out_int32=True)
    query = (order // max(width, 1)).int()
    entry = query if bits is None else bits.reshape(b, h, -1).gather(-1, order)
    return start, query, entry


def _dense(count: Tensor, index: Tensor, bits: Tensor | None, kv_blocks: int) -> Tensor:
    """Entry of each pair of blocks [b, h, nq, nk]: its bits, 0 without bits, -1 if not listed."""
    listed = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    place = torch.where(listed, index, kv_blocks).long()
    whole = torch.full((*count.shape, kv_blocks + 1), -1, dtype=torch.int32, device=index.device)
    source = torch.zeros_like(index) if bits is None else bits
    return whole.scatter(-1, place, source)[..., :kv_blocks]
