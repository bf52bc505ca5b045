"""How windows are cut into tiles: counts, boxes and lists against brute force over every pair."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
import torch
from torch import Tensor

from vistoken.kernels.grid_plan import OPEN, plan
from vistoken.kernels.tiling import Box, axis_tiles, bounds, choose_tiles, count_boxes, without_disc
from vistoken.kernels.windows import Axis, Window, disc_window, neighborhood

CPU = torch.device("cpu")


def axes(most: int) -> list[Axis]:
    """Every axis of up to `most` tokens."""
    return [
        Axis(length, kernel, stride, causal)
        for length in range(1, most + 1)
        for kernel in range(1, length + 1)
        for stride in range(1, kernel + 1)
        for causal in (False, True)
    ]


def draws(count: int, seed: int) -> list[tuple[Window, Box, Box]]:
    """Windows of small grids, with shapes of tiles and boxes."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        rows, columns = (
            (draw.choice((1, 2)), draw.choice((1, 2, 4)), draw.choice((1, 2, 4, 8)))
            for _ in range(2)
        )
        if draw.random() < 0.35:
            grid = (draw.randint(1, 12), draw.randint(1, 14))
            found.append((disc_window(grid, draw.randint(1, 9)), (1, *rows[1:]), (1, *columns[1:])))
            continue
        grid = tuple(draw.randint(1, most) for most in (4, 6, 10))
        kernel = tuple(draw.randint(1, length) for length in grid)
        stride = tuple(draw.randint(1, k) for k in kernel)
        causal = tuple(draw.random() < 0.3 for _ in grid)
        where = neighborhood(grid, kernel, stride, 1, causal)
        found.append((next(where.groups())[1], rows, columns))
    return found


# --- one axis ------------------------------------------------------------------------------------


def test_bounds_equal_the_definition() -> None:
    for axis in [*axes(9), *(Axis(n, n, radius=r) for n in range(1, 10) for r in range(1, 12))]:
        lo, hi = bounds(axis)
        assert list(zip(lo, hi, strict=True)) == [
            (axis.lo(x), axis.hi(x)) for x in range(axis.length)
        ]
        since, until = bounds(axis, inverse=True)
        for y in range(axis.length):
            seen_by = [x for x in range(axis.length) if axis.lo(x) <= y < axis.hi(x)]
            assert list(range(since[y], until[y])) == seen_by
            assert (since[y], until[y]) == axis.seen_by(y, y)


@pytest.mark.parametrize("inverse", [False, True])
def test_axis_tiles_cover_what_rows_see_with_fewest_boxes(inverse: bool) -> None:
    for axis, rows, columns in product(axes(9), (1, 2, 4), (1, 2, 4)):
        lo, hi = bounds(axis, inverse)
        for i, tile in enumerate(axis_tiles(axis, rows, columns, inverse)):
            members = range(i * rows, min(i * rows + rows, axis.length))
            seen = {y for x in members for y in range(lo[x], hi[x])}
            covered = range(tile.start, tile.start + tile.boxes * columns)
            assert seen <= set(covered)
            span = max(seen) - min(seen) + 1 if seen else 0
            assert tile.boxes == math.ceil(span / columns)
            for box in range(tile.boxes):
                begin = tile.start + box * columns
                shared = all(lo[x] <= begin and begin + columns <= hi[x] for x in members)
                assert shared == (tile.full_first <= box < tile.full_first + tile.full)


def test_boxes_move_back_to_be_full() -> None:
    axis = Axis(256, 79)
    tile = axis_tiles(axis, 8, 8)[16]
    # 86 columns in 11 boxes, of which 72 are shared: one column back, 9 boxes of them are full
    assert (tile.boxes, tile.full_first, tile.full) == (11, 1, 9)
    assert tile.start == axis.lo(128) - 1


# --- a window ------------------------------------------------------------------------------------


def pairs(window: Window, inverse: bool) -> Tensor:
    """Which pairs of a row and a column are visible, bool [*grid, *grid]."""
    visible = window.visible()
    return (visible.T if inverse else visible).reshape(*window.grid, *window.grid)


def boxes_of(window: Window, rows: Box, columns: Box, inverse: bool):  # type: ignore[no-untyped-def]
    """(tile, whether it is full, first column) of each box, as a kernel finds it in the tables."""
    tables = plan(window, rows, columns, inverse, CPU)
    tiles = tables.tiles.tolist()
    h, w = tables.counts[1:]
    for t_i, h_i, w_i in product(*map(range, tables.counts)):
        along = (
            tiles[t_i],
            tiles[tables.counts[0] + h_i],
            tiles[tables.counts[0] + h + w_i],
        )
        group = (along[0][1] * tables.kinds[1] + along[1][1]) * tables.kinds[2] + along[2][1]
        first, masked, full = tables.groups[group].tolist()
        for i, entry in enumerate(tables.lists[first : first + masked + full].tolist()):
            high, low = tables.shifts
            box = (
                entry >> high,
                (entry >> low) & ((1 << (high - low)) - 1),
                entry & ((1 << low) - 1),
            )
            start = tuple(a[0] + b * c for a, b, c in zip(along, box, columns, strict=True))
            yield (t_i, h_i, w_i), i >= masked, start


def cut(first: Box, box: Box, grid: Box) -> tuple[slice, ...]:
    return tuple(
        slice(max(a, 0), max(min(a + b, c), 0)) for a, b, c in zip(first, box, grid, strict=True)
    )


@pytest.mark.parametrize("inverse", [False, True])
def test_lists_hold_every_visible_pair_once_and_full_boxes_are_full(inverse: bool) -> None:
    for window, rows, columns in draws(60, seed=1):
        visible = pairs(window, inverse)
        times = torch.zeros_like(visible, dtype=torch.int32)
        counted = [0, 0]
        for tile, full, start in boxes_of(window, rows, columns, inverse):
            first = tuple(i * r for i, r in zip(tile, rows, strict=True))
            where = *cut(first, rows, window.grid), *cut(start, columns, window.grid)
            whole = visible[where].numel() > 0 and bool(visible[where].all())
            inside = all(
                a >= 0 and a + b <= c for a, b, c in zip(start, columns, window.grid, strict=True)
            )
            assert full == (whole and inside)
            times[where] += 1
            counted[0] += 1
            counted[1] += full
        assert (times[visible] == 1).all() and times.max() <= 1
        assert tuple(counted) == count_boxes(window, rows, columns, inverse)


def test_an_open_axis_has_no_column_outside() -> None:
    for window, rows, columns in draws(60, seed=2):
        hidden = plan(window, rows, columns, False, CPU).hidden
        for _, _, start in boxes_of(window, rows, columns, False):
            for how, a, b, c in zip(hidden, start, columns, window.grid, strict=True):
                assert how != OPEN or 0 <= a <= a + b <= c


def test_the_choice_is_the_cheapest_shape() -> None:
    window = next(neighborhood((6, 10, 20), (3, 4, 7)).groups())[1]
    chosen = choose_tiles(window, 128, (64,), (32,), row_cost=0, column_cost=0, mask_cost=1)
    assert (chosen.queries, chosen.keys) == (64, 32)
    counted = count_boxes(window, chosen.q, chosen.kv)
    assert (chosen.boxes, chosen.full) == counted and chosen.touched == counted[0] * 64 * 32
    sides = [1, 2, 4, 8, 16, 32]
    q_shapes = [(a, b, c) for a, b, c in product(sides[:4], sides[:5], sides) if a * b * c == 64]
    kv_shapes = [(a, b, c) for a, b, c in product(sides[:4], sides[:5], sides) if a * b * c == 32]
    assert chosen.boxes == min(
        count_boxes(window, q, kv)[0] for q, kv in product(q_shapes, kv_shapes)
    )


@pytest.mark.parametrize(
    ("grid", "kernel", "stride", "q", "kv", "boxes"),
    [
        # the theoretical speed-up limits of two strided windows that were published with NATTEN
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), (2, 8, 8), 900 * 81),
        ((256, 256), (80, 80), (16, 16), (1, 16, 8), (1, 16, 8), 512 * 50),
    ],
)
def test_strided_windows_fall_on_whole_tiles(
    grid: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...],
    q: Box, kv: Box, boxes: int,
) -> None:  # fmt: skip
    window = next(neighborhood(grid, kernel, stride).groups())[1]
    assert count_boxes(window, q, kv) == (boxes, boxes)


def test_a_small_grid_and_a_wide_box() -> None:
    tiles = choose_tiles(next(neighborhood((3, 2), 2).groups())[1], 64, (64,), (32,))
    assert (tiles.queries, tiles.keys) == (64, 32) and tiles.boxes == 1
    wide = choose_tiles(
        next(neighborhood((64, 64), 7).groups())[1], 64, (64,), (64,), least_width=32
    )
    assert wide.kv[2] >= 32


def test_a_disc_that_holds_the_grid_is_no_disc() -> None:
    assert without_disc(disc_window((3, 4), 9)).radius == 0
    assert without_disc(disc_window((3, 4), 3)).radius == 3
    assert without_disc(disc_window((3, 4), 9)).visible().all()
