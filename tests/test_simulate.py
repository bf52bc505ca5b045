"""The simulator against brute force, the published bounds, and what the kernels loop over."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
import torch
from torch import Tensor

from vistoken.errors import MethodError
from vistoken.kernels.simulate import simulate
from vistoken.kernels.tile_advice import own_tiles, rank_strides, rank_tiles, rank_windows
from vistoken.kernels.tiling import choose_tiles, count_boxes
from vistoken.kernels.windows import Neighborhood, Window, disc_window, neighborhood

HUNYUAN = ((30, 48, 80), (18, 24, 24))
COSMOS = ((16, 44, 80), (16, 24, 16))
FLUX = ((256, 256), (80, 80))

# grid, window, stride, query tile, key tile, published bound
PUBLISHED = {
    "hunyuan": (*HUNYUAN, 1, (4, 8, 8), (2, 8, 8), 3.27),
    "cosmos": (*COSMOS, 1, (8, 4, 8), (4, 4, 8), 5.24),
    "flux": (*FLUX, 1, (16, 16), (16, 8), 6.10),
    "hunyuan, strided": (*HUNYUAN, (16, 8, 8), (4, 8, 8), (2, 8, 8), 11.11),
    "cosmos, strided": (*COSMOS, (1, 8, 16), (8, 4, 8), (4, 4, 8), 9.17),
    "flux, strided": (*FLUX, 16, (16, 16), (16, 8), 10.24),
}


@pytest.mark.parametrize("case", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_bounds(case: tuple) -> None:
    grid, size, stride, q_tile, kv_tile, bound = case
    found = simulate(neighborhood(grid, size, stride), q_tile, kv_tile)
    assert round(found.interior_bound, 2) == bound
    strided = stride != 1
    assert found.block_sparse == strided
    assert (found.full_share == 1.0) == strided
    assert (round(found.exact_bound, 2) > bound) != strided


@pytest.mark.parametrize(
    ("grid", "size", "tile", "share"),
    [
        (*HUNYUAN, (2, 8, 8), 0.17),
        (*COSMOS, (4, 4, 8), 0.37),
        (*FLUX, (16, 8), 0.50),
        ((32768,), (2048,), (128,), 0.89),
    ],
)
def test_share_of_tiles_without_mask(grid: tuple, size: tuple, tile: tuple, share: float) -> None:
    assert round(simulate(neighborhood(grid, size), tile, tile).full_share, 2) == share


# --- by brute force -------------------------------------------------------------------------------


def tile_of(grid: tuple[int, ...], tile: tuple[int, ...]) -> tuple[Tensor, int]:
    """The number of each token's tile, row-major, and how many tiles there are."""
    counts = [-(-length // side) for length, side in zip(grid, tile, strict=True)]
    number = torch.zeros(grid, dtype=torch.int64)
    for token in product(*map(range, grid)):
        place = 0
        for x, side, count in zip(token, tile, counts, strict=True):
            place = place * count + x // side
        number[token] = place
    return number.flatten(), math.prod(counts)


def brute(window: Window, q_tile: tuple, kv_tile: tuple) -> dict[str, int]:
    """Counts of a window from the whole matrix of what sees what."""
    visible = window.visible().long()
    (q_of, q_tiles), (kv_of, kv_tiles) = (tile_of(window.grid, t) for t in (q_tile, kv_tile))
    pairs = torch.zeros(q_tiles, kv_tiles, dtype=torch.int64)
    pairs.index_put_((q_of[:, None], kv_of[None]), visible, accumulate=True)
    queries = torch.bincount(q_of, minlength=q_tiles)
    whole = queries[:, None] * math.prod(kv_tile)  # a key tile that leaves the grid is never full
    touched = pairs > 0
    return {
        "pairs": int(visible.sum()),
        "q_tiles": q_tiles,
        "kv_tiles": kv_tiles,
        "touched": int(touched.sum()),
        "interior": int(touched.sum(1).max()) * q_tiles,
        "full": int((pairs == whole).sum()),
    }


def draw_case(rng: random.Random) -> tuple[Neighborhood | Window, tuple, tuple]:
    """A small neighborhood, or a disc, and two tiles."""
    rank = rng.randint(1, 3)
    grid = tuple(rng.randint(1, 60 if rank == 1 else 9) for _ in range(rank))
    if rank == 2 and rng.random() < 0.4:
        where: Neighborhood | Window = disc_window(grid, rng.randint(1, 7))
    else:
        dilation = [rng.choice([1, 1, 2, 3]) for _ in grid]
        dilation = [min(d, length) for d, length in zip(dilation, grid, strict=True)]
        size = [rng.randint(1, length // d) for length, d in zip(grid, dilation, strict=True)]
        stride = [rng.randint(1, k) for k in size]
        causal = [rng.random() < 0.25 for _ in grid]
        where = neighborhood(grid, size, stride, dilation, causal)
    tiles = [tuple(rng.choice([1, 2, 3, 4, 8]) for _ in where.grid) for _ in range(2)]
    return where, tiles[0], tiles[1]


@pytest.mark.parametrize("seed", range(120))
def test_counts_are_those_of_brute_force(seed: int) -> None:
    where, q_tile, kv_tile = draw_case(random.Random(seed))
    found = simulate(where, q_tile, kv_tile)
    lead = (1,) * (3 - len(q_tile))
    windows = [where] if isinstance(where, Window) else [window for _, window in where.groups()]
    expected = [brute(window, lead + q_tile, lead + kv_tile) for window in windows]
    for name in expected[0]:
        assert getattr(found, name) == sum(one[name] for one in expected), name
    assert found.tokens == math.prod(where.grid)


@pytest.mark.parametrize("seed", range(60))
def test_tiles_at_the_window_are_those_of_the_kernels(seed: int) -> None:
    where, q_tile, kv_tile = draw_case(random.Random(1000 + seed))
    found = simulate(where, q_tile, kv_tile, aligned=False)
    lead = (1,) * (3 - len(q_tile))
    windows = [where] if isinstance(where, Window) else [window for _, window in where.groups()]
    counted = [count_boxes(window, lead + q_tile, lead + kv_tile) for window in windows]  # type: ignore[arg-type]
    assert (found.touched, found.full) == tuple(map(sum, zip(*counted, strict=True)))
    assert found.pairs == sum(int(window.visible().sum()) for window in windows)
    assert found.touched <= simulate(where, q_tile, kv_tile).touched
    assert found.permute_bytes(heads=8) == 0


def test_own_tiles_are_what_a_kernel_loops_over() -> None:
    """The lists of boxes that the Triton kernels read, added up over all programs."""
    from vistoken.kernels.grid_plan import plan

    where = neighborhood((6, 20, 36), (3, 7, 9), (1, 2, 3))
    window = next(where.groups())[1]
    tiling = choose_tiles(window, 64)
    tables = plan(window, tiling.q, tiling.kv, False, torch.device("cpu"))
    kinds = torch.tensor_split(tables.tiles[:, 1], tables.counts[:1] + (sum(tables.counts[:2]),))
    masked = full = 0
    for a, b, c in product(*(kind.tolist() for kind in kinds)):
        group = (a * tables.kinds[1] + b) * tables.kinds[2] + c
        _, some, whole = tables.groups[group].tolist()
        masked, full = masked + some, full + whole
    found = own_tiles(where, 64)
    assert (found.q_tile, found.kv_tile) == (tiling.q, tiling.kv)
    assert (found.touched, found.full) == (masked + full, full)


# --- what is derived ------------------------------------------------------------------------------


def test_work_and_bytes() -> None:
    found = simulate(neighborhood((10, 12), (4, 5)), (4, 8), (2, 4))
    assert (found.q_padded, found.kv_padded) == (12 * 16, 10 * 12)
    assert found.padding == pytest.approx(192 / 120 - 1)
    assert found.share == pytest.approx(found.touched * 32 * 8 / 120**2)
    assert found.overhead == pytest.approx(found.touched * 32 * 8 / (120 * 20))
    assert found.visible_bound == pytest.approx(120 / 20)
    q_side = (120 + 192) * 6 * (16 + 8)
    kv_side = (120 + 120) * 2 * (16 + 8)
    moved = found.permute_bytes(batch=3, heads=6, kv_heads=2, dim=16, value_dim=8, itemsize=4)
    assert moved == 3 * 4 * (q_side + kv_side)
    assert found.weighted_share(1.0) == pytest.approx(found.share)
    assert found.weighted_share(2.0) > found.share


@pytest.mark.parametrize(
    ("size", "stride", "tile", "clean"),
    [
        (80, 16, 16, True),
        (80, 16, 8, True),
        (80, 16, 32, False),  # the tile holds two stride groups
        (64, 16, 16, False),  # an even multiple: half a stride off the tiles
        (48, 16, 16, True),
        (256, 1, 16, True),
        (80, 1, 16, False),
    ],
)
def test_which_windows_are_block_sparse(size: int, stride: int, tile: int, clean: bool) -> None:
    found = simulate(neighborhood((256,), size, stride), (tile,), (16,))
    assert found.block_sparse == clean
    assert clean <= (found.touched == found.full)


def test_keys_beyond_the_grid_do_not_count_as_a_mask_of_the_window() -> None:
    found = simulate(neighborhood((100,), 100), (16,), (16,))
    assert found.block_sparse and found.full < found.touched


def test_bad_tiles() -> None:
    where = neighborhood((8, 8), 3)
    with pytest.raises(MethodError, match="q_tile must have one length .* 2 axes"):
        simulate(where, (4,), (4, 4))
    with pytest.raises(MethodError, match="kv_tile"):
        simulate(where, (4, 4), (4, 0))
    for rank in (rank_tiles, rank_strides, rank_windows):
        with pytest.raises(MethodError, match="top"):
            rank(where, top=0)


# --- advice ---------------------------------------------------------------------------------------


def test_best_tiles_come_first() -> None:
    where = neighborhood(*HUNYUAN)
    found = rank_tiles(where, top=1000)
    costs = [one.weighted_share(1.5) for one in found]
    assert costs == sorted(costs) and len(found) > 100
    assert all(math.prod(one.q_tile) == 128 and one.kv_tile[-1] >= 8 for one in found)
    assert costs[0] < simulate(where, (4, 4, 8), (4, 4, 8)).weighted_share(1.5)


def test_tiny_grids_have_tiles_too() -> None:
    (found, *_) = rank_tiles(neighborhood((2, 3, 5), (2, 3, 3)))
    assert math.prod(found.q_tile) == 128 and found.q_tiles == 1


def test_strides_that_gain_nothing_are_left_out() -> None:
    found = rank_strides(neighborhood(*HUNYUAN), top=100)
    assert found[0].stride == (2, 8, 8) and found[0].tiles.block_sparse
    for better, worse in ((a, b) for i, b in enumerate(found) for a in found[:i]):
        assert any(x > y for x, y in zip(better.stride, worse.stride, strict=True))


def test_windows_need_no_mask_and_are_alike() -> None:
    where = neighborhood((256, 256), (75, 90))
    found = rank_windows(where, reach=0.25)
    assert found and all(one.tiles.block_sparse for one in found)
    for one in found:
        assert abs(math.prod(one.kernel_size) / (75 * 90) - 1) <= 0.25
        pairs = zip(one.kernel_size, one.stride, strict=True)
        assert all(size // stride % 2 == 1 and size % stride == 0 for size, stride in pairs)
