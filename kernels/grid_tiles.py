"""How attention in plain torch cuts a grid into tiles, and which of them are computed at once.

A tile of queries is a box of the grid; the keys that its queries see lie in a box too. Tiles whose
queries see the same of their boxes are of one kind: they share a mask, and those that follow each
other along the last axis are one batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from vistoken.kernels.windows import Axis, Window

_MOST_TILES = 4096  # along one axis


class Kind(NamedTuple):
    """What a tile sees along one axis.

    queries, keys: how many; lo, hi: what each query sees of the tile's keys; offset: on the axes of
    a disc, the first key less the first query, else None.
    """

    queries: int
    keys: int
    lo: tuple[int, ...]
    hi: tuple[int, ...]
    offset: int | None

    @property
    def full(self) -> bool:
        return not any(self.lo) and min(self.hi) == self.keys


class Run(NamedTuple):
    """Tiles of one kind that follow each other along an axis: so many `tiles`.

    query, key: where the first tile and its keys begin; the next ones begin kind.queries and `step`
    later.
    """

    kind: Kind
    query: int
    key: int
    tiles: int
    step: int


@lru_cache(maxsize=256)
def _bounds(axis: Axis) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(map(axis.lo, range(axis.length))), tuple(map(axis.hi, range(axis.length)))


def _cuts(axis: Axis, size: int) -> Iterator[tuple[int, int]]:
    """First and last query of each tile; `size` is rounded so that tiles fit the stride groups."""
    if size >= axis.stride:
        whole = size // axis.stride * axis.stride
        for first in range(0, axis.length, whole):
            yield first, min(first + whole, axis.length) - 1
        return
    pieces = -(-axis.stride // size)
    for group in range(0, axis.length, axis.stride):
        ends = [group + i * axis.stride // pieces for i in range(pieces + 1)]
        for first, end in zip(ends[:-1], ends[1:], strict=True):
            if first < axis.length:
                yield first, min(end, axis.length) - 1


@lru_cache(maxsize=1024)
def axis_runs(axis: Axis, size: int) -> tuple[Run, ...]:
    """Return the tiles of about `size` queries along an axis, put together in runs."""
    lo, hi = _bounds(axis)
    runs: list[Run] = []
    for first, last in _cuts(axis, size):
        start, end = lo[first], hi[last]
        kind = Kind(
            last - first + 1,
            end - start,
            tuple(x - start for x in lo[first : last + 1]),
            tuple(x - start for x in hi[first : last + 1]),
            start - first if axis.radius else None,
        )
        if runs and runs[-1].kind == kind:
            run = runs[-1]
            step = start - run.key if run.tiles == 1 else run.step
            if start == run.key + run.tiles * step:
                runs[-1] = run._replace(tiles=run.tiles + 1, step=step)
                continue
        runs.append(Run(kind, first, start, 1, 0))
    return tuple(runs)


def single_tiles(runs: tuple[Run, ...]) -> list[Run]:
    """Return the tiles of runs one by one, those of one kind together."""
    tiles = [
        Run(run.kind, run.query + i * run.kind.queries, run.key + i * run.step, 1, 0)
        for run in runs
        for i in range(run.tiles)
    ]
    order = {kind: place for place, kind in enumerate(dict.fromkeys(tile.kind for tile in tiles))}
    return sorted(tiles, key=lambda tile: order[tile.kind])


def visible_keys(kinds: tuple[Kind, Kind, Kind], radius: int, group: int) -> Tensor | None:
    """Return what the queries of a tile see of its keys, bool [M, K], or None if they see all.

    kinds: of the axes (last, first, middle), the order of queries and of keys in a tile; group:
    rows of each query, one after the other.
    """
    reach = sum(
        max(abs(kind.offset + kind.keys - 1), abs(kind.offset - kind.queries + 1)) ** 2
        for kind in kinds
        if kind.offset is not None
    )
    if all(kind.full for kind in kinds) and (not radius or reach < radius**2):
        return None
    seen = torch.ones((), dtype=torch.bool)
    apart = torch.zeros((), dtype=torch.int64)
    for i, kind in enumerate(kinds):
        shape = [1] * 6
        shape[i], shape[3 + i] = kind.queries, kind.keys
        y = torch.arange(kind.keys)
        lo, hi = torch.tensor([kind.lo, kind.hi])[:, :, None]
        seen = seen & ((y >= lo) & (y < hi)).view(shape)
        if kind.offset is not None:
            gap = y + kind.offset - torch.arange(kind.queries)[:, None]
            apart = apart + gap.square().view(shape)
    if radius:
        seen = seen & (apart < radius**2)
    rows = math.prod(kind.queries for kind in kinds)
    return seen.reshape(rows, -1).repeat_interleave(group, 0)


# --- the shape of a tile -------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """What a device can hold and what it costs, in logits.

    logits: how many are computed at once; most: of one tile and head at most; strip: numbers that
    the keys and values of one row of tiles may take; call: a batch of tiles, whatever its size.
    """

    logits: int
    most: int
    strip: int
    call: int


def costs_of(device: torch.device) -> Costs:
    """Return the costs of a device.

    On a CPU both matrices of logits of a batch stay in the caches of the cores that work on it, and
    its calls take about 40 microseconds.
    """
    if device.type != "cpu":
        return Costs(logits=1 << 25, most=1 << 25, strip=1 << 28, call=1 << 21)
    cores = torch.get_num_threads()
    return Costs(cores << 17, most=1 << 22, strip=cores << 22, call=cores * 10000)


_KEY_COST = 8  # a key and its value copied into a strip
_ROW_COST = 10  # rows that a product takes longer than its size says


class _Sums(NamedTuple):
    """Of the tiles along an axis: their number, the sums of keys and of pairs, and the largest."""

    size: int
    tiles: int
    keys: int
    pairs: int
    most_queries: int
    most_keys: int


@lru_cache(maxsize=1024)
def _sums(axis: Axis, size: int) -> _Sums:
    runs = axis_runs(axis, size)
    return _Sums(
        size,
        sum(run.tiles for run in runs),
        sum(run.tiles * run.kind.keys for run in runs),
        sum(run.tiles * run.kind.keys * run.kind.queries for run in runs),
        max(run.kind.queries for run in runs),
        max(run.kind.keys for run in runs),
    )


def _sizes(axis: Axis) -> list[_Sums]:
    """Tile sizes worth a look: powers of two, of queries and of stride groups."""
    sizes = {min(1 << i, axis.length) for i in range(8)}
    sizes |= {min(axis.stride << i, axis.length) for i in range(4)}
    least = -(-axis.length // _MOST_TILES)
    return [_sums(axis, size) for size in sorted({max(size, least) for size in sizes})]


@lru_cache(maxsize=256)
def choose_tile(window: Window, heads: int, group: int, costs: Costs) -> tuple[int, int, int]:
    """Return the lengths of a tile along the axes at which attention is the least work.

    heads: batch entries times kv heads; group: query heads of each kv head.
    """

    def cost(shape: tuple[_Sums, ...]) -> tuple[bool, float]:
        t, h, w = shape
        rows = group * math.prod(x.most_queries for x in shape)
        largest = rows * math.prod(x.most_keys for x in shape)
        pairs = group * math.prod(x.pairs for x in shape) * (1 + _ROW_COST / rows)
        copies = _KEY_COST * t.keys * h.keys * window.axes[2].length
        at_once = max(min(costs.logits // largest, heads * w.tiles), 1)
        calls = costs.call * math.prod(x.tiles for x in shape) / at_once
        too_large = largest > costs.most
        return too_large, largest if too_large else pairs + copies + calls

    best = min(product(*map(_sizes, window.axes)), key=cost)
    return tuple(x.size for x in best)  # type: ignore[return-value]
