"""How local attention is cut into tiles: exact counts per axis, and the choice of tile shapes.

A tile of queries is a box of the grid. The keys that its queries see lie in a box too, which is cut
into smaller boxes of one shape. Bounds are monotone along an axis and axes are independent, so what
a kernel touches is counted exactly as a product over axes; a disc is counted by its distances.

Backward passes swap the roles: a tile of keys, and boxes of the queries that see them. Here the two
are called rows and columns, with `inverse` for the second reading.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from vistoken.kernels.windows import Axis, Window

Box = tuple[int, int, int]

# Cost of one box, in (row, column) pairs: rows and columns beyond their product stand for what a
# box costs whatever its size, and a masked pair costs more than an unmasked one.
ROW_COST = 32
COLUMN_COST = 16
MASK_COST = 1.25


class AxisTile(NamedTuple):
    """The columns of one tile along one axis.

    start: first column of the first box; boxes: how many boxes; full_first, full: which of them
    hold only columns that every row of the tile sees.
    """

    start: int
    boxes: int
    full_first: int
    full: int


@dataclass(frozen=True)
class Tiling:
    """Shapes of the query and key boxes, and what they touch in one head.

    boxes: pairs of a tile and a box; full: those in which every pair is visible; touched: pairs of
    a query and a key that are computed, padding included.
    """

    q: Box
    kv: Box
    boxes: int
    full: int
    touched: int

    @property
    def queries(self) -> int:
        return math.prod(self.q)

    @property
    def keys(self) -> int:
        return math.prod(self.kv)


# --- one axis ------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def bounds(axis: Axis, inverse: bool = False) -> tuple[array[int], array[int]]:
    """Return lo and hi of every row of an axis: query x sees keys lo[x] <= y < hi[x].

    inverse: the queries that see a key. Then lo may exceed hi: no query sees the key.
    """
    length = axis.length
    lo = array("q", (axis.lo(x) for x in range(length)))
    hi = array("q", (axis.hi(x) for x in range(length)))
    if not inverse:
        return lo, hi
    first = last = 0
    since, until = array("q"), array("q")
    for y in range(length):
        while first < length and hi[first] <= y:
            first += 1
        while last < length and lo[last] <= y:
            last += 1
        since.append(first)
        until.append(last)
    return since, until


@lru_cache(maxsize=1024)
def axis_tiles(axis: Axis, rows: int, columns: int, inverse: bool = False) -> tuple[AxisTile, ...]:
    """Return the columns of each tile of `rows` along an axis, in boxes of `columns`.

    The boxes cover exactly the columns that a row of the tile sees, with as few boxes as can be.
    Where the last would stick out, all move back by so much that most boxes are full; a start may
    then be negative.
    """
    lo, hi = bounds(axis, inverse)
    tiles = []
    for first in range(0, axis.length, rows):
        last = min(first + rows, axis.length) - 1
        tiles.append(_axis_tile((lo[first], hi[last]), (lo[last], hi[first]), columns, axis.radius))
    return tuple(tiles)


def _axis_tile(span: tuple[int, int], shared: tuple[int, int], columns: int, disc: int) -> AxisTile:
    boxes = max(0, -(-(span[1] - span[0]) // columns))
    if disc or shared[1] - shared[0] < columns:
        return AxisTile(span[0], boxes, 0, 0)
    slack = boxes * columns - (span[1] - span[0])

    def full(back: int) -> tuple[int, int]:
        begin, end = (x - span[0] + back for x in shared)
        return -(-begin // columns), end // columns

    back = max(range(slack + 1), key=lambda s: (full(s)[1] - full(s)[0], -s))
    first, end = full(back)
    return AxisTile(span[0] - back, boxes, first if end > first else 0, max(0, end - first))


@lru_cache(maxsize=1024)
def _count(axis: Axis, rows: int, columns: int, inverse: bool) -> tuple[int, int]:
    """All boxes of all tiles of an axis, and the full ones."""
    tiles = axis_tiles(axis, rows, columns, inverse)
    return sum(tile.boxes for tile in tiles), sum(tile.full for tile in tiles)


def box_distances(axis: Axis, tile: AxisTile, first: int, rows: int, columns: int) -> list[Box]:
    """Return (box, least distance, largest distance) of a row and a column for each box.

    For an axis of a disc. Only columns on the axis count, and a box that sticks out of it has no
    largest distance, which is written as a number no radius reaches.
    """
    last = min(first + rows, axis.length) - 1
    found = []
    for box in range(tile.boxes):
        begin = tile.start + box * columns
        end = min(begin + columns, axis.length) - 1
        near = max(0, begin - last, first - end)
        inside = begin >= 0 and begin + columns <= axis.length
        far = max(end - first, last - begin) if inside else 1 << 30
        found.append((box, near, far))
    return found


@lru_cache(maxsize=1024)
def _distances(
    axis: Axis, rows: int, columns: int, inverse: bool
) -> tuple[Counter[int], Counter[int]]:
    """How many pairs of tile and box have which least, and which largest, distance."""
    near: Counter[int] = Counter()
    far: Counter[int] = Counter()
    for i, tile in enumerate(axis_tiles(axis, rows, columns, inverse)):
        for _, least, largest in box_distances(axis, tile, i * rows, rows, columns):
            near[least] += 1
            far[largest] += 1
    return near, far


def _within(axes: Sequence[Counter[int]], radius: int) -> int:
    """How many combinations, one distance of each axis, have a squared sum below radius**2."""
    sums = Counter({0: 1})
    for axis in axes[:-1]:
        following: Counter[int] = Counter()
        for total, times in sums.items():
            for distance, more in axis.items():
                if total + distance**2 < radius**2:
                    following[total + distance**2] += times * more
        sums = following
    distances = sorted(axes[-1])
    below = [0, *accumulate(axes[-1][distance] for distance in distances)]
    return sum(
        times * below[bisect_left(distances, radius**2 - total, key=lambda d: d * d)]
        for total, times in sums.items()
    )


# --- a window ------------------------------------------------------------------------------------


def without_disc(window: Window) -> Window:
    """The same window as boxes where its disc holds the whole grid, so that nothing is hidden."""
    if not (window.radius and window.full):
        return window
    a, b, c = (Axis(length, length) for length in window.grid)
    return Window((a, b, c))


def count_boxes(window: Window, rows: Box, columns: Box, inverse: bool = False) -> tuple[int, int]:
    """Return how many pairs (tile, box) a kernel computes in one head, and how many are full."""
    boxes = full = 1
    discs = []
    for axis, r, c in zip(window.axes, rows, columns, strict=True):
        if axis.radius:
            discs.append(_distances(axis, r, c, inverse))
        else:
            every, unmasked = _count(axis, r, c, inverse)
            boxes, full = boxes * every, full * unmasked
    if not discs:
        return boxes, full
    near, far = zip(*discs, strict=True)
    return boxes * _within(near, window.radius), full * _within(far, window.radius)


def _shapes(grid: Box, tokens: int) -> Iterator[Box]:
    """Boxes of `tokens` tokens with sides that are powers of two and fit the grid.

    Where the grid is smaller than that, the last axis takes what is left.
    """
    t, h, w = (1 << (length - 1).bit_length() for length in grid)
    if t * h * w <= tokens:
        yield t, h, tokens // (t * h)
        return
    for a in (1 << i for i in range(t.bit_length())):
        for b in (1 << i for i in range(h.bit_length())):
            if a * b <= tokens and tokens // (a * b) <= w:
                yield a, b, tokens // (a * b)


@lru_cache(maxsize=1024)
def choose_tiles(
    window: Window,
    head_dim: int,
    queries: tuple[int, ...] = (64, 128),
    keys: tuple[int, ...] = (32, 64, 128),
    *,
    inverse: bool = False,
    least_width: int = 1,
    mask_cost: float = MASK_COST,
    row_cost: float = ROW_COST,
    column_cost: float = COLUMN_COST,
) -> Tiling:
    """Return the query and key boxes that make a kernel cheapest, by exact counts.

    queries, keys: allowed numbers of tokens in a tile of queries and in a box of keys, powers of
    two. inverse: tiles of keys and boxes of queries, for the gradients of keys and values.
    least_width: boxes are at least so wide along the last axis, or as wide as the grid. A box of
    m x n costs (m + row_cost) * (n + column_cost), and `mask_cost` times that unless it is full.
    """
    rows, columns = (keys, queries) if inverse else (queries, keys)
    width = min(least_width, window.grid[2])
    best: tuple[float, int, Tiling] | None = None
    for row in (shape for tokens in rows for shape in _shapes(window.grid, tokens)):
        for column in (shape for tokens in columns for shape in _shapes(window.grid, tokens)):
            if column[2] < width:
                continue
            boxes, full = count_boxes(window, row, column, inverse)
            m, n = math.prod(row), math.prod(column)
            # wide heads pay less for a mask: it is work per pair, as large whatever the head
            masked = 1 + (mask_cost - 1) * 128 / max(head_dim, 32)
            cost = (masked * (boxes - full) + full) * (m + row_cost) * (n + column_cost)
            if best is None or (cost, -column[2]) < best[:2]:
                q, kv = (column, row) if inverse else (row, column)
                best = cost, -column[2], Tiling(q, kv, boxes, full, boxes * m * n)
    assert best is not None  # `_shapes` always has one
    return best[2]
