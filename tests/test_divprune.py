"""DivPrune against a brute-force reading of the max-min rule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from vistoken.contract import ModelFacts, Signal, View
from vistoken.cost import TransformerShape
from vistoken.errors import MethodError
from vistoken.pictures import plain
from vistoken.pruning.divprune import DivPrune, select


def tokens_of(tokens: int, width: int, seed: int) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def distances(rows: Tensor) -> list[list[float]]:
    """1 - cosine in fp64, pair by pair."""
    values = rows.double().tolist()
    norms = [math.sqrt(sum(x * x for x in row)) for row in values]

    def apart(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(values[i], values[j], strict=True))
        return 1 - dot / (norms[i] * norms[j])

    return [[apart(i, j) for j in range(len(values))] for i in range(len(values))]


def brute_force(rows: Tensor, keep: int) -> list[int]:
    """First the token with the farthest nearest neighbor, then the farthest from all picks."""
    apart = distances(rows)
    everyone = range(len(apart))
    picks = [max(everyone, key=lambda i: min(apart[i][j] for j in everyone if j != i))]
    while len(picks) < keep:
        rest = [i for i in everyone if i not in picks]
        picks.append(max(rest, key=lambda i: min(apart[i][j] for j in picks)))
    return sorted(picks)


def least_distance(rows: Tensor, picks: list[int]) -> float:
    apart = distances(rows)
    return min(apart[i][j] for i, j in itertools.combinations(picks, 2))


# --- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_picks_equal_brute_force(dtype: torch.dtype) -> None:
    for seed in range(25):
        rows = tokens_of(12, 6, seed).to(dtype)
        for keep in range(1, 13):
            picks = select(rows[None], keep)
            assert picks.dtype == torch.int64
            assert picks.tolist() == [brute_force(rows, keep)]


def test_larger_pictures_equal_brute_force() -> None:
    for tokens, width, keep in ((33, 4, 20), (64, 32, 16), (100, 8, 9)):
        rows = tokens_of(tokens, width, tokens)
        assert select(rows[None], keep).tolist() == [brute_force(rows, keep)]


def test_greedy_max_min_is_within_a_factor_of_the_best_subset() -> None:
    """Angles between unit vectors are a metric, in which the greedy choice is at least half."""
    for seed in range(5):
        rows = tokens_of(10, 3, seed)
        every = itertools.combinations(range(10), 4)
        best = max(least_distance(rows, list(subset)) for subset in every)
        found = least_distance(rows, select(rows[None], 4)[0].tolist())
        assert math.acos(1 - found) >= 0.5 * math.acos(1 - best)


def test_the_first_pick_is_the_loneliest_token() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, -1.0]])
    assert select(rows[None], 1).tolist() == [[4]]
    assert select(rows[None, :4], 1).tolist() == [[0]]  # all neighbors are equally near


@pytest.mark.parametrize("kinds", [1, 2, 5])
def test_equal_tokens_are_never_picked_twice(kinds: int) -> None:
    rows = tokens_of(kinds, 7, 0)[torch.arange(40) % kinds]
    for keep in (1, 5, 13, 39):
        picks = select(rows[None], keep)[0].tolist()
        assert picks == sorted(set(picks)) and len(picks) == keep
        shown = {i % kinds for i in picks}
        assert len(shown) == min(keep, kinds)  # each kind once before any twice


def test_keeping_all_is_the_identity() -> None:
    for tokens, keep in ((1, 1), (7, 7), (7, 99)):
        rows = tokens_of(tokens, 3, 0).expand(2, tokens, 3)
        assert torch.equal(select(rows, keep), torch.arange(tokens).expand(2, tokens))


def test_scale_does_not_matter() -> None:
    rows = tokens_of(60, 8, 3)
    scaled = rows * torch.logspace(-3, 3, 60)[:, None]
    assert torch.equal(select(rows[None], 20), select(scaled[None], 20))


def test_a_batch_equals_its_pictures_one_by_one() -> None:
    rows = torch.stack([tokens_of(90, 16, seed) for seed in range(4)])
    together = select(rows, 25)
    assert torch.equal(together, torch.cat([select(one[None], 25) for one in rows]))
    assert torch.equal(select(rows.flip(0), 25), together.flip(0))


def test_order_of_the_tokens_does_not_matter() -> None:
    rows, order = tokens_of(70, 12, 5), torch.randperm(70)
    expected = select(rows[None], 15)[0]
    assert torch.equal(order[select(rows[order][None], 15)[0]].sort().values, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_picture_stays_in_bounds_and_spoils_no_other(bad: float) -> None:
    good = tokens_of(36, 8, 1)
    for where in ([0], [7, 8], list(range(36))):
        broken = good.clone()
        broken[where] = bad
        for keep in (1, 20, 35):
            picks = select(torch.stack([broken, good]), keep)
            assert len(set(picks[0].tolist())) == keep and picks[0].min() >= 0
            assert picks[0].max() < 36 and torch.equal(picks[1:], select(good[None], keep))


def test_picks_need_no_gradient_and_features_stay() -> None:
    rows = tokens_of(30, 5, 2)[None].requires_grad_()
    before = rows.detach().clone()
    assert torch.equal(select(rows, 9), select(before, 9)) and torch.equal(rows, before)


# --- the method ----------------------------------------------------------------------------------


def test_the_method_is_its_function() -> None:
    shape = TransformerShape(2, 8, 2, 2, 4, 16, 2)
    facts = ModelFacts("none", (4, 9), 1, 2, 1, 2, shape, shape, 0, 0)
    method, rows = DivPrune(keep=10), tokens_of(36, 8, 0)[None]
    (stage,) = method.stages(facts)
    assert stage.signals == {Signal.FEATURES}
    origin = torch.arange(36)[None]
    view = View(stage, facts, plain(4, 9), origin, {}, {Signal.FEATURES: rows}.__getitem__)
    assert torch.equal(method.select(view, 10).indices, select(rows, 10))


def test_budgets_of_the_paper() -> None:
    method = DivPrune(ratio=1 - 0.098)
    assert method.budget(576) == 56


@pytest.mark.parametrize(
    ("rows", "keep", "words"),
    [((3, 4), 2, r"\[3, 4\]"), ((1, 3, 4), 0, "at least 1"), ((1, 3, 4), -2, "got -2")],
)
def test_what_cannot_be_is_refused(rows: tuple[int, ...], keep: int, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        select(torch.zeros(rows), keep)
