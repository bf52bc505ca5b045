"""What tiles cost on a grid with windows, counted without a device: an open NATTENSim.

A kernel works on pairs of a query tile and a key tile. How many pairs a window touches bounds how
much faster than dense attention it can be (Hassani et al., "Generalized Neighborhood Attention",
arXiv 2504.16922, report such bounds); how many of them lie wholly inside the windows says how much
of the work needs no mask.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from vistoken.errors import MethodError
from vistoken.kernels.tiling import AxisTile, axis_tiles
from vistoken.kernels.windows import Axis, Neighborhood, Window

# (near, far, inside) of a key tile: squared distances to a query tile, and inside of the axis
_Reach = tuple[int, int, bool]


@dataclass(frozen=True)
class Simulation:
    """Pairs of a query tile and a key tile that attention over windows works on.

    q_tile, kv_tile: tokens of a tile along each axis. aligned: key tiles begin at multiples of
    their length, as after a permutation of tokens; else they lie where the windows of the query
    tile need them, as those of the Triton kernels do. pairs: queries times the keys that they see.
    q_tiles, kv_tiles: tiles of the grid; touched: pairs of them with a visible key; interior: the
    same if every query tile cost what the dearest does; full: touched pairs in which every query
    sees every key, so that no mask is needed. block_sparse: all of them are, but for keys beyond
    the grid. q_padded, kv_padded: tokens after padding to tiles.
    """

    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    aligned: bool
    tokens: int
    pairs: int
    q_tiles: int
    kv_tiles: int
    touched: int
    interior: int
    full: int
    block_sparse: bool
    q_padded: int
    kv_padded: int

    @property
    def exact_bound(self) -> float:
        """All pairs of tiles over the touched ones: the speed-up over dense attention at most."""
        return self.q_tiles * self.kv_tiles / self.touched

    @property
    def interior_bound(self) -> float:
        """The same with every query tile charged what the dearest costs; published bounds are."""
        return self.q_tiles * self.kv_tiles / self.interior

    @property
    def share(self) -> float:
        """Work on the touched pairs, padding included, as a share of dense attention's work."""
        return self.touched * self._tile_pairs / self.tokens**2

    @property
    def visible_bound(self) -> float:
        """How many times as few (query, key) pairs there are as in dense attention."""
        return self.tokens**2 / self.pairs

    @property
    def full_share(self) -> float:
        """Share of the touched pairs that need no mask."""
        return self.full / self.touched

    @property
    def overhead(self) -> float:
        """Work on the touched pairs over that on the visible keys alone: at least 1."""
        return self.touched * self._tile_pairs / self.pairs

    @property
    def padding(self) -> float:
        """Tokens that padding to query tiles adds, as a share of the grid's."""
        return self.q_padded / self.tokens - 1.0

    def weighted_share(self, mask_cost: float) -> float:
        """Return `share` with a pair that needs a mask counted as `mask_cost` pairs."""
        masked = self.touched - self.full
        return (self.full + mask_cost * masked) * self._tile_pairs / self.tokens**2

    def permute_bytes(
        self,
        *,
        batch: int = 1,
        heads: int = 1,
        kv_heads: int | None = None,
        dim: int = 128,
        value_dim: int | None = None,
        itemsize: int = 2,
    ) -> int:
        """Return the bytes that sorting tokens into tiles moves: Q, K, V in, the output back.

        Reads and writes, padding included; 0 where key tiles begin at the windows (not `aligned`),
        which needs no sorting.
        """
        if not self.aligned:
            return 0
        out_dim = dim if value_dim is None else value_dim
        q_side = (self.tokens + self.q_padded) * heads * (dim + out_dim)
        kv_heads = heads if kv_heads is None else kv_heads
        kv_side = (self.tokens + self.kv_padded) * kv_heads * (dim + out_dim)
        return batch * (q_side + kv_side) * itemsize

    @property
    def _tile_pairs(self) -> int:
        return math.prod(self.q_tile) * math.prod(self.kv_tile)


def simulate(
    where: Neighborhood | Window,
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    *,
    aligned: bool = True,
) -> Simulation:
    """Count the pairs of tiles that attention over a neighborhood or a `Window` works on.

    q_tile, kv_tile: tokens along each axis of the grid (of a `Window`, of its three axes). Raises
    `MethodError` for tiles that do not fit the number of axes.
    """
    rank = len(where.grid)
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        if len(tile) != rank or min(tile) < 1:
            raise MethodError(
                f"{name} must have one length of at least 1 for each of the {rank} axes, "
                f"got {tuple(tile)}."
            )
    q_sides, kv_sides = ((1,) * (3 - rank) + tuple(tile) for tile in (q_tile, kv_tile))
    total = Counter[str]()
    block_sparse = True
    for window, times in _windows(where):
        counts, clean = _count(window, q_sides, kv_sides, aligned)
        block_sparse &= clean
        for name, value in counts.items():
            total[name] += times * value
    return Simulation(
        tuple(q_tile), tuple(kv_tile), aligned, math.prod(where.grid),
        block_sparse=block_sparse, **total,
    )  # fmt: skip


def _windows(where: Neighborhood | Window) -> Iterator[tuple[Window, int]]:
    """The different windows of the dilation groups, and how many groups have each."""
    if isinstance(where, Window):
        yield where, 1
    else:
        yield from Counter(window for _, window in where.groups()).items()


def _count(
    window: Window, q_tile: Sequence[int], kv_tile: Sequence[int], aligned: bool
) -> tuple[dict[str, int], bool]:
    """The numbers of a `Simulation` for one window, and whether it is block-sparse."""
    of_axes = [
        _count_axis(axis, q, kv, aligned)
        for axis, q, kv in zip(window.axes, q_tile, kv_tile, strict=True)
    ]
    counts = {name: math.prod(one[name] for one in of_axes) for name in of_axes[0]}
    clean = bool(counts.pop("clean"))
    if window.radius:
        disc = _count_disc(window, tuple(q_tile), tuple(kv_tile), aligned)
        boxes = [one for axis, one in zip(window.axes, of_axes, strict=True) if not axis.radius]
        for name, value in disc.items():
            counts[name] = value * math.prod(one[name] for one in boxes)
        clean = counts["full"] == counts["touched"]
    return counts, clean


@lru_cache(maxsize=4096)
def _boxes(axis: Axis, q_tile: int, kv_tile: int, aligned: bool) -> tuple[AxisTile, ...]:
    """The key tiles that each query tile of an axis touches."""
    if not aligned:
        return axis_tiles(axis, q_tile, kv_tile)
    found = []
    for first, last in _tiles(axis.length, q_tile):
        lo, hi = axis.span(first, last)
        begin, end = axis.shared(first, last)
        start = lo // kv_tile
        since = _ceil(begin, kv_tile) - start
        full = 0 if axis.radius else max(end // kv_tile - start - since, 0)
        found.append(AxisTile(start * kv_tile, _ceil(hi, kv_tile) - start, since, full))
    return tuple(found)


@lru_cache(maxsize=4096)
def _count_axis(axis: Axis, q_tile: int, kv_tile: int, aligned: bool) -> dict[str, int]:
    """The numbers of one axis; those of a box window are their products over the axes."""
    tiles = _boxes(axis, q_tile, kv_tile, aligned)
    clean = True
    for (first, last), tile in zip(_tiles(axis.length, q_tile), tiles, strict=True):
        lo, hi = axis.span(first, last)
        ends = tile.start + tile.boxes * kv_tile == hi or hi == axis.length
        clean &= axis.shared(first, last) == (lo, hi) and tile.start == lo and ends
    return {
        "pairs": sum(axis.hi(x) - axis.lo(x) for x in range(axis.length)),
        "q_tiles": len(tiles),
        "kv_tiles": _ceil(axis.length, kv_tile),
        "touched": sum(tile.boxes for tile in tiles),
        "interior": max(tile.boxes for tile in tiles) * len(tiles),
        "full": sum(tile.full for tile in tiles),
        "clean": clean,
        "q_padded": len(tiles) * q_tile,
        "kv_padded": _ceil(axis.length, kv_tile) * kv_tile,
    }


def _tiles(length: int, side: int) -> Iterator[tuple[int, int]]:
    """The first and the last token of every tile of an axis; the last tile is cut at the end."""
    for first in range(0, length, side):
        yield first, min(first + side, length) - 1


def _ceil(value: int, step: int) -> int:
    return -(-value // step)


# --- discs: the axes with a radius are coupled by the distance ------------------------------------


@lru_cache(maxsize=1024)
def _count_disc(
    window: Window, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], aligned: bool
) -> dict[str, int]:
    """The numbers that a disc changes, over the axes with a radius.

    Query tiles with the same distances to their key tiles count once, times their number.
    """
    limit = window.radius**2
    tiles = [
        _reaches(axis, q, kv, aligned)
        for axis, q, kv in zip(window.axes, q_tile, kv_tile, strict=True)
        if axis.radius
    ]
    per_tile = list(_combine(tiles, limit))
    return {
        "pairs": _disc_pairs(window),
        "touched": sum(touched * times for touched, _, times in per_tile),
        "interior": max(touched for touched, *_ in per_tile) * sum(t for *_, t in per_tile),
        "full": sum(full * times for _, full, times in per_tile),
    }


@lru_cache(maxsize=64)
def _disc_pairs(window: Window) -> int:
    """Pairs of tokens within the radius, over the axes that have one."""
    tokens = [_reaches(axis, 1, 1, True) for axis in window.axes if axis.radius]
    return sum(touched * times for touched, _, times in _combine(tokens, window.radius**2))


def _reaches(axis: Axis, q_tile: int, kv_tile: int, aligned: bool) -> Counter[tuple[_Reach, ...]]:
    """For each query tile of an axis its key tiles; query tiles with equal ones count together."""
    found = Counter[tuple[_Reach, ...]]()
    tiles = _boxes(axis, q_tile, kv_tile, aligned)
    for (first, last), tile in zip(_tiles(axis.length, q_tile), tiles, strict=True):
        row = []
        for begin in range(tile.start, tile.start + tile.boxes * kv_tile, kv_tile):
            end = begin + kv_tile - 1
            near = max(begin - last, first - min(end, axis.length - 1), 0)
            far = max(last - begin, end - first)
            row.append((near**2, far**2, begin >= 0 and end < axis.length))
        found[tuple(sorted(row))] += 1
    return found


def _combine(
    axes: Sequence[Counter[tuple[_Reach, ...]]], limit: int
) -> Iterator[tuple[int, int, int]]:
    """(touched, full, times) of the kinds of query tiles, over all axes with a radius."""
    kinds: dict[tuple[_Reach, ...], int] = {((0, 0, True),): 1}
    for axis in axes[:-1]:
        kinds = {
            tuple((n + m, f + g, a and b) for n, f, a in left for m, g, b in right): x * y
            for left, x in kinds.items()
            for right, y in axis.items()
        }
    for left, x in kinds.items():
        for right, y in axes[-1].items():
            touched = sum(n + m < limit for n, *_ in left for m, *_ in right)
            full = sum(f + g < limit and a and b for _, f, a in left for _, g, b in right)
            yield touched, full, x * y
