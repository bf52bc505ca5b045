"""What `bench_kernels` compares with: dense attention by cuDNN, FlexAttention, NATTEN.

FlexAttention computes the same windows from block lists, which are written down from the borders of
blocks rather than found by trying every pair. "raster" leaves tokens row by row; "tiled" sorts them
into boxes of 128 first and back afterwards, which is part of its time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from vistoken.errors import BackendUnavailable
from vistoken.eval.bench_kernels_cases import Case, Inputs, attend
from vistoken.kernels.tile_advice import rank_tiles

Run = Callable[[], Tensor]  # returns [batch, tokens, heads, dim]
BLOCK = 128


def dense(case: Case, given: Inputs) -> Run:
    """Attention of all to all by cuDNN; on the CPU by whatever torch has."""
    q, k, v = (x.transpose(1, 2) for x in (given.q, given.k, given.v))

    def run() -> Tensor:
        if not q.is_cuda:
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


def natten(case: Case, given: Inputs) -> Run:
    """The same neighborhood by NATTEN; raises `BackendUnavailable` where it cannot."""
    if case.radius or case.block:
        raise BackendUnavailable("NATTEN has neighborhoods only")
    return lambda: attend(case, given.q, given.k, given.v, backend="natten")[0]


def flex_raster(case: Case, given: Inputs) -> Run:
    """FlexAttention on tokens row by row."""
    return _flex(Order(case, (1,) * len(case.grid)), given)


def flex_tiled(case: Case, given: Inputs) -> Run:
    """FlexAttention on tokens sorted into boxes of 128, with the sorting."""
    if len(case.grid) == 1:
        raise BackendUnavailable("tokens of a line are sorted as they are")
    found = rank_tiles(case.where(), q_tokens=(BLOCK,), kv_tokens=(BLOCK,), top=10**6)
    tiles = [one.q_tile for one in found if one.q_tile == one.kv_tile]
    return _flex(Order(case, tiles[0][-len(case.grid) :]), given)


RIVALS: dict[str, Callable[[Case, Inputs], Run]] = {
    "dense": dense,
    "flex_raster": flex_raster,
    "flex_tiled": flex_tiled,
    "natten": natten,
}


def _flex(order: Order, given: Inputs) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    attention: Any = flex_attention
    if given.q.is_cuda:
        torch.compiler.reset()  # every case is a graph of its own
        attention = torch.compile(flex_attention, dynamic=False)
    mask = order.block_mask(given.q.device)

    def run() -> Tensor:
        q, k, v = (order.sort(x).transpose(1, 2) for x in (given.q, given.k, given.v))
        return order.restore(attention(q, k, v, block_mask=mask).transpose(1, 2))

    return run


@dataclass(frozen=True)
class Order:
    """An order of tokens: text first, then the grid's tile by tile, padded to whole tiles.

    With tiles of one token that is the order in which they are given.
    """

    case: Case
    tile: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Tiles along each axis."""
        return tuple(-(-n // t) for n, t in zip(self.case.grid, self.tile, strict=True))

    @property
    def tokens(self) -> int:
        """Tokens with padding and text."""
        return self.case.text + math.prod(self.counts) * math.prod(self.tile)

    @property
    def _trivial(self) -> bool:
        return math.prod(self.tile) == 1

    def sort(self, x: Tensor) -> Tensor:
        """[batch, tokens, heads, dim] as given to the same in this order, zeros where padded."""
        if self._trivial:
            return x
        rank, text = len(self.tile), self.case.text
        grid = x[:, text:].unflatten(1, self.case.grid)
        gaps = [n * t - g for n, t, g in zip(self.counts, self.tile, self.case.grid, strict=True)]
        if any(gaps):
            grid = pad(grid, [0, 0, 0, 0, *(n for gap in reversed(gaps) for n in (0, gap))])
        split = grid.reshape(len(x), *self._interleaved, *x.shape[2:])
        axes = [1 + 2 * i for i in range(rank)] + [2 + 2 * i for i in range(rank)]
        moved = split.permute(0, *axes, 2 * rank + 1, 2 * rank + 2)
        out = x.new_empty(len(x), self.tokens, *x.shape[2:])
        out[:, :text] = x[:, :text]
        out[:, text:].view(moved.shape).copy_(moved)
        return out

    def restore(self, x: Tensor) -> Tensor:
        """Undo `sort`."""
        if self._trivial:
            return x
        rank, text = len(self.tile), self.case.text
        split = x[:, text:].unflatten(1, (*self.counts, *self.tile))
        axes = [j for i in range(rank) for j in (1 + i, 1 + rank + i)]
        moved = split.permute(0, *axes, 2 * rank + 1, 2 * rank + 2)
        whole = moved.reshape(len(x), *self._padded, *x.shape[2:])
        cut = whole[(slice(None), *(slice(n) for n in self.case.grid))].flatten(1, rank)
        return torch.cat([x[:, :text], cut], 1) if text else cut

    @property
    def _interleaved(self) -> list[int]:
        return [n for pair in zip(self.counts, self.tile, strict=True) for n in pair]

    @property
    def _padded(self) -> tuple[int, ...]:
        return tuple(n * t for n, t in zip(self.counts, self.tile, strict=True))

    def block_mask(self, device: torch.device) -> Any:
        """Return FlexAttention's lists of blocks, from the boxes around blocks of tokens."""
        from torch.nn.attention.flex_attention import BlockMask

        touched, full = (x.to(device) for x in self._blocks)
        lists = [_list_blocks(one) for one in (touched & ~full, full)]
        return BlockMask.from_kv_blocks(
            *lists[0], *lists[1], BLOCK_SIZE=BLOCK, mask_mod=_mask_mod(self),
            seq_lengths=(self.tokens, self.tokens),
        )  # fmt: skip

    @cached_property
    def _blocks(self) -> tuple[Tensor, Tensor]:
        """bool [blocks, blocks]: which blocks of keys each block of queries touches, which fully.

        A block is taken for the whole box around its tokens: touched may be too many, full too few.
        """
        text = self.case.text
        blocks = torch.arange(-(-self.tokens // BLOCK) * BLOCK).view(-1, BLOCK)
        ragged = blocks[:, -1] >= self.tokens
        index = blocks.clamp(max=self.tokens - 1)
        some_text, all_text = (index < text).any(1), (index < text).all(1)
        places = _place(index.clamp(min=text) - text, self.counts, self.tile)
        touched = torch.ones(len(index), len(index), dtype=torch.bool)
        full, near, far = touched.clone(), torch.zeros(()), torch.zeros(())
        inside = ~ragged[None, :] & touched
        for axis, at in zip(self.case.axes(), places, strict=True):
            first, last = at.amin(1), at.amax(1)
            bounds = axis.bounds()
            q_first, q_last = (x.clamp(max=axis.length - 1)[:, None] for x in (first, last))
            inside &= last < axis.length
            touched &= (last >= bounds[0, q_first]) & (first < bounds[1, q_last])
            full &= (first >= bounds[0, q_last]) & (last < bounds[1, q_first])
            if axis.radius:
                gap = torch.maximum(q_first - last, first - q_last).clamp(min=0)
                near = near + gap.square()
                far = far + torch.maximum(q_last - first, last - q_first).square()
        if self.case.radius:
            touched &= near < self.case.radius**2
            full &= far < self.case.radius**2
        full &= inside & ~some_text[None, :] & ~some_text[:, None]
        touched |= some_text[None, :] | some_text[:, None]
        full |= all_text[None, :] & ~ragged[None, :]
        full |= all_text[:, None] & (inside | all_text[None, :]) & ~ragged[None, :]
        return touched, full


def _place(token: Any, counts: Sequence[int], tile: Sequence[int]) -> list[Any]:
    """Coordinates on the grid of tokens ordered tile by tile; elementwise on tensors."""
    inner: list[Any] = []
    outer: list[Any] = []
    for digits, sides in ((inner, tile), (outer, counts)):
        for side in reversed(sides):
            digits.append(token % side)
            token = token // side
    pairs = zip(outer[::-1], inner[::-1], tile, strict=True)
    return [n * side + m for n, m, side in pairs]


def _mask_mod(order: Order) -> Callable[..., Tensor]:
    """Whether token q sees token k, both in this order, from numbers and arithmetic alone."""
    text, radius, counts, tile = order.case.text, order.case.radius, order.counts, order.tile
    axes = [
        (axis.length, axis.kernel, axis.stride, n * t > axis.length, not axis.full)
        for axis, n, t in zip(order.case.axes(), counts, tile, strict=True)
    ]

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        there = seen = k >= 0  # text sees all keys but padding
        distance = torch.zeros_like(k)
        at = zip(_place(q - text, counts, tile), _place(k - text, counts, tile), axes, strict=True)
        for x, y, (length, kernel, stride, padded, limited) in at:
            if padded:
                there = there & (y < length)
            if radius:
                distance = distance + (x - y) * (x - y)
            elif limited:
                leader = (x // stride * stride + stride // 2).clamp(max=length - 1)
                lo = (leader - kernel // 2).clamp(0, length - kernel)
                seen = seen & (y >= lo) & (y < lo + kernel)
        if radius:
            seen = distance < radius * radius
        if text:
            return (k < text) | (there & ((q < text) | seen))
        return there & seen

    return sees


def _list_blocks(on: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [1, 1, rows] and indices [1, 1, rows, columns], those that are on first, in order."""
    counts = on.sum(1, dtype=torch.int32)
    indices = on.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return counts[None, None], indices[None, None].to(torch.int32)


def rival_names(asked: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of rivals to run: all, or those asked for that are rivals."""
    return tuple(name for name in RIVALS if asked is None or name in asked)
