"""Which tiles, strides and windows let attention over windows come near its bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from vistoken.errors import MethodError
from vistoken.kernels.simulate import Simulation, simulate
from vistoken.kernels.tiling import choose_tiles
from vistoken.kernels.windows import Neighborhood, Window

# A masked pair of tiles against an unmasked one. On an H100, published times of windows that mask
# every tile lie 43 to 66 % above those of strided windows, which need no mask, for as many tiles.
MASK_COST = 1.5
# Key tiles are read in rows along the last axis; rows of fewer tokens load slowly.
SHORTEST_ROW = 8


@dataclass(frozen=True)
class Choice:
    """A window, its stride, and the tiles that suit them best.

    Another window or stride than a model was trained with is another attention.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    tiles: Simulation


def rank_tiles(
    where: Neighborhood | Window,
    *,
    q_tokens: Sequence[int] = (128,),
    kv_tokens: Sequence[int] = (64, 128),
    mask_cost: float = MASK_COST,
    top: int = 5,
) -> list[Simulation]:
    """Return the cheapest aligned tiles, the best first; they do not change the result.

    q_tokens, kv_tokens: tokens of a tile, powers of two. Cheap means little work on touched pairs
    of tiles, those that need a mask counted `mask_cost` times, padding included.
    """
    _check_top(top)
    grid = _group_grid(where)
    row = min(SHORTEST_ROW, grid[-1])
    keys = [tile for tokens in kv_tokens for tile in tile_shapes(grid, tokens)]
    found = [
        simulate(where, q_tile, kv_tile)
        for tokens in q_tokens
        for q_tile in tile_shapes(grid, tokens)
        for kv_tile in keys
        if kv_tile[-1] >= row
    ]
    return sorted(found, key=lambda one: one.weighted_share(mask_cost))[:top]


def own_tiles(where: Neighborhood | Window, head_dim: int) -> Simulation:
    """Return what the tiles cost that the Triton kernels choose for a window and a head dim.

    Of a dilated neighborhood they choose for each group; the tiles are those of the first, the
    largest.
    """
    window = where if isinstance(where, Window) else next(where.groups())[1]
    chosen = choose_tiles(window, head_dim)
    rank = len(where.grid)
    return simulate(where, chosen.q[3 - rank :], chosen.kv[3 - rank :], aligned=False)


@lru_cache(maxsize=256)
def tile_shapes(grid: tuple[int, ...], tokens: int) -> tuple[tuple[int, ...], ...]:
    """Return the boxes of `tokens` tokens whose sides are powers of two that fit the grid.

    On a grid of fewer tokens the last axis takes what is left.
    """
    longest = [1 << (length - 1).bit_length() for length in grid]
    if math.prod(longest) <= tokens:
        return ((*longest[:-1], tokens // math.prod(longest[:-1])),)
    sides = [[1 << i for i in range(side.bit_length())] for side in longest]
    return tuple(tile for tile in product(*sides) if math.prod(tile) == tokens)


def rank_strides(where: Neighborhood, *, top: int = 5) -> list[Choice]:
    """Return the strides that suit the window best, each with its best tiles, the best first.

    Strides are powers of two, or as long as the window. A stride of s lets s neighboring queries
    share a window, so that tiles as long need no mask. A larger one that gains nothing is left out.
    """
    _check_top(top)
    sides = [sorted({1, size, *_powers(size)}) for size in where.kernel_size]
    every = _best(replace(where, stride=stride) for stride in product(*sides))
    found: list[Choice] = []
    for one in every:
        smaller = (
            other
            for other in found
            if all(a <= b for a, b in zip(other.stride, one.stride, strict=True))
        )
        if not any(True for _ in smaller):
            found.append(one)
    return found[:top]


def rank_windows(where: Neighborhood, *, reach: float = 0.5, top: int = 5) -> list[Choice]:
    """Return windows like the given one that need no mask under some stride, the best first.

    Along each axis the window is as long as the grid, or an odd multiple of the stride, a power of
    two: only then do the borders of strided windows lie on those of tiles. The windows hold at
    least 1 - `reach` and at most 1 + `reach` times as many keys as the one given; best are those
    that cost least for a key.
    """
    _check_top(top)
    sides = [
        list(_steps(length // d, size))
        for length, d, size in zip(where.grid, where.dilation, where.kernel_size, strict=True)
    ]
    keys = math.prod(where.kernel_size)
    others = []
    for combination in product(*sides):
        sizes, strides = zip(*combination, strict=True)
        if abs(math.prod(sizes) / keys - 1.0) <= reach:
            others.append(replace(where, kernel_size=sizes, stride=strides))
    clean = [one for one in _best(others) if one.tiles.block_sparse]
    return sorted(clean, key=lambda one: (one.tiles.overhead, -_alike(one, where)))[:top]


def _check_top(top: int) -> None:
    if top < 1:
        raise MethodError(f"top must be at least 1, got {top}.")


def _steps(length: int, size: int) -> Iterator[tuple[int, int]]:
    """(window, stride) along one axis: the whole axis, and for each stride two odd multiples."""
    if size == length:
        yield length, 1
        return
    for stride in _powers(size):
        below = (size // stride - 1) // 2 * 2 + 1
        for multiple in (below, below + 2):
            if stride > 1 and multiple * stride <= length:
                yield multiple * stride, stride


def _best(candidates: Iterable[Neighborhood]) -> list[Choice]:
    """The candidates with their best tiles among a few good shapes, the cheapest first."""
    found = []
    for one in candidates:
        grid = _group_grid(one)
        shapes = [tile for tile in tile_shapes(grid, 128) if _compact(tile, grid)]
        tiles = min(
            (simulate(one, q_tile, kv_tile) for q_tile, kv_tile in product(shapes, shapes)),
            key=lambda tiles: tiles.weighted_share(MASK_COST),
        )
        found.append(Choice(one.kernel_size, one.stride, tiles))
    found.sort(key=lambda one: (one.tiles.weighted_share(MASK_COST), math.prod(one.stride)))
    return found


def _compact(tile: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """Whether no side is longer than 8 times another one that the grid does not limit."""
    free = [side for side, length in zip(tile, grid, strict=True) if length > 2]
    return len(free) < 2 or max(free) <= 8 * min(free)


def _alike(choice: Choice, where: Neighborhood) -> float:
    """How close a window is to the given one: 1 for the same length along every axis."""
    pairs = zip(choice.kernel_size, where.kernel_size, strict=True)
    return math.prod(min(a, b) / max(a, b) for a, b in pairs)


def _powers(limit: int) -> list[int]:
    return [1 << i for i in range(limit.bit_length())]


def _group_grid(where: Neighborhood | Window) -> tuple[int, ...]:
    """The grid of the first dilation group, which is the largest."""
    if isinstance(where, Window):
        return where.grid
    return tuple(-(-length // d) for length, d in zip(where.grid, where.dilation, strict=True))
