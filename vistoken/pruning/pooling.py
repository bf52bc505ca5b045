"""Average pooling of the token grid: the compression that needs no selection."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vistoken.contract import ModelFacts, Selection, Signal, Stage, View
from vistoken.errors import MethodError
from vistoken.pruning._pruner import Pruner

_CHOICES = 12  # numbers of cells tried for each raster of a picture


@dataclass(frozen=True, kw_only=True)
class Pooling(Pruner):
    """Replace the grid of projected tokens by the averages of a smaller grid of cells.

    The budget must be the product of two numbers close to the grid's shape (24 × 24 pools to
    8 × 8 = 64, 8 × 16 = 128, 12 × 16 = 192). A picture of several rasters (tiles, frames) spreads
    it over them by their size, in numbers that such products can make. The report lists, for each
    cell, the token at its centre.
    """

    name: ClassVar[str] = "pooling"
    paper: ClassVar[str] = "control"
    tag: ClassVar[str] = "control"
    signals: ClassVar[frozenset[Signal]] = frozenset({Signal.FEATURES})

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        """As every pruner, after a check that the budget is a grid."""
        if not facts.tiled and self.budget(facts.visual_tokens) < facts.visual_tokens:
            cells(facts.grid, self.budget(facts.visual_tokens))
        return super().stages(facts)

    def select(self, view: View, keep: int) -> Selection:
        """Average the cells of grids of `keep` cells together."""
        grids = tuple(part.grid for part in view.picture.parts)
        if view.tokens != view.picture.tokens:
            raise MethodError(
                f"pooling needs the whole grid of {view.picture.tokens} tokens, but an earlier "
                f"method left {view.tokens}; attach it alone."
            )
        centres, tokens, first = [], [], 0
        for grid, share in zip(grids, share_out(grids, keep), strict=True):
            shape, size = cells(grid, share), grid[0] * grid[1]
            centres.append(first + cell_centres(grid, shape, view.device))
            tokens.append(pool(view.features[:, first : first + size], grid, shape))
            first += size
        return Selection(torch.cat(centres).expand(view.images, keep), torch.cat(tokens, dim=1))


@lru_cache(maxsize=256)
def share_out(grids: tuple[tuple[int, int], ...], keep: int) -> tuple[int, ...]:
    """Split `keep` cells over rasters by their size, in numbers that form a grid of cells on each.

    The split with the least sum of deviations; raises `MethodError` where there is none.
    """
    if len(grids) == 1:
        return (keep,)
    total = sum(rows * columns for rows, columns in grids)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for grid in grids:
        size = grid[0] * grid[1]
        share = keep * size / total
        fits = [count for count in range(1, size + 1) if _factor(grid, count)]
        works = sorted((abs(count - share), count) for count in fits)[:_CHOICES]
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (cost, chosen) in best.items():
            for off, count in works:
                option = (cost + off, (*chosen, count))
                if used + count <= keep and option < found.get(used + count, (math.inf, ())):
                    found[used + count] = option
        best = found
    if keep not in best:
        raise MethodError(
            f"pooling: {keep} tokens cannot be shared out over rasters of {list(grids)} tokens as "
            f"grids of cells; budgets that can: {sorted(best)[-4:]}."
        )
    return best[keep][1]


def cells(grid: tuple[int, int], keep: int) -> tuple[int, int]:
    """Return the grid of `keep` cells whose shape is closest to `grid`.

    Raises `MethodError`, naming the nearest budgets that work, when every factorisation is more
    than 2.5 times as long as wide in tokens.
    """
    found = _factor(grid, keep)
    if found is not None:
        return found
    total = grid[0] * grid[1]
    works = [k for k in range(1, total + 1) if _factor(grid, k)]
    near = sorted(sorted(works, key=lambda k: (abs(k - keep), k))[:4])
    raise MethodError(
        f"pooling: {keep} tokens do not form a grid of cells on {grid[0]} x {grid[1]} tokens. "
        f"Budgets nearby that do: {', '.join(map(str, near))}."
    )


def _factor(grid: tuple[int, int], keep: int) -> tuple[int, int] | None:
    def stretch(down: int) -> float:
        ratio = (grid[0] / down) / (grid[1] / (keep // down))
        return max(ratio, 1 / ratio)

    fits = [d for d in range(1, grid[0] + 1) if keep % d == 0 and 1 <= keep // d <= grid[1]]
    best = min(fits, key=stretch, default=None)
    return None if best is None or stretch(best) > 2.5 else (best, keep // best)


def pool(features: Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Average features [B, N, C] on `grid` into the cells of `shape`: [B, cells, C], in fp32."""
    image = features.float().transpose(1, 2).unflatten(2, grid)
    return F.adaptive_avg_pool2d(image, shape).flatten(2).transpose(1, 2).to(features.dtype)


def cell_centres(
    grid: tuple[int, int], shape: tuple[int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """Return the raster index [cells] of the token at the centre of each cell."""
    rows = (2 * torch.arange(shape[0], device=device) + 1) * grid[0] // (2 * shape[0])
    columns = (2 * torch.arange(shape[1], device=device) + 1) * grid[1] // (2 * shape[1])
    return (rows[:, None] * grid[1] + columns).flatten()
