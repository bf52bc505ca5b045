"""HoloV against a slow fp64 reading of the paper and of the official code, over odd inputs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import pytest
import torch
from torch import Tensor

from vistoken.pruning.holov import MODES, select, tiles

# --- the oracle: plain loops over Python floats --------------------------------------------------

Quotas = Callable[[Sequence[float], Sequence[int], int, str], list[int]]


def runs(tokens: int, crops: int) -> list[list[int]]:
    """Contiguous runs of the raster; the first N mod C of them hold one token more."""
    crops = min(crops, tokens)
    members, start = [], 0
    for crop in range(crops):
        end = start + tokens // crops + (crop < tokens % crops)
        members.append(list(range(start, end)))
        start = end
    return members


def tiles_of(grid: tuple[int, int], shape: tuple[int, int]) -> list[list[int]]:
    """Rectangles of the grid in raster order; tile t of n begins at row ceil(t * rows / n)."""
    members = []
    for down in range(shape[0]):
        rows = range(-(-down * grid[0] // shape[0]), -(-(down + 1) * grid[0] // shape[0]))
        for across in range(shape[1]):
            columns = range(
                -(-across * grid[1] // shape[1]), -(-(across + 1) * grid[1] // shape[1])
            )
            members.append([row * grid[1] + column for row in rows for column in columns])
    return members


def diversity(features: Tensor) -> list[float]:
    """V_i = 1/(M-1) sum_j (S_ij - mu_i)^2 of one crop [M, C], S with a zeroed diagonal."""
    rows = [[float(x) for x in row] for row in features.double()]
    norms = [math.sqrt(sum(x * x for x in row)) for row in rows]
    unit = torch.tensor(
        [[x / n if n else 0.0 for x in row] for row, n in zip(rows, norms, strict=True)],
        dtype=torch.float64,
    )
    result = []
    for i in range(len(rows)):
        similarity = (unit @ unit[i]).tolist()
        similarity[i] = 0.0
        rest = max(len(rows) - 1, 1)
        mean = sum(similarity) / rest
        result.append(sum((s - mean) ** 2 for s in similarity) / rest)
    return result


def holistic(features: Tensor, attention: Sequence[float]) -> list[float]:
    """H = gamma V + A of one crop, gamma = E|A| / E|V|; gamma V tends to E|A| as V vanishes."""
    spread = diversity(features)
    mean_attention = sum(map(abs, attention)) / len(attention)
    mean_spread = sum(spread) / len(spread)
    if mean_spread == 0.0:
        return [mean_attention + a for a in attention]
    return [mean_attention / mean_spread * v + a for v, a in zip(spread, attention, strict=True)]


def quotas(
    weights: Sequence[float], sizes: Sequence[int], keep: int, mode: str, slack: float = 0.0
) -> list[int]:
    """floor(w k) with the leftovers and the overflow handed on until `keep` tokens have a crop."""
    total = sum(weights)
    # crops without any attention share, by their room, what the others cannot take
    share = [max(w / total, 1e-38) if total else 1 / len(weights) for w in weights]
    heaviest = sorted(range(len(share)), key=lambda c: -share[c])
    quota = [math.floor(w * keep * (1 + slack)) for w in share]
    if mode == "released":
        for crop in heaviest[: keep - sum(quota)]:
            quota[crop] += 1
    surplus = sum(max(q - size, 0) for q, size in zip(quota, sizes, strict=True))
    quota = [min(q, size) for q, size in zip(quota, sizes, strict=True)]
    while surplus and sum(quota) < sum(sizes):
        pull = [w * (size - q) for w, size, q in zip(share, sizes, quota, strict=True)]
        offers = [math.floor(surplus * p / sum(pull) * (1 + slack)) for p in pull]
        gifts = [min(o, s - q) for o, s, q in zip(offers, sizes, quota, strict=True)]
        if not sum(gifts):
            break
        quota = [q + g for q, g in zip(quota, gifts, strict=True)]
        surplus -= sum(gifts)
    for crop in heaviest:
        quota[crop] += min(keep - sum(quota), sizes[crop] - quota[crop])
    return quota


def best(crop: Sequence[int], score: Sequence[float], count: int) -> list[int]:
    """The tokens of a crop with the largest scores; ties go to the lower index."""
    ranked = sorted(zip(crop, score, strict=True), key=lambda pair: (-pair[1], pair[0]))
    return [token for token, _ in ranked[:count]]


@dataclass(frozen=True)
class Case:
    """One image, and how it is cut."""

    features: Tensor
    attention: Tensor
    keep: int
    crops: int
    mode: str
    grid: tuple[int, int] | None = None

    @cached_property
    def members(self) -> list[list[int]]:
        if self.mode != "paper-2d":
            return runs(self.attention.numel(), self.crops)
        assert self.grid is not None
        return tiles_of(self.grid, tiles(self.grid, self.crops))

    @cached_property
    def scores(self) -> list[list[float]]:
        """What ranks the tokens of each crop."""
        attention = self.attention.double().tolist()
        rows = [[attention[i] for i in crop] for crop in self.members]
        if self.mode == "released":
            return rows
        crops = zip(self.members, rows, strict=True)
        return [holistic(self.features[crop], row) for crop, row in crops]

    @cached_property
    def weights(self) -> list[float]:
        """Mean holistic score of each crop up to a factor: the mean attention (spec A2, A3)."""
        attention = self.attention.double().tolist()
        return [sum(attention[i] for i in crop) / len(crop) for crop in self.members]

    @cached_property
    def possible_quotas(self) -> set[tuple[int, ...]]:
        """Quotas that fp32 could lead to: weights off by a few ulps, floors just below a number."""
        sizes, jitter = [len(crop) for crop in self.members], random.Random(0)
        found = set()
        for size, slack in [(0.0, 0.0)] + [(3e-6, 0.0), (3e-6, 8e-6)] * 5:
            noisy = [w * (1 + jitter.uniform(-size, size)) for w in self.weights]
            found.add(tuple(quotas(noisy, sizes, self.keep, self.mode, slack)))
        return found

    def expected(self, rule: Quotas = quotas, scores: list[list[float]] | None = None) -> list[int]:
        """The oracle's picks."""
        sizes = [len(crop) for crop in self.members]
        quota = rule(self.weights, sizes, self.keep, self.mode)
        picks = []
        for crop, score, q in zip(self.members, scores or self.scores, quota, strict=True):
            picks += best(crop, score, q)
        return sorted(picks)

    def run(self) -> list[int]:
        """The implementation's picks."""
        picks = select(
            self.features[None],
            self.attention[None],
            self.keep,
            mode=self.mode,
            crops=self.crops,
            grid=self.grid,
        )
        assert picks.shape == (1, min(self.keep, self.attention.numel()))
        assert picks.dtype == torch.int64
        return picks[0].tolist()


def faults(case: Case, picks: list[int]) -> list[str]:
    """Everything that is wrong with picks, as far as rounding leaves one right answer."""
    tokens = case.attention.numel()
    if sorted(set(picks)) != picks or not all(0 <= i < tokens for i in picks):
        return ["not ascending, not unique or out of range"]
    if len(picks) != min(case.keep, tokens):
        return ["count"]
    if case.keep >= tokens:
        return [] if picks == list(range(tokens)) else ["not the identity"]
    chosen, found = set(picks), []
    counts = tuple(sum(i in chosen for i in crop) for crop in case.members)
    possible = case.possible_quotas
    if len(possible) == 1 and counts not in possible and case.attention.any():
        found.append(f"quotas {counts}, expected {possible}")
    exact = case.mode == "released"
    for crop, score in zip(case.members, case.scores, strict=True):
        slack = 0.0 if exact else 2e-5 * max(map(abs, score))
        kept = [s for i, s in zip(crop, score, strict=True) if i in chosen]
        dropped = [s for i, s in zip(crop, score, strict=True) if i not in chosen]
        if kept and dropped and min(kept) < max(dropped) - slack:
            found.append(f"{min(kept)} kept, {max(dropped)} dropped in {crop[:2]}...")
        if exact and set(best(crop, score, len(kept))) != chosen & set(crop):
            found.append("a tie went to the higher index")
    return found


# --- the inputs ----------------------------------------------------------------------------------


def attention_like(kind: str, tokens: int, draw: torch.Generator) -> Tensor:
    row = torch.rand(tokens, generator=draw)
    if kind == "uniform":
        row = torch.full((tokens,), 1 / tokens)
    elif kind == "one sink":
        row = row * 1e-3 / tokens
        row[int(torch.randint(tokens, (1,), generator=draw))] = 0.9
    elif kind == "two sinks":
        places = torch.randint(tokens, (2,), generator=draw)
        row = row / row.sum() * 0.4
        row[places] = 0.3
    elif kind == "zero":
        row = torch.zeros(tokens)
    elif kind == "ties":
        row = torch.randint(1, 4, (tokens,), generator=draw) / 256
    elif kind == "tiny":
        row = row * 1e-12
    elif kind == "sparse":
        row = torch.where(row > 0.8, row, torch.zeros(()))
    elif kind == "peaked":
        row = torch.softmax(4 * torch.randn(tokens, generator=draw), 0)
    return row


def features_like(kind: str, tokens: int, draw: torch.Generator) -> Tensor:
    values = torch.randn(tokens, 6, generator=draw)
    if kind == "shared":
        values = values + 3
    elif kind == "identical":
        values = values[:1].repeat(tokens, 1)
    elif kind == "zero":
        values = torch.zeros(tokens, 6)
    elif kind == "some zero":
        values[::3] = 0
    elif kind == "twins":
        values = values[torch.arange(tokens) // 2]
    elif kind == "huge":
        values = values * 1e4
    elif kind == "small":
        values = values * 1e-4
    return values


ATTENTION = ("random", "uniform", "one sink", "two sinks", "zero", "ties", "tiny", "sparse")
ATTENTION += ("peaked", "random", "peaked")
FEATURES = ("random", "shared", "identical", "zero", "some zero", "twins", "huge", "small")
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)
GRIDS = {1: (1, 1), 7: (1, 7), 36: (6, 6), 40: (4, 10), 63: (7, 9), 576: (24, 24)}


@cache
def cases(count: int, *modes: str, seed: int = 0) -> list[Case]:
    """Seeded random cases; every list of kinds is walked through evenly."""
    choose, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    result = []
    while len(result) < count:
        mode = modes[len(result) % len(modes)]
        tokens = choose.choice([1, 7, 7, 36, 36, 40, 63, 63, 63, 63, 63, 576])
        crops = choose.choice([1, 3, 4, 16, 16, tokens + 3, tokens])
        if tokens == 576:
            crops = choose.choice([9, 16])  # one crop of 576 takes the oracle seconds
        grid = GRIDS[tokens]
        if mode == "paper-2d" and tokens < 576:
            crops = choose.choice([1, 2, 3, 4, 6]) if tokens >= 36 else 1
        keep = choose.choice([1, tokens, choose.randint(1, tokens), choose.randint(1, tokens)])
        keep = choose.choice([keep, choose.randint(1, tokens)])
        dtype = choose.choice(DTYPES)
        attention = attention_like(choose.choice(ATTENTION), tokens, draw)
        features = features_like(choose.choice(FEATURES), tokens, draw).to(dtype)
        if choose.random() < 0.3:
            attention = attention.to(choose.choice(DTYPES))
        result.append(Case(features, attention, keep, crops, mode, grid))
    return result


# --- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_picks_follow_the_rule(mode: str) -> None:
    every = cases(110, mode, seed=MODES.index(mode))
    wrong = [(case, found) for case in every if (found := faults(case, case.run()))]
    assert not wrong, f"{len(wrong)} cases; the first: {wrong[0]}"
    clear = [len(case.possible_quotas) == 1 for case in every]
    assert sum(clear) > 0.85 * len(every)  # rounding may excuse few of them


def largest_remainder(w: Sequence[float], sizes: Sequence[int], keep: int, mode: str) -> list[int]:
    share = [x / (sum(w) or 1) * keep for x in w]
    quota = [min(math.floor(s), size) for s, size in zip(share, sizes, strict=True)]
    for crop in sorted(range(len(w)), key=lambda c: math.floor(share[c]) - share[c]):
        quota[crop] += quota[crop] < sizes[crop] and sum(quota) < keep
    return quota


def no_donation(w: Sequence[float], sizes: Sequence[int], keep: int, mode: str) -> list[int]:
    quota = [
        min(math.floor(x / (sum(w) or 1) * keep), size) for x, size in zip(w, sizes, strict=True)
    ]
    for crop in sorted(range(len(w)), key=lambda c: -w[c]):
        quota[crop] += min(keep - sum(quota), sizes[crop] - quota[crop])
    return quota


def other_mode(w: Sequence[float], sizes: Sequence[int], keep: int, mode: str) -> list[int]:
    return quotas(w, sizes, keep, "paper" if mode == "released" else "released")


@pytest.mark.parametrize("rule", [largest_remainder, no_donation, other_mode])
def test_a_wrong_quota_rule_would_be_seen(rule: Quotas) -> None:
    every = cases(80, "paper", "released", seed=5)
    assert sum(bool(faults(case, case.expected(rule))) for case in every) >= 8
    assert not any(faults(case, case.expected()) for case in every)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_ranking_by_the_wrong_score_would_be_seen(mode: str) -> None:
    """The paper ranks by H and the released code by raw attention: swapped, many picks differ."""
    swapped = "released" if mode == "paper" else "paper"
    every = cases(60, mode, seed=6)
    wrong = [case.expected(scores=replace(case, mode=swapped).scores) for case in every]
    assert sum(bool(faults(case, picks)) for case, picks in zip(every, wrong, strict=True)) >= 8


def image(tokens: int = 64, width: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(1, tokens, width, generator=draw)
    return features, torch.softmax(torch.randn(1, tokens, generator=draw), -1)


def per_crop(picks: Tensor, tokens: int, crops: int) -> list[int]:
    chosen = set(picks.tolist())
    return [sum(i in chosen for i in crop) for crop in runs(tokens, crops)]


def test_features_matter_in_paper_and_never_in_released() -> None:
    changed = 0
    for seed in range(10):
        features, attention = image(seed=seed)
        others = [image(seed=100 + seed)[0], features * 7 + 3, torch.zeros_like(features)]
        for mode in ("paper", "released"):
            before = select(features, attention, 20, mode=mode, crops=4)[0]
            for other in others:
                after = select(other, attention, 20, mode=mode, crops=4)[0]
                assert per_crop(after, 64, 4) == per_crop(before, 64, 4)
                changed += mode == "paper" and not torch.equal(before, after)
                assert mode == "paper" or torch.equal(before, after)
    assert changed > 20


def test_a_crop_worked_by_hand() -> None:
    """Features e1, e1, e2: S = (0 1 0), (1 0 0), (0 0 0) and V = 3/8, 3/8, 0.

    With attention (1, 1, x) gamma V is (x + 2) / 2 for the twins: H = (x + 4) / 2 against x.
    """
    features = torch.eye(4)[[0, 0, 1]][None]
    for x, best in ((2.0, 0), (3.9, 0), (4.1, 2), (9.0, 2)):
        attention = torch.tensor([[1.0, 1.0, x]])
        assert select(features, attention, 1, crops=1).tolist() == [[best]]
        assert select(features, attention, 1, crops=1, mode="released").tolist() == [[2]]


def test_paper_2d_cuts_tiles_and_paper_cuts_runs() -> None:
    """Attention on the left half of a 4 x 8 grid: tiles see it, runs of whole rows do not."""
    attention = torch.full((4, 8), 0.01)
    attention[:, :4] = 0.06
    features = image(32)[0]
    tiled = select(features, attention.reshape(1, -1), 16, mode="paper-2d", crops=2, grid=(4, 8))
    assert [int((tiled % 8 < 4).sum()), int((tiled % 8 >= 4).sum())] == [14, 2]
    cut = select(features, attention.reshape(1, -1), 15, mode="paper", crops=2, grid=(4, 8))
    assert sorted([int((cut < 16).sum()), int((cut >= 16).sum())]) == [7, 8]


def test_tiles_are_the_squarest_that_fit() -> None:
    for rows, columns, crops in ((24, 24, 16), (24, 24, 8), (4, 10, 6), (7, 9, 15), (1, 7, 5)):
        fits = [(d, crops // d) for d in range(1, rows + 1) if crops % d == 0]
        stretch = {
            s: abs(math.log(rows * s[1] / (columns * s[0]))) for s in fits if s[1] <= columns
        }
        assert stretch[tiles((rows, columns), crops)] <= min(stretch.values()) + 1e-12


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", [1 / 576, 1 / 577, 0.0123, 1.0, 0.0])
def test_equal_attention_gives_equal_quotas(mode: str, level: float) -> None:
    """A budget that the crops divide leaves nothing to decide, also in fp32."""
    features, attention = image(576)[0], torch.full((1, 576), level)
    for crops, each in itertools.product((3, 6, 9, 12, 16), (3, 4, 13)):
        picks = select(features, attention, crops * each, mode=mode, crops=crops, grid=(24, 24))
        cut = tiles_of((24, 24), tiles((24, 24), crops)) if mode == "paper-2d" else runs(576, crops)
        chosen = set(picks[0].tolist())
        assert [len(chosen & set(crop)) for crop in cut] == [each] * crops
