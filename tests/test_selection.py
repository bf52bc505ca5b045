"""What all rules that choose tokens share, the plain ones against loops, budgets and options."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vistoken.contract import ModelFacts, Selection, Signal, View
from vistoken.cost import TransformerShape
from vistoken.errors import MethodError
from vistoken.pictures import plain
from vistoken.pruning import Pruner, cls_topk, holov, pooling, random, tokens_to_keep, top_indices
from vistoken.pruning import uniform as even

GRIDS = {1: (1, 1), 7: (1, 7), 36: (6, 6), 35: (5, 7), 40: (4, 10), 63: (7, 9), 576: (24, 24)}
Picker = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def by_holov(mode: str) -> Picker:
    def pick(features: Tensor, attention: Tensor, key: Tensor, keep: int) -> Tensor:
        grid = GRIDS[features.shape[1]]
        crops = 16 if mode != "paper-2d" else math.gcd(grid[0], 3) * math.gcd(grid[1], 3)
        return holov.select(features, attention, keep, mode=mode, crops=crops, grid=grid)

    return pick


PICKERS: dict[str, Picker] = {
    **{mode: by_holov(mode) for mode in holov.MODES},
    "cls_topk": lambda features, attention, key, keep: cls_topk.select(attention, keep),
    "random": lambda features, attention, key, keep: random.select(key, features.shape[1], keep),
    "uniform": lambda features, attention, key, keep: even.select(features.shape[1], keep).expand(
        len(features), keep
    ),
}
every_picker = pytest.mark.parametrize("pick", PICKERS.values(), ids=PICKERS.keys())


def image(tokens: int, width: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features, attention and key of one picture."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(1, tokens, width, generator=draw)
    attention = torch.softmax(2 * torch.randn(1, tokens, generator=draw), -1)
    return features, attention, torch.randint(-(2**63), 2**63 - 1, (1,), generator=draw)


def assert_valid(picks: Tensor, tokens: int, keep: int) -> None:
    assert picks.dtype == torch.int64 and picks.shape[-1] == keep
    for row in picks.tolist():
        assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < tokens


# --- every rule ----------------------------------------------------------------------------------


@every_picker
def test_picks_are_ascending_unique_and_as_many_as_asked(pick: Picker) -> None:
    for tokens in (7, 36, 40, 63, 576):
        for keep in (1, tokens // 3, tokens - 1):
            parts = [image(tokens, 5, seed=keep + i) for i in range(2)]
            picks = pick(*map(torch.cat, zip(*parts, strict=True)), keep)
            assert_valid(picks, tokens, keep)


@every_picker
@pytest.mark.parametrize("tokens", [1, 7, 36, 576])
def test_keeping_all_is_the_identity(pick: Picker, tokens: int) -> None:
    assert torch.equal(pick(*image(tokens), tokens), torch.arange(tokens)[None])


@every_picker
def test_a_batch_equals_its_images_one_by_one(pick: Picker) -> None:
    for seed, (tokens, width, keep) in enumerate([(576, 64, 64), (63, 33, 20), (36, 7, 30)]):
        parts = [image(tokens, width, seed=10 * seed + i) for i in range(3)]
        together = pick(*map(torch.cat, zip(*parts, strict=True)), keep)
        assert torch.equal(together, torch.cat([pick(*one, keep) for one in parts]))
        swapped = pick(*map(torch.cat, zip(*reversed(parts), strict=True)), keep)
        assert torch.equal(swapped, together.flip(0))


@every_picker
def test_strides_do_not_matter_and_nothing_is_written(pick: Picker) -> None:
    features, attention, key = image(36)
    expected = pick(features, attention, key, 9)
    strided = features.mT.contiguous().mT.expand(3, 36, 16), attention.expand(3, 36), key.expand(3)
    assert torch.equal(pick(*strided, 9), expected.expand(3, 9))
    assert all(map(torch.equal, image(36), (features, attention, key)))


@every_picker
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_image_stays_in_bounds_and_spoils_no_other(pick: Picker, bad: float) -> None:
    """Without reading back NaN cannot be refused; an index out of range would kill the device."""
    good = image(36)
    for where, keep in itertools.product(([0], [7], range(36)), (1, 20, 35)):
        broken = [good[0].clone(), good[1].clone(), good[2]]
        broken[1][0, list(where)] = bad
        for spoiled in (broken[0], torch.where(torch.arange(36)[:, None] == 3, bad, broken[0])):
            parts = [(spoiled, *broken[1:]), good]
            picks = pick(*map(torch.cat, zip(*parts, strict=True)), keep)
            assert_valid(picks, 36, keep)
            assert torch.equal(picks[1:], pick(*good, keep))


@every_picker
def test_a_call_in_inference_mode_leaves_nothing_behind(pick: Picker) -> None:
    """No earlier call saw 35 tokens: what this one builds must serve a training step, too."""
    with torch.inference_mode():
        before = pick(*image(35), 9)
    features, attention, key = image(35)
    after = pick(features.requires_grad_(), attention.requires_grad_(), key, 9)
    assert torch.equal(before, after)


# --- top-k ---------------------------------------------------------------------------------------


def best(row: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:keep])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_top_indices_are_the_largest_and_ties_go_to_the_lower(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(1)
    for tokens, levels in itertools.product((1, 2, 17, 63, 600), (1, 2, 5, 10_000)):
        scores = torch.randint(-levels, levels, (2, 3, tokens), generator=draw).to(dtype)
        for keep in sorted({1, tokens // 2, tokens} - {0}):
            picks = top_indices(scores, keep)
            assert picks.shape == (2, 3, keep)
            for row, found in zip(scores.flatten(0, 1), picks.flatten(0, 1), strict=True):
                assert found.tolist() == best(row.tolist(), keep)
            assert torch.equal(cls_topk.select(scores[:, 0], keep), picks[:, 0])


# --- uniform -------------------------------------------------------------------------------------


def test_uniform_is_the_middle_of_each_share() -> None:
    sizes = [(n, k) for n in range(1, 61) for k in range(1, n + 1)] + [(2**31, 1000), (576, 64)]
    for tokens, keep in sizes:
        expected = [((2 * i + 1) * tokens) // (2 * keep) for i in range(keep)]
        assert even.select(tokens, keep).tolist() == sorted(set(expected)) == expected


# --- random --------------------------------------------------------------------------------------


def chi_square_sd(picks: Tensor, tokens: int) -> float:
    """How many standard deviations chi-square of the per-token counts lies from its mean.

    Counts of draws without replacement vary by p (1 - p) and sum to a constant.
    """
    p = picks.shape[1] / tokens
    spread = len(picks) * p * (1 - p) * tokens / (tokens - 1)
    counts = torch.bincount(picks.flatten(), minlength=tokens).double()
    chi = ((counts - len(picks) * p) ** 2).sum().item() / spread
    return (chi - (tokens - 1)) / math.sqrt(2 * (tokens - 1))


def shared(one: Tensor, other: Tensor, tokens: int) -> float:
    """Standard deviations between the mean overlap of paired rows and that of chance."""
    keep, pairs = one.shape[1], len(one)
    hits = torch.zeros(pairs, tokens).scatter(1, one, 1).gather(1, other).sum(1)
    expected = keep * keep / tokens
    variance = expected * (1 - keep / tokens) * (tokens - keep) / (tokens - 1)
    return (hits.mean().item() - expected) / math.sqrt(variance / pairs)


KEYS = {
    "counting": torch.arange(-500, 500),
    "high bits": torch.arange(1000) << 50,
    "digests": torch.randint(-(2**63), 2**63 - 1, (1000,), generator=torch.Generator()),
}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize(("tokens", "keep"), [(36, 5), (63, 31), (576, 64)])
def test_random_is_uniform_over_tokens(name: str, tokens: int, keep: int) -> None:
    picks = random.select(KEYS[name], tokens, keep)
    assert_valid(picks, tokens, keep)
    assert abs(chi_square_sd(picks, tokens)) < 5


def test_random_is_uniform_over_seeds() -> None:
    picks = torch.cat([random.select(torch.tensor([7]), 36, 9, seed=s) for s in range(600)])
    assert abs(chi_square_sd(picks, 36)) < 5
    assert abs(shared(picks[:-1], picks[1:], 36)) < 5
    extremes = torch.tensor([7, 2**63 - 1, -(2**63)])
    assert_valid(random.select(extremes, 36, 9, seed=2**31 - 1), 36, 9)


def test_random_treats_every_pair_of_tokens_alike() -> None:
    """Neighbouring tokens are drawn together as often as distant ones."""
    chosen = torch.zeros(20_000, 24).scatter(1, random.select(torch.arange(20_000), 24, 8), 1)
    together = (chosen.T @ chosen)[tuple(torch.triu_indices(24, 24, offset=1))]
    p = 8 / 24 * 7 / 23
    far = (together - 20_000 * p) / math.sqrt(20_000 * p * (1 - p))
    assert far.abs().max() < 5


@pytest.mark.parametrize("step", [1, 64, 2**32, 2**62, 0x9E3779B97F4A7C15 - 2**64])
def test_random_pictures_with_near_keys_are_independent(step: int) -> None:
    keys = KEYS["digests"]
    one, other = random.select(keys, 576, 64), random.select(keys + step, 576, 64)
    for shift in (-1, 0, 1):  # nor is one the other moved along the raster
        assert abs(shared((one + shift) % 576, other, 576)) < 5
    seeded = random.select(keys, 576, 64, seed=step % 1000)  # a seed does not stand for a key
    assert step % 1000 == 0 or abs(shared(other, seeded, 576)) < 5


def test_the_checks_of_random_can_fail() -> None:
    marching = (torch.arange(1000)[:, None] + torch.arange(64)) % 576
    assert abs(shared(marching[:-1], marching[1:], 576)) > 50
    honest = random.select(torch.arange(1000), 576, 64)
    assert abs(shared(honest, honest, 576)) > 50
    assert chi_square_sd(torch.where(honest == honest[:, :1], 0, honest), 576) > 20


# --- pooling -------------------------------------------------------------------------------------


def average(features: Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Cell (i, j) averages rows floor(i R / r) to ceil((i + 1) R / r), columns likewise."""
    cells = []
    for i, j in itertools.product(range(shape[0]), range(shape[1])):
        rows = range(i * grid[0] // shape[0], -(-(i + 1) * grid[0] // shape[0]))
        columns = range(j * grid[1] // shape[1], -(-(j + 1) * grid[1] // shape[1]))
        members = [r * grid[1] + c for r in rows for c in columns]
        cells.append(features[:, members].double().mean(1))
    return torch.stack(cells, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pooling_averages_cells(dtype: torch.dtype) -> None:
    for (rows, columns), shape in (((6, 6), (3, 3)), ((7, 9), (3, 4)), ((24, 24), (8, 16))):
        features = torch.randn(2, rows * columns, 3).to(dtype)
        pooled = pooling.pool(features, (rows, columns), shape)
        expected = average(features, (rows, columns), shape)
        assert pooled.dtype == dtype
        allowed = torch.finfo(dtype).eps * expected.abs() + 1e-6
        assert ((pooled.double() - expected).abs() <= allowed).all()
        centres = pooling.cell_centres((rows, columns), shape).tolist()
        cells = itertools.product(range(shape[0]), range(shape[1]))
        for centre, (i, j) in zip(centres, cells, strict=True):
            assert abs(centre // columns + 0.5 - (i + 0.5) * rows / shape[0]) <= 0.5
            assert abs(centre % columns + 0.5 - (j + 0.5) * columns / shape[1]) <= 0.5


@pytest.mark.parametrize("grid", [(24, 24), (6, 6), (4, 10), (7, 9), (1, 7)])
def test_pooling_takes_the_budgets_that_are_grids(grid: tuple[int, int]) -> None:
    def stretch(shape: tuple[int, int]) -> float:
        return abs(math.log((grid[0] / shape[0]) / (grid[1] / shape[1])))

    total = grid[0] * grid[1]
    shapes = list(itertools.product(range(1, grid[0] + 1), range(1, grid[1] + 1)))
    good = [s for s in shapes if stretch(s) <= math.log(2.5) + 1e-9]
    works = {down * across for down, across in good}
    for keep in range(1, total + 1):
        if keep in works:
            shape = pooling.cells(grid, keep)
            assert shape in good and shape[0] * shape[1] == keep
            least = min(stretch(s) for s in good if s[0] * s[1] == keep)
            assert stretch(shape) <= least + 1e-9
            continue
        with pytest.raises(MethodError, match=f"{keep} tokens") as caught:
            pooling.cells(grid, keep)
        named = caught.value.args[0].rpartition(":")[2].strip(" .").split(", ")
        distances = sorted(abs(k - keep) for k in works)
        assert {int(k) for k in named} <= works
        assert sorted(abs(int(k) - keep) for k in named) == distances[: len(named)]
    assert (pooling.cells((24, 24), 64), pooling.cells((24, 24), 192)) == ((8, 8), (12, 16))


# --- budgets and options -------------------------------------------------------------------------

PRUNERS = (holov.HoloV, cls_topk.ClsTopK, random.Random, even.Uniform, pooling.Pooling)
every_pruner = pytest.mark.parametrize("kind", PRUNERS, ids=lambda kind: kind.name)


def test_ratio_is_the_share_removed_rounded_half_up() -> None:
    for tokens, hundredths in itertools.product((1, 2, 7, 36, 576, 2880), range(100)):
        removed = (2 * hundredths * tokens + 100) // 200  # floor(ratio N + 1/2) in whole numbers
        assert tokens_to_keep(tokens, hundredths / 100) == max(1, tokens - removed)
    assert [tokens_to_keep(576, r) for r in (0.89, 8 / 9, 2 / 3, 7 / 9)] == [63, 64, 192, 128]
    assert tokens_to_keep(576, 0.0) == 576 and tokens_to_keep(576, 1 - 1e-12) == 1


@every_pruner
def test_budget(kind: type[Pruner]) -> None:
    assert [kind(keep=64).budget(n) for n in (1, 63, 64, 576)] == [1, 63, 64, 64]
    assert [kind(ratio=r).budget(576) for r in (0, 0.5, 0.999)] == [576, 288, 1]


BAD = [
    ({}, "exactly one of ratio and keep"),
    ({"ratio": 0.5, "keep": 5}, "exactly one of ratio and keep"),
    *(({"ratio": r}, "ratio must be") for r in (-0.1, 1, 1.0, 2, math.nan, math.inf, "0.5", True)),
    *(({"keep": k}, "keep must be") for k in (0, -1, 1.5, 64.0, math.nan, "64", True, [64])),
    *(({"keep": 5, "positions": p}, "positions must be one of") for p in ("new", "", None, 1)),
]


@every_pruner
@pytest.mark.parametrize(("given", "words"), BAD, ids=str)
def test_bad_options_are_refused(kind: type[Pruner], given: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=f"{kind.name}: .*{words}"):
        kind(**given)


@pytest.mark.parametrize("bad", [-1, 0.5, True, None, "16", 2**31 + 0.5, [1]], ids=str)
def test_bad_own_options_are_refused(bad: Any) -> None:
    for kind, name in ((holov.HoloV, "mode"), (holov.HoloV, "crops"), (random.Random, "seed")):
        with pytest.raises(MethodError, match=f"{kind.name}: {name} must be"):
            kind(keep=9, **{name: bad})


@every_pruner
def test_unknown_options_name_the_nearest_and_recipes_round_trip(kind: type[Pruner]) -> None:
    with pytest.raises(MethodError, match=r"'kep'.*Did you mean 'keep'"):
        kind.from_options({"kep": 5})
    method = kind(ratio=0.5, positions="original")
    recipe = json.loads(json.dumps(method.to_dict()))
    assert recipe.pop("name") == kind.name
    assert kind.from_options(recipe) == method


# --- the methods, called as a host calls them ----------------------------------------------------


def facts(rows: int, columns: int) -> ModelFacts:
    shape = TransformerShape(2, 8, 2, 2, 4, 16, 2)
    return ModelFacts("none", (rows, columns), 1, 2, 1, 2, shape, shape, 0, 0)


def choose(method: Pruner, grid: tuple[int, int], tokens: int = 40) -> Selection | None:
    """Select 10 tokens of an image on `grid`, of which the first `tokens` are left."""
    left = torch.arange(tokens)[None]
    (stage,) = method.stages(facts(*grid))
    names = (Signal.FEATURES, Signal.CLS_ATTENTION, Signal.IMAGE_KEY)
    signals = dict(zip(names, image(tokens), strict=True))
    return method.select(View(stage, facts(*grid), plain(*grid), left, {}, signals.__getitem__), 10)


@pytest.mark.parametrize("name", PICKERS)
def test_methods_are_their_functions(name: str) -> None:
    made = {kind.name: kind for kind in PRUNERS}
    method = made[name](keep=10) if name in made else holov.HoloV(keep=10, mode=name, crops=2)
    if name in holov.MODES:
        features, attention, _ = image(40)
        expected = holov.select(features, attention, 10, mode=name, crops=2, grid=(4, 10))
    else:
        expected = PICKERS[name](*image(40), 10)
    assert torch.equal(choose(method, (4, 10)).indices, expected)


def test_pooling_gives_tokens() -> None:
    selection = choose(pooling.Pooling(keep=10), (4, 10))
    assert (selection.tokens - average(image(40)[0], (4, 10), (2, 5))).abs().max() < 1e-6
    assert_valid(selection.indices, 40, 10)
    with pytest.raises(MethodError, match="11 tokens do not form a grid"):
        pooling.Pooling(keep=11).stages(facts(6, 6))
    assert pooling.Pooling(keep=37).stages(facts(6, 6))  # keeps all: nothing to pool


@pytest.mark.parametrize(
    "method", [pooling.Pooling(keep=10), holov.HoloV(keep=10, mode="paper-2d", crops=2)], ids=str
)
def test_cells_and_tiles_need_the_whole_grid(method: Pruner) -> None:
    with pytest.raises(MethodError, match="whole grid of 40 tokens.* left 20"):
        choose(method, (4, 10), 20)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mode": "papr"}, "'papr'"),
        ({"mode": "paper-2d"}, "grid of 36"),
        ({"mode": "paper-2d", "grid": (5, 7)}, r"\(5, 7\)"),
        ({"mode": "paper-2d", "grid": (6, 6), "crops": 17}, "17 crops"),
        ({"crops": 0}, "at least 1"),
        ({"keep": 0}, "at least 1"),
        ({"features": torch.zeros(1, 35, 4)}, "agree"),
    ],
)
def test_holov_refuses_what_cannot_be(given: dict[str, Any], words: str) -> None:
    features, attention, _ = image(36)
    with pytest.raises(MethodError, match=words):
        holov.select(**{"features": features, "cls_attention": attention, "keep": 9, **given})


def test_tiles_that_do_not_fit_are_refused_before_the_model_runs() -> None:
    with pytest.raises(MethodError, match="17 crops"):
        holov.HoloV(keep=9, mode="paper-2d", crops=17).stages(facts(6, 6))
