"""The stages of SparseVLM: after which LLM layers it prunes, and to how many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor
from typing import NamedTuple

from vistoken.errors import MethodError

DEPTH, TOKENS = 32, 576  # the model for which the official tables are made: LLaVA-1.5-7B
LAYERS = {"v1.5": (2, 6, 15), "v2": (2, 6, 15), "rank": (2, 6, 15, 19)}
# by budget: how many tokens the three stages keep by score
TABLES = {
    "v1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "v2": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


class PlannedStage(NamedTuple):
    """After LLM layer `layer`: `top` tokens stay by score; with merged ones `left` go on."""

    layer: int
    top: int
    left: int


def recycled(pruned: int) -> tuple[int, int]:
    """Return how many of the pruned tokens are clustered, and into how many clusters."""
    if pruned < 1:
        return 0, 0
    candidates = int(0.3 * pruned) + 1
    return candidates, int(candidates / 10) + 1


def stage_layers(mode: str, depth: int, first: int = 0) -> dict[int, int]:
    """Return {LLM layer: number of the official stage} for a model of `depth` LLM layers.

    The official layer times depth / 32, rounded to the nearest layer, halves to the earlier one;
    not before layer `first`, and so that at least one layer follows. Of several stages that fall
    on one layer the last is left. Raises `MethodError` when no layer is possible.
    """
    last = depth - 2
    if not 0 <= first <= last:
        raise MethodError(
            f"sparsevlm prunes after an LLM layer that another one follows: of the model's {depth} "
            f"layers that must be one of {first} to {last}, which is none; choose a method that "
            "prunes before the LLM."
        )
    scaled = (ceil(Fraction(layer * depth, DEPTH) - Fraction(1, 2)) for layer in LAYERS[mode])
    return {min(max(layer, first), last): number for number, layer in enumerate(scaled)}


@lru_cache(maxsize=1024)
def schedule(
    mode: str, tokens: int, keep: int, depth: int = DEPTH, first: int = 0
) -> tuple[PlannedStage, ...]:
    """Return the stages of mode `v1.5` or `v2` for `tokens` visual tokens and a budget of `keep`.

    The budget is a layer average as the official code counts it, see `layer_averages`. For 576
    tokens and 32 layers the budgets 192, 128, 96 and 64 are the official table, to the token.
    The rest is an extension: a budget of k among N tokens is looked up as 576 k / N and the counts
    found are scaled back by N / 576, rounded (halves up), at least 1. Each column of the table
    stands for its own layer average in this model, in whole tokens, but at most for its name.
    Between two columns, and between the largest and keeping everything, each stage's count is
    interpolated linearly. Below the smallest column its counts shrink in proportion to the budget;
    the layers up to the first stage see all tokens, so that there the average stays above `keep`.
    """
    layers = stage_layers(mode, depth, first)
    wanted = _interpolate(_knots(mode, depth, first), Fraction(keep * TOKENS, tokens))
    scaled = [floor(count * tokens / TOKENS + Fraction(1, 2)) for count in wanted]
    return _plan(mode, tokens, [max(1, count) for count in scaled], layers)


def layer_averages(
    tokens: int, plan: Sequence[PlannedStage], depth: int = DEPTH
) -> tuple[float, float]:
    """Return the visual tokens per LLM layer: as the official code counts, and as they run.

    The official count credits the layer of a stage with the tokens that leave it, although the
    layer runs on those that enter; the second number is the mean of what enters each layer.
    """
    shortened, entering = _sums(tokens, plan, depth)
    return shortened / depth, entering / depth


def _sums(tokens: int, plan: Sequence[PlannedStage], depth: int) -> tuple[int, int]:
    left = {stage.layer: stage.left for stage in plan}
    current, shortened, entering = tokens, 0, 0
    for layer in range(depth):
        entering += current
        current = left.get(layer, current)
        shortened += current
    return shortened, entering


def _plan(
    mode: str, tokens: int, counts: Sequence[int], layers: dict[int, int]
) -> tuple[PlannedStage, ...]:
    found, left = [], tokens
    for layer, number in layers.items():
        top = min(counts[number], left)
        left = top + (recycled(left - top)[1] if mode == "v1.5" else 0)
        found.append(PlannedStage(layer, top, left))
    return tuple(found)


@lru_cache(maxsize=256)
def _knots(mode: str, depth: int, first: int) -> dict[int, tuple[int, ...]]:
    """Budgets among 576 tokens, ascending, and the counts of the official stages there."""
    layers = stage_layers(mode, depth, first)
    knots = {0: (0, 0, 0)}
    for budget, counts in sorted(TABLES[mode].items()):
        average = _sums(TOKENS, _plan(mode, TOKENS, counts, layers), depth)[0] // depth
        knots[min(budget, average)] = counts
    return {**knots, TOKENS: (TOKENS,) * 3}


def _interpolate(knots: dict[int, tuple[int, ...]], at: Fraction) -> list[Fraction]:
    below = max(budget for budget in knots if budget <= at)
    above = min((budget for budget in knots if budget > at), default=below)
    if above == below:
        return [Fraction(count) for count in knots[below]]
    part = (at - below) / (above - below)
    pairs = zip(knots[below], knots[above], strict=True)
    return [low + part * (high - low) for low, high in pairs]
