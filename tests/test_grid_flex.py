"""FlexAttention over grid windows: its block lists and masks by brute force, and its results."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from torch import Tensor

from vistoken.kernels import grid_flex, grid_reference
from vistoken.kernels.grid_flex_lists import BLOCK, make_order, raster_lists, tile_lists
from vistoken.kernels.windows import Window, disc_window, neighborhood
from window_cases import draw_inputs, draw_window, worst_error

CPU = torch.device("cpu")
TILES = [None, (1, 8, 16), (2, 2, 4), (4, 4, 2), (1, 1, 16)]


def everything_seen(window: Window, extras: int, globals_: int) -> Tensor:
    """Bool [queries, keys] in raster order with extra keys and global queries."""
    seen = window.visible()
    seen = torch.cat([seen, torch.ones(len(seen), extras, dtype=torch.bool)], 1)
    return torch.cat([seen, torch.ones(globals_, seen.shape[1], dtype=torch.bool)])


def block_kinds(seen: Tensor, rows: Tensor, columns: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Partial and full blocks of seen [queries, keys]; rows and columns say what is no padding."""
    shape = [-(-n // block) for n in seen.shape]
    partial, full = torch.zeros(2, *shape, dtype=torch.bool)
    for i in range(shape[0]):
        for j in range(shape[1]):
            at = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            real = columns[at[1]]
            part = seen[at][rows[at[0]]]
            full[i, j] = bool(part.all()) and bool(real.all()) and len(real) == block
            partial[i, j] = bool(part.any()) and not full[i, j]
    return partial, full


def draw_counts(dice: Random) -> tuple[int, int]:
    return dice.choice((0, 0, 3, 20)), dice.choice((0, 0, 2, 17))


@pytest.mark.parametrize("seed", range(40))
def test_raster_lists(seed: int) -> None:
    dice = Random(seed)
    window, (extras, globals_) = draw_window(dice), draw_counts(dice)
    block = dice.choice((2, 5, 16, BLOCK))
    seen = everything_seen(window, extras, globals_)
    real = [torch.ones(n, dtype=torch.bool) for n in seen.shape]
    expected = block_kinds(seen, *real, block)
    found = raster_lists(window, extras, globals_, block, CPU)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("seed", range(40))
def test_tile_lists(seed: int) -> None:
    dice = Random(seed)
    window, (extras, globals_) = draw_window(dice), draw_counts(dice)
    tile = tuple(dice.choice((1, 2, 3, 4)) for _ in range(3))
    order = make_order(window, extras, globals_, tile, CPU)
    places, tokens = len(order.take), window.tokens
    seen = everything_seen(window, extras, globals_)
    source = [torch.cat([order.take, tokens + torch.arange(more)]) for more in (globals_, extras)]
    real = [torch.zeros(places + more, dtype=torch.bool) for more in (globals_, extras)]
    for part in real:
        part[order.place] = True
        part[places:] = True
    seen = seen[source[0]][:, source[1]] & real[1]
    expected = block_kinds(seen, *real, math.prod(tile))
    found = tile_lists(window, extras, globals_, tile, CPU)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(order.take[order.place], torch.arange(tokens))


@pytest.mark.parametrize("tile", [None, (2, 3, 4)])
@pytest.mark.parametrize("seed", range(15))
def test_mask_of_single_pairs(seed: int, tile: tuple[int, int, int] | None) -> None:
    """What the mask says of real queries, and that padding is never seen."""
    dice = Random(seed)
    window, (extras, globals_) = draw_window(dice), draw_counts(dice)
    order = make_order(window, extras, globals_, tile, CPU)
    place = torch.arange(window.tokens) if order.place is None else order.place
    queries, keys = order.mask.seq_lengths
    zero = torch.tensor(0)
    said = order.mask.mask_mod(zero, zero, torch.arange(queries)[:, None], torch.arange(keys))
    said = said.expand(queries, keys)
    rows = torch.cat([place, torch.arange(queries - globals_, queries)])
    columns = torch.cat([place, torch.arange(keys - extras, keys)])
    assert torch.equal(said[rows][:, columns], everything_seen(window, extras, globals_))
    assert said[rows].sum() == said[rows][:, columns].sum()


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_definition(seed: int) -> None:
    dice = Random(seed)
    dtype, limit = dice.choice(((torch.float32, 2e-6), (torch.float64, 1e-13)))
    inputs = draw_inputs(dice, draw_window(dice), dtype)
    assert grid_flex.why_not(**inputs) is None
    expected = grid_reference.forward(**inputs)
    for tile in (None, dice.choice(TILES)):
        found = grid_flex.forward(**inputs, tile=tile)
        for x, y in zip(found, expected, strict=True):
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                assert (x.shape, x.dtype) == (y.shape, y.dtype)
                assert (x - y).norm() <= limit * y.norm() + 1e-9


def test_inside_compiled_code() -> None:
    """The lists are constants of the compiled graph, which has no break."""
    window = disc_window((9, 20), 4)
    inputs = draw_inputs(Random(2), window, torch.float32, channels=(16,))
    forward = torch.compile(grid_flex.forward, fullgraph=True, backend="aot_eager")
    for x, y in zip(forward(**inputs), grid_flex.forward(**inputs), strict=True):
        assert x is y is None or (x - y).abs().max() < 1e-6


def test_why_not() -> None:
    ((_, window),) = neighborhood((8, 8), 3).groups()
    x = torch.randn(1, 1, 8, 8, 2, 16)
    assert grid_flex.why_not(x, x, x, window, 1.0) is None
    reason = grid_flex.why_not(x.clone().requires_grad_(), x, x, window, 1.0)
    assert reason is not None and "no backward on a CPU" in reason
    with torch.no_grad():
        leaf = x.clone().requires_grad_()
        assert grid_flex.why_not(leaf, x, x, window, 1.0) is None
        assert grid_flex.forward(leaf, x, x, window, 1.0)[0].shape == x.shape
    big = disc_window((512, 512), 4)
    x = torch.empty(1, 1, 512, 512, 2, 1)
    reason = grid_flex.why_not(x, x, x, big, 1.0)
    assert reason is not None and "whole matrix" in reason
    assert "meta" in str(grid_flex.why_not(x.to("meta"), x, x, big, 1.0))
    assert "batch" in str(grid_flex.why_not(x[:0], x[:0], x[:0], big, 1.0))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tile", [None, (1, 8, 16)])
@torch.no_grad()
def test_compiled(seed: int, tile: tuple[int, int, int] | None) -> None:
    dice = Random(seed)
    window = dice.choice([disc_window((24, 40), 7), draw_window(dice)])
    inputs = draw_inputs(dice, window, torch.float32, channels=(16, 40))
    inputs = {n: x.cuda() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    names = ("out", "lse", "global_out", "global_lse")
    found, expected = (
        {n: x for n, x in zip(names, results, strict=True) if x is not None}
        for results in (
            grid_flex.forward(**inputs, tile=tile),
            grid_reference.forward(**inputs),
        )
    )
    assert worst_error(found, expected) < 5e-3
