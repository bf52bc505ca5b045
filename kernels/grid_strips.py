"""Strips: keys or queries of a row of tiles, laid out so that each tile is a slice of them.

A strip is [P, W, R, C] with the last axis of the grid first: P pairs of a batch entry and a kv
head, W positions, R rows at each of them (over the other two axes of the grid, and for queries
over the heads that share a kv head), C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vistoken.kernels.grid_tiles import Kind, Run, axis_runs, single_tiles, visible_keys
from vistoken.kernels.tile_softmax import TileMask, tile_mask
from vistoken.kernels.windows import Window

_MASKS = 1 << 24  # numbers in the masks that are kept for other tiles of their kind


class Part(NamedTuple):
    """Some batch entries and kv heads, computed at once.

    pairs: how many pairs of an entry and a head; group: query heads of each kv head.
    """

    batch: slice
    heads: slice
    pairs: int
    group: int

    def queries(self, x: Tensor, cut: tuple[slice, slice]) -> Tensor:
        """View of x [B, T, H, W, Hq, C] as [b, h, W, t, h, group, C], cut along its first axes."""
        grouped = x.unflatten(4, (-1, self.group))
        return grouped[self.batch, cut[0], cut[1], :, self.heads].permute(0, 4, 3, 1, 2, 5, 6)

    def keys(self, x: Tensor, cut: tuple[slice, slice]) -> Tensor:
        """View of x [B, T, H, W, Hkv, C] as [b, h, W, t, h, C], cut along its first axes."""
        return x[self.batch, cut[0], cut[1], :, self.heads].permute(0, 4, 3, 1, 2, 5)

    def extras(self, x: Tensor) -> Tensor:
        """View of x [B, N, Hkv, C] as [b, h, N, C]."""
        return x[self.batch, :, self.heads].permute(0, 2, 1, 3)


def parts(batch: int, heads: int, group: int, most: int) -> Iterator[Part]:
    """Yield the parts of all batch entries and kv heads, at most `most` pairs in each."""
    entries, together = max(most // heads, 1), min(most, heads)
    for b in range(0, batch, entries):
        for h in range(0, heads, together):
            pairs = min(entries, batch - b) * min(together, heads - h)
            yield Part(slice(b, b + entries), slice(h, h + together), pairs, group)


def strip(view: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a view from a `Part` as a strip; do not write to it, it may be the caller's memory."""
    whole = view.to(dtype).contiguous()
    pairs, rows = math.prod(view.shape[:2]), math.prod(view.shape[3:-1])
    return whole.view(pairs, view.shape[2], rows, view.shape[-1])


class Tile(NamedTuple):
    """So many `tiles` of one kind along a strip: one batch of P * tiles.

    query, key: where the first one and its keys begin, the next ones `queries` and `step` later.
    mask: what they see of their keys, None: all.
    """

    query: int
    queries: int
    key: int
    keys: int
    tiles: int
    step: int
    mask: TileMask | None

    def rows(self, strip: Tensor) -> Tensor:
        """The queries of a strip as [P * tiles, M, C]; a view where tiles or P is 1."""
        pairs, _, rows, channels = strip.shape
        part = strip[:, self.query : self.query + self.tiles * self.queries]
        return part.reshape(pairs * self.tiles, self.queries * rows, channels)

    def put_rows(self, strip: Tensor, values: Tensor) -> None:
        """Write values [P * tiles, M, C] to the queries of a strip."""
        part = strip[:, self.query : self.query + self.tiles * self.queries]
        part.copy_(values.view(part.shape))

    def columns(self, strip: Tensor) -> Tensor:
        """The keys of a strip as [P * tiles, K, C]; a view where tiles or P is 1."""
        if self.tiles == 1:
            return strip[:, self.key : self.key + self.keys].flatten(1, 2)
        pairs, length, rows, channels = strip.shape
        at = strip.as_strided(
            (pairs, self.tiles, self.keys * rows, channels),
            (length * rows * channels, self.step * rows * channels, channels, 1),
            strip.storage_offset() + self.key * rows * channels,
        )
        return at.flatten(0, 1)

    def add_products(self, strip: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Add weights [P * tiles, M, K] transposed times rows [P * tiles, M, C] to the keys."""
        if self.tiles == 1:
            self.columns(strip).baddbmm_(weights.mT, rows)
            return
        products = torch.bmm(weights.mT, rows)
        products = products.view(strip.shape[0], self.tiles, self.keys, *strip.shape[2:])
        for i, product in enumerate(products.unbind(1)):
            first = self.key + i * self.step
            strip[:, first : first + self.keys].add_(product)


class Row(NamedTuple):
    """A row of tiles: where its queries and keys lie on the first two axes, and the tiles."""

    queries: tuple[slice, slice]
    keys: tuple[slice, slice]
    tiles: Iterable[Tile]


class Rows:
    """The rows of tiles of a window, and the masks that their tiles share.

    tile: what `choose_tile` gives; group: query heads of each kv head; extras: keys that each
    query sees besides. logits: of the largest tile and one kv head; keys: in the largest strip.
    """

    def __init__(
        self,
        window: Window,
        tile: tuple[int, int, int],
        group: int,
        extras: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        t, h, self._runs = (axis_runs(*pair) for pair in zip(window.axes, tile, strict=True))
        self._first, self._second = single_tiles(t), single_tiles(h)
        self._radius, self._group, self._extras = window.radius, group, extras
        self._dtype, self._device = dtype, device
        across = group * _most(t, "queries") * _most(h, "queries")
        keys = _most(t, "keys") * _most(h, "keys")
        self.keys = keys * window.axes[2].length
        self.logits = max(
            across * run.kind.queries * (keys * run.kind.keys + extras) for run in self._runs
        )
        self._masks: dict[tuple[Kind, Kind, Kind], TileMask | None] = {}
        self._kept = 0

    def cut(self, logits: int) -> Iterator[Row]:
        """Yield the rows; a batch has so many logits of one kv head, or is a single tile."""
        for first in self._first:
            for second in self._second:
                yield Row(
                    (_queries(first), _queries(second)),
                    (_keys(first), _keys(second)),
                    self._tiles(first.kind, second.kind, logits),
                )

    def _tiles(self, first: Kind, second: Kind, logits: int) -> Iterator[Tile]:
        rows = first.queries * second.queries * self._group
        for run in self._runs:
            queries, keys = run.kind.queries, run.kind.keys
            mask = self._mask((run.kind, first, second))
            columns = first.keys * second.keys * keys + self._extras
            together = max(logits // (rows * queries * columns), 1)
            for i in range(0, run.tiles, together):
                query, key = run.query + i * queries, run.key + i * run.step
                tiles = min(together, run.tiles - i)
                yield Tile(query, queries, key, keys, tiles, run.step, mask)

    def _mask(self, kinds: tuple[Kind, Kind, Kind]) -> TileMask | None:
        if kinds in self._masks:
            return self._masks[kinds]
        seen = visible_keys(kinds, self._radius, self._group)
        mask = None if seen is None else tile_mask(seen.to(self._device), self._dtype)
        self._kept += 0 if seen is None else seen.numel()
        if self._kept <= _MASKS:
            self._masks[kinds] = mask
        return mask


def _most(runs: tuple[Run, ...], what: str) -> int:
    return max(getattr(run.kind, what) for run in runs)


def _queries(run: Run) -> slice:
    return slice(run.query, run.query + run.kind.queries)


def _keys(run: Run) -> slice:
    return slice(run.key, run.key + run.kind.keys)


def global_row(queries: int, width: int, together: int) -> Row:
    """Return the row of queries on a grid (1, 1, queries) that see all keys of a grid.

    width: of the grid of keys; together: queries of a tile.
    """
    firsts = range(0, queries, together)
    tiles = [Tile(i, min(together, queries - i), 0, width, 1, 0, None) for i in firsts]
    everything = slice(None), slice(None)
    return Row(everything, everything, tiles)
