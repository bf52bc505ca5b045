"""Patterns: visible pairs by hand, and block lists from closed forms against brute force."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pattern_cases import draw_band, draw_disc, draw_regions, draw_window
from test_block_mask import check_lists
from vistoken.errors import MethodError
from vistoken.kernels.patterns import (
    BandPattern,
    DiscPattern,
    RegionPattern,
    SlidingTilePattern,
    WindowPattern,
    radial_half_widths,
)

# --- block lists ---------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [draw_window, draw_disc, draw_band])
@pytest.mark.parametrize("part", range(4))
def test_block_lists_equal_brute_force(draw: Any, part: int) -> None:
    """Full blocks are those of which all pairs are visible, and no listed block is empty."""
    for seed in range(25):
        dice = Random(f"{part} {seed}")
        pattern = draw(dice)
        visible = pattern.visible()
        assert visible.shape == (pattern.tokens, pattern.tokens)
        assert pattern.density == pytest.approx(float(visible.double().mean()), abs=1e-12)
        mask = pattern.block_mask((dice.choice((16, 32)), dice.choice((16, 32, 64))))
        check_lists(mask, visible[None, None])


def test_global_tokens_see_and_are_seen_by_all() -> None:
    dice = Random(0)
    for draw in (draw_window, draw_disc, draw_band, draw_regions):
        for _ in range(10):
            pattern = draw(dice)
            visible = pattern.visible()
            ends = [
                *range(pattern.prefix),
                *range(pattern.tokens)[pattern.tokens - pattern.suffix :],
            ]
            assert visible[..., ends, :].all() and visible[..., :, ends].all()


def test_windows_of_known_grids() -> None:
    """1-D examples of the definition, and the number of keys of a disc."""
    window = WindowPattern([9], 4, 2).visible()
    starts = window.int().argmax(-1).tolist()
    assert starts == [0, 0, 1, 1, 3, 3, 5, 5, 5] and (window.sum(-1) == 4).all()
    for radius, keys in ((8, 193), (16, 793)):
        size = 2 * radius + 1
        middle = size * size // 2
        assert int(DiscPattern((size, size), radius).visible()[middle].sum()) == keys


class Largest(TorchDispatchMode):
    """Notes the number of entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(value, Tensor):
                self.entries = max(self.entries, value.untyped_storage().nbytes() // 8)
        return made


@pytest.mark.parametrize(
    "pattern",
    [
        WindowPattern((2048, 8), (9, 5), suffix=100),
        DiscPattern((256, 64), 3),
        BandPattern(16, 1000, [[20] * 16] * 16, suffix=77),
        BandPattern(16, 1000, radial_half_widths(16, 1000), suffix=77, rounding=128),
    ],
    ids=["window", "disc", "band", "rounded"],
)
def test_lowering_makes_no_square_of_the_tokens(pattern: Any) -> None:
    with Largest() as seen:
        mask = pattern.block_mask(128)
    assert pattern.tokens**2 > 250_000_000
    assert seen.entries < 8_500_000
    assert pattern.density < mask.density < 1


def test_bad_patterns_are_named() -> None:
    def refuses(match: str, kind: Any, *options: Any, **more: Any) -> None:
        with pytest.raises(MethodError, match=match):
            kind(*options, **more)

    refuses(r"kernel_size must be at least 1, got 0", WindowPattern, (4, 4), (0, 2))
    refuses("radius of a disc is an integer of at least 1, got 0", DiscPattern, (4, 4), 0)
    for kind, options in ((WindowPattern, ([9], 3)), (DiscPattern, ((4, 4), 2))):
        refuses("suffix is a number of tokens, 0 or more, got -1", kind, *options, suffix=-1)
    tile: Any = SlidingTilePattern
    refuses("tile must divide the grid, got 3 for 8", tile, (8, 8), (4, 3), (1, 1))
    refuses("odd number of tiles or all 4, got 2 on axis 1", tile, (8, 8), (4, 2), (2, 2))
    refuses("one entry per axis", tile, (8, 8), (4,), (1, 1))
    refuses("frames is an integer of at least 1, got 0", BandPattern, 0, 4, [])
    refuses("each of 2 x 2 pairs of frames, got 1 lines", BandPattern, 2, 4, [[0, 0]])
    refuses("at least -1", BandPattern, 1, 4, [[-2]])
    refuses("power of two of at least 16 tokens, got 100", BandPattern, 1, 4, [[0]], rounding=100)
    refuses("no map of blocks", BandPattern(1, 4, [[0]]).block_map)
    refuses("rule is 'code' or 'paper', got 'both'", radial_half_widths, 2, 4, rule="both")
    refuses("decay goes with rule 'code'", radial_half_widths, 2, 4, rule="paper", decay=0.5)
    routes = torch.zeros(1, 1, 4, 1, dtype=torch.int64)
    refuses(r"grid and regions", RegionPattern, (4,), (2, 2), routes)
    refuses(r"routes of 6 regions are .* got \(1, 1, 4, 1\)", RegionPattern, (4, 4), (2, 3), routes)


# --- bands ---------------------------------------------------------------------------------------


def rounded(pattern: BandPattern) -> Tensor:
    """The blocks of the video that are on, one pair of frames and one column of pairs at a time."""
    size, s = pattern.rounding or 0, pattern.tokens_per_frame
    tokens = pattern.frames * s
    blocks = -(-tokens // size)
    on = torch.eye(blocks, dtype=torch.bool)
    place = torch.arange(tokens)
    for i, line in enumerate(pattern.half_widths):
        for j, width in enumerate(line):
            pair = (place // s == i)[:, None] & (place // s == j)
            pair &= (place[:, None] % s - place % s).abs() <= width
            for a, b in torch.cartesian_prod(torch.arange(blocks), torch.arange(blocks)).tolist():
                part = pair[a * size : (a + 1) * size, b * size : (b + 1) * size]
                columns = part.sum(0)
                some, dense = columns > 0, columns * 3 > len(part)
                on[a, b] |= bool(some.any()) and int(dense.sum()) * 5 > int(some.sum()) * 3
    return on


def test_rounded_bands_equal_brute_force() -> None:
    dice = Random(0)
    for _ in range(25):
        frames, tokens = dice.randint(1, 4), dice.randint(1, 50)
        widths = [[dice.randint(-1, tokens) for _ in range(frames)] for _ in range(frames)]
        pattern = BandPattern(frames, tokens, widths, rounding=16)
        assert torch.equal(pattern.block_map(), rounded(pattern))


@pytest.mark.parametrize(
    ("frames", "decay", "block", "sink", "density"),
    [
        (18, 0.2, 128, True, 0.287),
        (18, 1.0, 128, True, 0.431),
        (41, 1.0, 128, True, 0.264),
        (20, 0.8, 64, True, 0.349),
        (30, 0.95, 128, False, 0.275),
        (128, 1.0, 128, False, 0.115),
    ],
)
def test_radial_densities_are_the_published_ones(
    frames: int, decay: float, block: int, sink: bool, density: float
) -> None:
    """Wan2.1 at 69 and 161 frames, Wan2.2, HunyuanVideo at 117 and 509 frames, 768 x 1280."""
    widths = radial_half_widths(frames, 3840, decay=decay, block=block, sink=sink)
    on = BandPattern(frames, 3840, widths, rounding=block).block_map()
    assert float(on.double().mean()) == pytest.approx(density, abs=5e-4)
    assert on.diagonal().all()
    inner = on[:, 30 * 128 // block :][30 * 128 // block :] if sink else on
    assert torch.equal(inner, inner.T)


def test_radial_density_falls_with_the_distance() -> None:
    widths = radial_half_widths(128, 3840, sink=False)
    on = BandPattern(128, 3840, widths, rounding=128).block_map()
    share = on.view(128, 30, 128, 30).transpose(1, 2).double().mean((2, 3))[:, 0]
    for distances, density in (
        ((0, 1), 1.0), ((2, 3), 0.487), ((4, 7), 0.278), ((8, 15), 0.16), ((16, 31), 0.098),
        ((32, 34, 62), 0.098), ((33, 63), 0.0), ((64, 68, 124), 0.098), ((66, 127), 0.0),
    ):  # fmt: skip
        for distance in distances:
            assert float(share[distance]) == pytest.approx(density, abs=6e-4)


@pytest.mark.parametrize("tokens", [1560, 3600])
def test_radial_frames_need_not_fill_blocks(tokens: int) -> None:
    widths = radial_half_widths(21, tokens)
    on = BandPattern(21, tokens, widths, rounding=128).block_map()
    assert on.diagonal().all() and on[:, : tokens // 128].all()


def test_radial_paper_rule_one_pair_at_a_time() -> None:
    for frames, tokens in ((5, 8), (70, 3), (33, 1)):
        widths = radial_half_widths(frames, tokens, rule="paper", sink=False)
        seen = BandPattern(frames, tokens, widths).visible()
        seen = seen.view(frames, tokens, frames, tokens)
        for i in range(frames):
            power = 2 ** math.floor(math.log2(max(i, 1)))
            for k in range(tokens):
                for m in range(tokens):
                    near = power <= tokens and (abs(k - m) + 1) * power <= tokens
                    same = k == m and i % math.ceil(power / tokens) == 0
                    assert bool(seen[i, k, 0, m]) == (near or same), (i, k, m)
        assert torch.equal(seen, seen.permute(2, 3, 0, 1))
        sink = radial_half_widths(frames, tokens, rule="paper")
        assert all(line[0] == tokens for line in sink)
        assert [line[1:] for line in sink] == [line[1:] for line in widths]


# --- regions and tiles ---------------------------------------------------------------------------


def test_regions_by_hand() -> None:
    """Cut as BiFormer cuts, one token at a time, with a grid that the regions do not divide."""
    routes = torch.tensor([[1, 0], [2, 1], [5, 2], [3, 4], [0, 3], [4, 5]])
    pattern = RegionPattern((5, 7), (2, 3), routes[None, None])
    assert pattern.region_shape == (3, 3)
    seen = pattern.visible()[0, 0]
    for i in range(35):
        for j in range(35):
            a, b = (x // 7 // 3 * 3 + x % 7 // 3 for x in (i, j))
            assert bool(seen[i, j]) == (b in routes[a].tolist())


def test_region_blocks_hold_each_token_once() -> None:
    dice = Random(1)
    for _ in range(40):
        pattern = draw_regions(dice)
        block = dice.choice((None, 16, 32))
        arranged, mask = pattern.arrange(block), pattern.block_mask(block)
        size = mask.block_q
        assert torch.equal(arranged.slots[arranged.places], torch.arange(pattern.tokens))
        inside = torch.arange(size) < arranged.lengths[:, None]
        assert torch.equal(inside.flatten().nonzero()[:, 0], arranged.places.sort().values)
        seen = mask.visible()[:, :, arranged.places][..., arranged.places]
        assert torch.equal(seen, pattern.visible())
        assert pattern.density == pytest.approx(float(pattern.visible().double().mean()))


def test_regions_choose_a_block_they_fill() -> None:
    routes = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    for side, size in ((2, 16), (4, 16), (5, 32), (7, 64), (8, 64), (14, 128), (16, 128)):
        assert RegionPattern((side, side), (1, 1), routes).block_size() == size


def test_all_regions_are_dense() -> None:
    routes = torch.rand(1, 1, 6, 6).argsort(-1)
    assert RegionPattern((5, 7), (2, 3), routes, 2, 3).visible().all()


def test_sliding_tiles_by_hand() -> None:
    """Windows of whole tiles, centered where that fits and shifted inwards at the borders."""
    for tiles, size, count in ((5, 3, 3), (6, 4, 5), (4, 2, 1), (3, 5, 3), (4, 3, 4)):
        seen = SlidingTilePattern([tiles * size], [size], [count]).visible()
        for tile in range(tiles):
            first = min(max(tile - count // 2, 0), tiles - count)
            expected = torch.zeros(tiles, size, dtype=torch.bool)
            expected[first : first + count] = True
            assert (seen[tile * size : (tile + 1) * size] == expected.flatten()).all()
