"""Random patterns of all kinds, small enough for brute force."""

from __future__ import annotations

from random import Random

import torch

from vistoken.kernels.patterns import (
    BandPattern,
    DiscPattern,
    RegionPattern,
    SlidingTilePattern,
    WindowPattern,
)

LONGEST = {1: 150, 2: 16, 3: 7}


def draw_globals(dice: Random) -> tuple[int, int]:
    return dice.choice((0, dice.randint(1, 40))), dice.choice((0, dice.randint(1, 40)))


def draw_window(dice: Random) -> WindowPattern:
    rank = dice.randint(1, 3)
    grid = [dice.randint(1, LONGEST[rank]) for _ in range(rank)]
    kernel = [dice.choice((length, dice.randint(1, length))) for length in grid]
    stride = [dice.choice((1, k, dice.randint(1, k))) for k in kernel]
    most = [length // k for length, k in zip(grid, kernel, strict=True)]
    dilation = [dice.randint(1, x) for x in most] if dice.random() < 0.4 else 1
    causal = [dice.random() < 0.3 for _ in grid]
    return WindowPattern(grid, kernel, stride, dilation, causal, *draw_globals(dice))


def draw_disc(dice: Random) -> DiscPattern:
    return DiscPattern((dice.randint(1, 16), dice.randint(1, 16)), dice.randint(1, 12),
                       *draw_globals(dice))  # fmt: skip


def draw_band(dice: Random) -> BandPattern:
    frames, tokens = dice.randint(1, 5), dice.randint(1, 60)
    widths = [[dice.randint(-1, tokens + 1) for _ in range(frames)] for _ in range(frames)]
    return BandPattern(frames, tokens, widths, *draw_globals(dice), dice.choice((None, 16, 32)))


def draw_regions(dice: Random) -> RegionPattern:
    regions = dice.randint(1, 4), dice.randint(1, 4)
    count = regions[0] * regions[1]
    scores = torch.rand(dice.randint(1, 2), dice.choice((1, 2)), count, count)
    routes = scores.argsort(-1)[..., : dice.randint(1, count)]
    return RegionPattern(
        (dice.randint(1, 12), dice.randint(1, 12)), regions, routes, *draw_globals(dice)
    )


def draw_tiles(dice: Random) -> SlidingTilePattern:
    return SlidingTilePattern((6, 4), (2, 2), dice.choice(((3, 1), (1, 2), (1, 1))),
                              *draw_globals(dice))  # fmt: skip
