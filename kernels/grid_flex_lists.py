"""Block lists of FlexAttention for the windows of a grid, from bounds along the axes.

Nothing here takes queries by keys of memory: it is pairs of blocks, and a bounded number of rows.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, noop_mask, or_masks

from vistoken.kernels.windows import Axis, Window, flatten_window, restore_window

Box = tuple[int, int, int]
BLOCK = 128  # tokens of a block in raster order
_FAR = 1 << 28  # the coordinate of padding: behind every window
_CHUNK = 1 << 22  # intervals of keys that are counted at once


class Order(NamedTuple):
    """The tokens in the order in which FlexAttention sees them, and what they see of each other.

    mask: lists and mask of grid tokens, then global queries or extra keys; take: the token at each
    place, padding takes the nearest one; place: of each token; both None in raster order.
    """

    mask: BlockMask
    take: Tensor | None
    place: Tensor | None


def make_order(
    window: Window, extras: int, globals_: int, tile: Box | None, device: torch.device
) -> Order:
    """Return the order of the tokens of a window's grid, and its mask; the last ones are kept.

    extras: keys that every query sees; globals_: queries that see every key. tile: None for raster
    order, or the box of the grid that makes one block; the grid is padded to whole tiles.
    """
    if torch.compiler.is_compiling():
        tensors = _constant_tensors(tuple(flatten_window(window)), extras, globals_, tile, device)
        return _assemble(window, extras, globals_, tile, tensors)
    return _kept_order(window, extras, globals_, tile, device)


@lru_cache(maxsize=32)
def _kept_order(
    window: Window, extras: int, globals_: int, tile: Box | None, device: torch.device
) -> Order:
    tensors = _tensors(window, extras, globals_, tile, device)
    return _assemble(window, extras, globals_, tile, tensors)


@torch.compiler.assume_constant_result
def _constant_tensors(
    window: tuple[int, ...], extras: int, globals_: int, tile: Box | None, device: torch.device
) -> tuple[Tensor, ...]:
    """`_tensors` as compiled code holds them: from plain numbers, as constants."""
    return _tensors(restore_window(window), extras, globals_, tile, device)


def _tensors(
    window: Window, extras: int, globals_: int, tile: Box | None, device: torch.device
) -> tuple[Tensor, ...]:
    """The 8 tensors of the lists, 4 of each axis (`_Table`), and hidden, take and place."""
    coordinates, take = _places(window.grid, tile, device)
    tables = [_table(axis, x) for axis, x in zip(window.axes, coordinates, strict=True)]
    hidden = torch.stack([table.key == _FAR for table in tables]).any(0)
    place = torch.empty(window.tokens, dtype=torch.int64, device=device)
    place[take[~hidden]] = (~hidden).nonzero()[:, 0]
    if tile is None:
        partial, full = raster_lists(window, extras, globals_, BLOCK, device)
    else:
        partial, full = tile_lists(window, extras, globals_, tile, device)
    wide = [x for table in tables for x in _extended(table, extras, globals_)]
    hidden = torch.cat([hidden, hidden.new_zeros(extras)])
    lists = [*_ordered(partial), *_ordered(full), *_ordered(partial.mT), *_ordered(full.mT)]
    return *lists, *wide, hidden, take, place


def _assemble(
    window: Window, extras: int, globals_: int, tile: Box | None, tensors: tuple[Tensor, ...]
) -> Order:
    """The order of tokens from its tensors."""
    hidden, take, place = tensors[20:]
    tables = [_Table(*tensors[i : i + 4]) for i in (8, 12, 16)]
    block, places = BLOCK if tile is None else math.prod(tile), take.shape[0]
    kv_count, kv_index, full_kv_count, full_kv_index = tensors[:4]
    q_count, q_index, full_q_count, full_q_index = tensors[4:8]
    mask = BlockMask(  # from_kv_blocks cannot be traced
        seq_lengths=(places + globals_, places + extras),
        kv_num_blocks=kv_count,
        kv_indices=kv_index,
        full_kv_num_blocks=full_kv_count,
        full_kv_indices=full_kv_index,
        q_num_blocks=q_count,
        q_indices=q_index,
        full_q_num_blocks=full_q_count,
        full_q_indices=full_q_index,
        BLOCK_SIZE=(block, block),
        mask_mod=_mask_mod(window, tables, hidden, places, extras, globals_),
    )
    return Order(mask, None, None) if tile is None else Order(mask, take, place)


def _ordered(listed: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [1, 1, nq] and indices [1, 1, nq, nk] of bool [nq, nk], listed ones first."""
    indices = listed.int().argsort(dim=-1, descending=True, stable=True)
    return listed.sum(-1).int()[None, None], indices.int()[None, None]


def _places(grid: Box, tile: Box | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Coordinates [3, places] with padding beyond the grid, and the raster index at each place."""
    if tile is None:
        tokens = torch.arange(math.prod(grid), device=device)
        return torch.stack(torch.unravel_index(tokens, grid)), tokens
    sides = [
        torch.arange(-(-length // side) * side, device=device).view(-1, side)
        for length, side in zip(grid, tile, strict=True)
    ]
    shape = [x.shape[0] for x in sides] + [x.shape[1] for x in sides]
    spread = []
    for i, x in enumerate(sides):
        view = [1] * 6
        view[i], view[3 + i] = x.shape
        spread.append(x.view(view).expand(shape).reshape(-1))
    coordinates = torch.stack(spread)
    ends = torch.tensor(grid, device=device)[:, None] - 1
    t, h, w = coordinates.minimum(ends)
    return coordinates, (t * grid[1] + h) * grid[2] + w


# --- the mask of single pairs --------------------------------------------------------------------


class _Table(NamedTuple):
    """Along one axis: what each query sees, lo <= key < hi, and where each query and key is."""

    lo: Tensor
    hi: Tensor
    query: Tensor
    key: Tensor


def _table(axis: Axis, coordinates: Tensor) -> _Table:
    """Of tokens at `coordinates`; padding sees what the last token sees, and nobody sees it."""
    lo, hi = axis.bounds().int().to(coordinates.device)
    query = coordinates.clamp(max=axis.length - 1)
    key = torch.where(coordinates < axis.length, coordinates, _FAR)
    return _Table(lo[query], hi[query], query.int(), key.int())


def _mask_mod(  # type: ignore[no-untyped-def]
    window: Window,
    tables: list[_Table],
    hidden: Tensor,
    places: int,
    extras: int,
    globals_: int,
):
    """The mask of FlexAttention: one table look-up per query and key, no division."""
    padded = places > window.tokens
    axes = list(zip(window.axes, tables, strict=True))
    mods = [_axis_mod(table) for axis, table in axes if not axis.full or padded]
    if window.radius:
        mods.append(_disc_mod([table for axis, table in axes if axis.radius], window.radius))
    if not mods:
        return noop_mask
    seen = and_masks(*mods)
    more = []
    if extras:
        more.append(lambda b, h, q, kv: kv >= places)
    if globals_:
        more.append(lambda b, h, q, kv: (q >= places) & ~hidden[kv])
    return or_masks(seen, *more) if more else seen


def _extended(table: _Table, extras: int, globals_: int) -> _Table:
    """The table with room for global queries and extra keys, of which other masks tell."""
    more_queries = table.query.new_zeros(globals_)
    lo, hi, query = (torch.cat([x, more_queries]) for x in (table.lo, table.hi, table.query))
    return _Table(lo, hi, query, torch.cat([table.key, table.key.new_full((extras,), _FAR)]))


def _axis_mod(table: _Table):  # type: ignore[no-untyped-def]
    lo, hi, key = table.lo, table.hi, table.key
    return lambda b, h, q, kv: (key[kv] >= lo[q]) & (key[kv] < hi[q])


def _disc_mod(tables: list[_Table], radius: int):  # type: ignore[no-untyped-def]
    q0, k0, q1, k1 = (x.long() for table in tables for x in (table.query, table.key))
    square = radius**2

    def inside(b, h, q, kv):  # type: ignore[no-untyped-def]
        d0, d1 = k0[kv] - q0[q], k1[kv] - q1[q]
        return d0 * d0 + d1 * d1 < square

    return inside


# --- lists of blocks in raster order -------------------------------------------------------------


def raster_lists(
    window: Window, extras: int, globals_: int, block: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Return the partial and the full blocks, bool [nq, nk], of tokens in raster order.

    A block is full if it has `block` keys and each query of the block sees all of them; it is
    partial if some pair is seen. Global queries follow the queries of the grid, and extra keys its
    keys.
    """
    tokens = window.tokens
    nq, nk = -(-(tokens + globals_) // block), -(-(tokens + extras) // block)
    queries = _overlap(nq, block, 0, tokens, device)
    global_rows = _overlap(nq, block, tokens, tokens + globals_, device)
    seen = _pairs(window, nq, nk, block, device)
    seen += queries[:, None] * _overlap(nk, block, tokens, tokens + extras, device)
    seen += global_rows[:, None] * _overlap(nk, block, 0, tokens + extras, device)
    full = seen == (queries + global_rows)[:, None] * block
    return (seen > 0) & ~full, full


def _overlap(blocks: int, block: int, start: int, end: int, device: torch.device | str) -> Tensor:
    """How many of the tokens start..end lie in each block."""
    first = torch.arange(blocks, device=device) * block
    return (first.add(block).clamp(max=end) - first.clamp(min=start)).clamp(min=0)


def _pairs(window: Window, nq: int, nk: int, block: int, device: torch.device | str) -> Tensor:
    """Pairs of a query and a key of the grid that are seen, per pair of blocks [nq, nk].

    What a query sees of a row of the grid is an interval of tokens. With x = j * block, the tokens
    of an interval [s, e) before x are max(x - s, 0) - max(x - e, 0): sums over the s < x and e < x.
    """
    counts = torch.zeros(2, nq, nk + 1, dtype=torch.int64, device=device)  # of ends in a block
    bounds = [axis.bounds().to(device) for axis in window.axes]
    rows = math.prod(int((hi - lo).max()) for lo, hi in bounds[:2])
    for part in torch.arange(window.tokens, device=device).split(max(_CHUNK // rows, 1)):
        query, start, end = _intervals(window, bounds, part)
        line = query // block * (nk + 1)
        for position, sign in ((start, 1), (end, -1)):
            at = line + position // block
            counts[0].view(-1).index_add_(0, at, torch.full_like(at, sign))
            counts[1].view(-1).index_add_(0, at, position * sign)
    number, total = counts.cumsum(-1)
    x = torch.arange(1, nk + 1, device=device) * block
    before = x * number[:, :-1] - total[:, :-1]
    return before.diff(dim=-1, prepend=before.new_zeros(nq, 1))


def _intervals(
    window: Window, bounds: list[Tensor], queries: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, first key and key after the last [n] of every interval that some queries see."""
    grid = window.grid
    place = torch.unravel_index(queries, grid)
    columns = []
    for i, x in enumerate(place[:2]):
        lo, hi = bounds[i][:, x]
        offset = torch.arange(int((hi - lo).max()), device=queries.device)
        key = lo[:, None] + offset
        columns.append((key, key < hi[:, None], x[:, None] if window.axes[i].radius else key))
    (t, t_in, t_at), (h, h_in, h_at) = columns
    row = t[:, :, None] * grid[1] + h[:, None, :]
    there = t_in[:, :, None] & h_in[:, None, :]
    lo, hi = (x[:, None, None].expand(row.shape) for x in bounds[2][:, place[2]])
    if window.radius:
        rest = window.radius**2 - (t - t_at).square()[:, :, None] - (h - h_at).square()[:, None, :]
        there = there & (rest > 0)
        if window.axes[2].radius:  # |dw|^2 < rest
            reach = (rest - 1).clamp(min=0).double().sqrt().long()
            middle = place[2][:, None, None]
            lo, hi = lo.maximum(middle - reach), hi.minimum(middle + reach + 1)
    query = queries[:, None, None].expand(row.shape)[there]
    first = row * grid[2]
    return query, (first + lo)[there], (first + hi)[there]


# --- lists of blocks that are tiles of the grid --------------------------------------------------


def tile_lists(
    window: Window, extras: int, globals_: int, tile: Box, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Return the partial and the full blocks, bool [nq, nk], where a block is a tile of the grid.

    A tile is full if it holds no padding and each query sees each key. Blocks of extra keys follow
    the tiles of keys, and blocks of global queries the tiles of queries.
    """
    touched = full = torch.ones(1, 1, dtype=torch.bool)
    whole = torch.ones(1, dtype=torch.bool)
    nearest = farthest = torch.zeros(1, 1, dtype=torch.int64)
    for axis, side in zip(window.axes, tile, strict=True):
        first = torch.arange(0, axis.length, side)
        last = (first + side).clamp(max=axis.length) - 1
        lo, hi = axis.bounds()
        some = (lo[first][:, None] <= last) & (hi[last][:, None] > first)
        every = (lo[last][:, None] <= first) & (hi[first][:, None] > last)
        unpadded = first + side <= axis.length
        touched, full = _outer(touched, some) > 0, _outer(full, every & unpadded) > 0
        whole = (whole[:, None] & unpadded).view(-1)
        near, far = torch.zeros(2, len(first), len(first), dtype=torch.int64)
        if axis.radius:
            near = (first - last[:, None]).maximum(first[:, None] - last).clamp(min=0).square()
            far = (last - first[:, None]).maximum(last[:, None] - first).square()
        nearest, farthest = _outer_sum(nearest, near), _outer_sum(farthest, far)
    if window.radius:
        touched, full = touched & (nearest < window.radius**2), full & (farthest < window.radius**2)
    block = math.prod(tile)
    touched, full = _with_globals(touched, -(-globals_ // block)), full
    full = torch.cat([full, whole.expand(-(-globals_ // block), -1)])
    ends = torch.arange(1, -(-extras // block) + 1) * block <= extras
    touched = torch.cat([touched, torch.ones(len(touched), len(ends), dtype=torch.bool)], 1)
    full = torch.cat([full, ends.expand(len(full), -1)], 1)
    return (touched & ~full).to(device), full.to(device)


def _with_globals(touched: Tensor, blocks: int) -> Tensor:
    return torch.cat([touched, torch.ones(blocks, touched.shape[1], dtype=torch.bool)])


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """[a, a] and [b, b] to their Kronecker product [a * b, a * b]."""
    return torch.kron(left.to(torch.uint8), right.to(torch.uint8))


def _outer_sum(left: Tensor, right: Tensor) -> Tensor:
    """The same with a sum in place of the product."""
    whole = left[:, None, :, None] + right[None, :, None, :]
    return whole.reshape(left.shape[0] * right.shape[0], -1)
