"""Block lists of patterns in which a query sees an interval of each row of tokens it looks at.

The rows are the lines of a grid or the frames of a video, one after the other; tokens before and
after them are global: they see everything and are seen by everything. Work and memory grow with
the rows that the queries look at, never with the square of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vistoken.kernels.block_mask import BlockMask, check_blocks
from vistoken.kernels.windows import Axis


@dataclass(frozen=True)
class Rows:
    """Tokens in order: `prefix` global ones, `rows` rows of `width`, `suffix` global ones."""

    rows: int
    width: int
    prefix: int = 0
    suffix: int = 0

    @property
    def inner(self) -> int:
        """Tokens in rows."""
        return self.rows * self.width

    @property
    def tokens(self) -> int:
        return self.prefix + self.inner + self.suffix

    def density(self, pairs: int) -> float:
        """Share of all pairs that are visible, of which `pairs` lie between tokens in rows."""
        return (pairs + self.tokens**2 - self.inner**2) / self.tokens**2

    def visible(self, inner: Tensor) -> Tensor:
        """Return bool [tokens, tokens] from that of the tokens in rows."""
        whole = inner.new_ones(self.tokens, self.tokens)
        stop = self.prefix + self.inner
        whole[self.prefix : stop, self.prefix : stop] = inner
        return whole


class Reach(NamedTuple):
    """What pieces of rows see, all int64 [m]: piece `piece` looks at key row `row`.

    Each key of lo <= y < hi may be seen by a query of the piece, and no other key of the row is;
    each key of all_lo <= y < all_hi is seen by all its queries. The intervals may be empty.
    """

    piece: Tensor
    row: Tensor
    lo: Tensor
    hi: Tensor
    all_lo: Tensor
    all_hi: Tensor


# reach(row, first, last): of pieces of rows, queries first..last of each; all int64 [n]
FindReach = Callable[[Tensor, Tensor, Tensor], Reach]
# sees(q, kv): whether queries see keys, both numbered among the tokens in rows
Sees = Callable[[Tensor, Tensor], Tensor]


def row_block_mask(
    rows: Rows, block: int | tuple[int, int], reach: FindReach, sees: Sees, device: torch.device
) -> BlockMask:
    """Return the block lists of a pattern: `reach` finds blocks, `sees` their pairs of tokens."""
    block_q, block_kv = (block, block) if isinstance(block, int) else block
    nq, nk = check_blocks(rows.tokens, rows.tokens, block_q, block_kv)
    cut = _cut_rows(rows, block_q, device)
    found = reach(cut.row, cut.first, cut.last)
    inner_kv, global_kv = _count_tokens(rows, block_kv, nk, device)
    pair, full = _pair_blocks(rows, cut, found, inner_kv, block_kv, nq, nk)
    # blocks that hold a global token see, or are seen by, all others
    inner_q, global_q = _count_tokens(rows, block_q, nq, device)
    on = torch.zeros(nq * nk, dtype=torch.int8, device=device)  # 1: in part, 2: in full
    on[pair] = 1 + full.to(torch.int8)
    on = on.view(nq, nk)
    touched = (global_q > 0)[:, None] | (global_kv > 0)
    on[touched & (on == 0)] = 1
    on[(inner_q == 0)[:, None] | (inner_kv == 0)] = 2
    listed = on.nonzero()
    pairs = torch.nn.functional.pad(listed, (2, 0))  # one list for every batch entry and head
    is_full = on[listed[:, 0], listed[:, 1]] == 2

    def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        a, c = q - rows.prefix, kv - rows.prefix
        both = (a >= 0) & (a < rows.inner) & (c >= 0) & (c < rows.inner)
        return ~both | sees(a.clamp(0, rows.inner - 1), c.clamp(0, rows.inner - 1))

    return BlockMask.from_pairs(
        pairs, rows.tokens, rows.tokens, (block_q, block_kv), mask=mask, full=is_full
    )


class _Cut(NamedTuple):
    """Pieces of rows that lie in one block: block, row, first and last token in the row."""

    block: Tensor
    row: Tensor
    first: Tensor
    last: Tensor


def _cut_rows(rows: Rows, block: int, device: torch.device) -> _Cut:
    stop = rows.prefix + rows.inner
    ends = torch.arange(rows.prefix, stop + 1, rows.width, device=device)
    blocks = torch.arange(min(-(-rows.prefix // block) * block, stop), stop, block, device=device)
    edges = torch.cat([ends, blocks]).unique()
    start, size = edges[:-1], edges.diff()
    first = (start - rows.prefix) % rows.width
    return _Cut(start // block, (start - rows.prefix) // rows.width, first, first + size - 1)


def _count_tokens(
    rows: Rows, block: int, blocks: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """How many tokens in rows, and how many global ones, each block holds."""
    start = torch.arange(blocks, device=device) * block
    stop = (start + block).clamp(max=rows.tokens)
    inner = stop.clamp(max=rows.prefix + rows.inner) - start.clamp(min=rows.prefix)
    inner = inner.clamp(min=0)
    return inner, stop - start - inner


def _pair_blocks(
    rows: Rows, cut: _Cut, found: Reach, inner_kv: Tensor, block: int, nq: int, nk: int
) -> tuple[Tensor, Tensor]:
    """Pairs of blocks (query * nk + key) with a visible pair of tokens in rows; which are full."""
    lo, hi = found.lo.clamp(min=0), found.hi.clamp(max=rows.width)
    some = hi > lo
    piece, row, lo, hi = found.piece[some], found.row[some], lo[some], hi[some]
    base = rows.prefix + row * rows.width
    begin, end = (base + lo) // block, (base + hi - 1) // block
    which, place = spread(end - begin + 1)
    key = begin[which] + place
    # of each block, the keys that all queries of the piece see
    all_lo = found.all_lo[some].clamp(min=0)
    all_hi = torch.maximum(found.all_hi[some].clamp(max=rows.width), all_lo)
    start = torch.maximum((base + all_lo)[which], key * block)
    stop = torch.minimum((base + all_hi)[which], (key + 1) * block)
    pieces, entry = (piece[which] * nk + key).unique(return_inverse=True)
    seen = torch.zeros_like(pieces).scatter_add_(0, entry, (stop - start).clamp(min=0))
    by_all = seen == inner_kv[pieces % nk]
    pair, entry = (cut.block[pieces // nk] * nk + pieces % nk).unique(return_inverse=True)
    full_pieces = torch.zeros_like(pair).scatter_add_(0, entry, by_all.long())
    return pair, full_pieces == torch.bincount(cut.block, minlength=nq)[pair // nk]


def spread(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return entry i `counts[i]` times, and with it the numbers from 0 to counts[i] - 1."""
    which = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    start = counts.cumsum(0) - counts
    return which, torch.arange(len(which), device=counts.device) - start[which]


@dataclass(frozen=True)
class AxisTable:
    """Of each coordinate x of an axis, the keys it sees: x % d + d * j for lo[x] <= j < hi[x]."""

    length: int
    dilation: int
    lo: Tensor
    hi: Tensor

    @classmethod
    def of(cls, length: int, kernel: int, stride: int, dilation: int, causal: bool) -> AxisTable:
        bounds = torch.empty(2, length, dtype=torch.int64)
        for group in range(dilation):
            axis = Axis(-(-(length - group) // dilation), kernel, stride, causal)
            bounds[:, group::dilation] = axis.bounds()
        return cls(length, dilation, bounds[0], bounds[1])

    def to(self, device: torch.device | str | None) -> AxisTable:
        return AxisTable(self.length, self.dilation, self.lo.to(device), self.hi.to(device))

    def key(self, x: Tensor, place: Tensor) -> Tensor:
        """The key at a place of the window of x."""
        return x % self.dilation + self.dilation * (self.lo[x] + place)

    def sees(self, x: Tensor, y: Tensor) -> Tensor:
        j = y // self.dilation
        seen = (j >= self.lo[x]) & (j < self.hi[x])
        return seen if self.dilation == 1 else seen & (x % self.dilation == y % self.dilation)

    def reach(self, piece: Tensor, row: Tensor, first: Tensor, last: Tensor) -> Reach:
        """What pieces of rows along this axis see of key rows."""
        if self.dilation == 1:
            return Reach(piece, row, self.lo[first], self.hi[last], self.lo[last], self.hi[first])
        x = torch.arange(self.length, device=self.lo.device)
        least = self.key(x, torch.zeros_like(x)).flip(0).cummin(0).values.flip(0)
        most = (self.key(x, self.hi - self.lo - 1) + 1).cummax(0).values
        nothing = torch.zeros_like(first)  # neighbors see different keys
        return Reach(piece, row, least[first], most[last], nothing, nothing)
