"""What a kernel of grid attention reads: per-axis tables, and lists of the boxes of each tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from vistoken.kernels.tiling import AxisTile, Box, axis_tiles, bounds, box_distances
from vistoken.kernels.windows import Axis, Window

# How the columns of a box are hidden along an axis: not at all, by bounds, by distance.
OPEN, BOUNDED, DISC = 0, 1, 2
_WORD = 32  # bits of the word in which a kernel tests a pair
_SPANS = (31, 62)  # bits of a word of 32 or 64 that hold what a row sees along one axis


@dataclass(frozen=True)
class Plan:
    """The tables of one window, one pair of shapes and one device; see `plan`.

    A tile of rows is given by its number on each axis. Its boxes are found in `lists`, between two
    positions that depend only on the kind of the tile, and a box is one int32 that holds its three
    numbers along the axes, `shifts` bits apart.

    tiles: int32 [all tiles of axis 0, 1, 2; 3], (first column, kind, first row); counts: tiles per
    axis.
    kinds: how many kinds of tile each axis has; groups: int32 [product of kinds, 3],
    (first position, boxes to mask, full boxes), in `lists` in this order.
    limits: int32, lo of all rows and hi of all rows, axis after axis.
    hidden: OPEN, BOUNDED or DISC per axis; words: bits that hold the bounds, or 0, see `_words`.
    masked, full: whether any tile has boxes of that sort.
    """

    rows: Box
    columns: Box
    grid: Box
    counts: Box
    kinds: Box
    shifts: tuple[int, int]
    hidden: Box
    words: int
    masked: bool
    full: bool
    radius: int
    tiles: Tensor
    groups: Tensor
    lists: Tensor
    limits: Tensor

    @property
    def programs(self) -> int:
        """Tiles of the grid."""
        return math.prod(self.counts)

    @property
    def pitch(self) -> tuple[int, ...]:
        """The integers that a kernel needs besides the tables."""
        return (*self.grid, *self.counts[1:], *self.kinds[1:], *self.shifts, self.counts[0])


@lru_cache(maxsize=128)
def plan(window: Window, rows: Box, columns: Box, inverse: bool, device: torch.device) -> Plan:
    """Return the tables for tiles of `rows` and boxes of `columns`; see `vistoken.kernels.tiling`.

    inverse: rows are keys, columns the queries that see them.
    """
    axes = [
        axis_tiles(axis, r, c, inverse)
        for axis, r, c in zip(window.axes, rows, columns, strict=True)
    ]
    signs = [
        _signs(axis, tiles, r, c)
        for axis, tiles, r, c in zip(window.axes, axes, rows, columns, strict=True)
    ]
    kinds = [list(dict.fromkeys(sign)) for sign in signs]
    tiles = [
        (tile.start, kind.index(sign), i * r)
        for tiles, kind, sign_of, r in zip(axes, kinds, signs, rows, strict=True)
        for i, (tile, sign) in enumerate(zip(tiles, sign_of, strict=True))
    ]
    most = [max(tile.boxes for tile in one) for one in axes]
    shifts = (most[2].bit_length() + most[1].bit_length(), most[2].bit_length())
    groups: list[tuple[int, int, int]] = []
    lists: list[int] = []
    for group in product(*(_examples(axes[i], signs[i], kinds[i]) for i in range(3))):
        masked, full = _boxes(window, group, rows, columns)
        groups.append((len(lists), len(masked), len(full)))
        lists += [(a << shifts[0]) | (b << shifts[1]) | c for a, b, c in (*masked, *full)]
    lists.append(0)  # a kernel reads one position ahead
    hidden = tuple(map(_hidden, window.axes, axes))
    limits = [x for axis in window.axes for side in bounds(axis, inverse) for x in side]

    def table(numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32).to(device)

    return Plan(
        rows, columns, window.grid, _triple(map(len, axes)), _triple(map(len, kinds)), shifts,
        _triple(hidden), _words(axes, columns, hidden),
        any(masked for _, masked, _ in groups), any(full for _, _, full in groups), window.radius,
        table(tiles), table(groups), table(lists), table(limits),
    )  # fmt: skip


def _triple(numbers) -> Box:  # type: ignore[no-untyped-def]
    a, b, c = numbers
    return a, b, c


def _signs(axis: Axis, tiles: Sequence[AxisTile], rows: int, columns: int) -> list[tuple[int, ...]]:
    """What two tiles of an axis must share to have the same list of boxes."""
    if not axis.radius:
        return [tile[1:] for tile in tiles]
    reach = rows + axis.radius + columns  # beyond it, the end of the axis makes no difference
    firsts = range(0, axis.length, rows)
    return [
        (tile.start - first, tile.boxes, min(axis.length - first, reach))
        for first, tile in zip(firsts, tiles, strict=True)
    ]


def _examples(
    tiles: Sequence[AxisTile], signs: Sequence[tuple[int, ...]], kinds: Sequence[tuple[int, ...]]
) -> list[tuple[int, AxisTile]]:
    """One tile of each kind, with its number."""
    return [(signs.index(kind), tiles[signs.index(kind)]) for kind in kinds]


def _boxes(
    window: Window, group: Sequence[tuple[int, AxisTile]], rows: Box, columns: Box
) -> tuple[list[Box], list[Box]]:
    """The boxes of a tile: those to mask, and those in which every pair is visible."""
    along = []  # of each axis: (box, least squared distance, largest, whether bounds leave it full)
    for axis, (number, tile), r, c in zip(window.axes, group, rows, columns, strict=True):
        if axis.radius:
            found = box_distances(axis, tile, number * r, r, c)
            along.append([(box, near**2, far**2, True) for box, near, far in found])
        else:
            whole = range(tile.full_first, tile.full_first + tile.full)
            along.append([(box, 0, 0, box in whole) for box in range(tile.boxes)])
    masked: list[Box] = []
    unmasked: list[Box] = []
    limit = window.radius**2 or 1
    for one, two, three in product(*along):
        if one[1] + two[1] + three[1] >= limit:
            continue
        inside = one[2] + two[2] + three[2] < limit
        full = inside and one[3] and two[3] and three[3]
        (unmasked if full else masked).append((one[0], two[0], three[0]))
    return masked, unmasked


def _hidden(axis: Axis, tiles: Sequence[AxisTile]) -> int:
    """Whether, and how, a kernel must hide columns along an axis."""
    if axis.radius:
        return DISC
    return OPEN if all(tile.boxes == tile.full for tile in tiles) else BOUNDED


def _words(axes: Sequence[Sequence[AxisTile]], columns: Box, hidden: Sequence[int]) -> int:
    """Size of the words of bits that hold what a row sees, 0 if it does not fit.

    With words, one `and` tests a pair on every axis. All columns of a tile along one axis must fit
    a word, and the sides of a box together 32 bits.
    """
    sides = [(tiles, c) for tiles, c, how in zip(axes, columns, hidden, strict=True) if how]
    if DISC in hidden or sum(c for _, c in sides) > _WORD:
        return 0
    span = max((tile.boxes * c for tiles, c in sides for tile in tiles), default=0)
    return 32 if span <= _SPANS[0] else 64 if span <= _SPANS[1] else 0
