"""Average pooling of the token grid: the compression that needs no selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vistoken.contract import ModelFacts, Selection, Signal, Stage, View
from vistoken.errors import MethodError
from vistoken.pruning._pruner import Pruner


@dataclass(frozen=True, kw_only=True)
class Pooling(Pruner):
    """Replace the grid of projected tokens by the averages of a smaller grid of cells.

    The budget must be the product of two numbers close to the grid's shape (24 × 24 pools to
    8 × 8 = 64, 8 × 16 = 128, 12 × 16 = 192). The report lists, for each cell, the token at its
    centre.
    """

    name: ClassVar[str] = "pooling"
    paper: ClassVar[str] = "control"
    tag: ClassVar[str] = "control"
    signals: ClassVar[frozenset[Signal]] = frozenset({Signal.FEATURES})

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        """As every pruner, after a check that the budget is a grid."""
        if self.budget(facts.visual_tokens) < facts.visual_tokens:
            cells(facts.grid, self.budget(facts.visual_tokens))
        return super().stages(facts)

    def select(self, view: View, keep: int) -> Selection:
        """Average the cells of a grid of `keep` cells."""
        rows, columns = view.facts.grid
        if view.tokens != rows * columns:
            raise MethodError(
                f"pooling needs the whole grid of {rows} x {columns} tokens, but an earlier method "
                f"left {view.tokens}; attach it alone."
            )
        shape = cells(view.facts.grid, keep)
        centres = cell_centres(view.facts.grid, shape, view.device)
        return Selection(
            centres.expand(view.images, keep), pool(view.features, view.facts.grid, shape)
        )


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
