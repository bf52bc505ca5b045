"""ZOO-Prune's selection against loops, on plain, tiled and thinned pictures, and as a method."""

from __future__ import annotations

import copy
import math
import random
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vistoken.contract import ModelFacts, Signal, View
from vistoken.cost import TransformerShape
from vistoken.errors import MethodError
from vistoken.pictures import Part, Picture, plain
from vistoken.pruning import divprune
from vistoken.pruning._pruner import apportion
from vistoken.pruning.zeroth_order import (
    MODES,
    ZerothOrder,
    select,
    sensitivity,
    view_shares,
)

TILED = Picture((Part((3,), (4,)), Part((2, 3), (4, 4))), separators=(12, 21))
PICTURES = {
    "plain": plain(4, 10),
    "tiles": TILED,
    "uneven": Picture((Part((1, 5), (3, 2)),)),
    "frames": Picture((Part((3,), (3,)),) * 4, kind="video"),
    "dot": Picture((Part((1,), (1,)), Part((5,), (4,)))),
}


def tokens_of(batch: int, tokens: int, width: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def llava(e: int = 12, h: int = 24, c: int = 16, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(e, h), nn.GELU(), nn.Linear(h, c))


# --- the oracle ----------------------------------------------------------------------------------


def order(projected: Tensor, values: list[float], keep: int) -> list[int]:
    """The rule for one picture, in fp64, one candidate and one pick at a time."""
    low, high = min(values), max(values)
    weight = [(v - low) / (high - low) if high > low else 1.0 for v in values]
    rows = projected.double() / projected.double().norm(dim=1, keepdim=True)
    apart = (1 - rows @ rows.T).tolist()
    picks = [weight.index(max(weight))]
    nearest = apart[picks[0]]
    while len(picks) < keep:
        rest = [i for i in range(len(rows)) if i not in picks]
        picks.append(max(rest, key=lambda i: weight[i] * nearest[i]))
        nearest = list(map(min, nearest, apart[picks[-1]]))
    return picks


def shares(keep: int, sizes: list[int]) -> list[int]:
    """Largest remainder in exact fractions, one leftover at a time."""
    exact = [Fraction(keep * size, sum(sizes)) for size in sizes]
    parts = [math.floor(x) for x in exact]
    while sum(parts) < keep:
        gaps = [x - p for x, p in zip(exact, parts, strict=True)]
        parts[gaps.index(max(gaps))] += 1
    return parts


def by_view(projected: Tensor, values: Tensor, picture: Picture, keep: int) -> list[int]:
    tiles = picture.tile_of().tolist()
    members = [[i for i, t in enumerate(tiles) if t == tile] for tile in range(max(tiles) + 1)]
    picks = []
    for own, count in zip(members, shares(keep, [len(m) for m in members]), strict=True):
        if count:
            picks += [own[i] for i in order(projected[own], values[own].tolist(), count)]
    return sorted(picks)


# --- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_picks_follow_the_rule(dtype: torch.dtype) -> None:
    for seed in range(12):
        projected, values = tokens_of(2, 14, 6, seed).to(dtype), torch.rand(2, 14)
        for keep in (1, 2, 5, 13, 14):
            picks = select(projected, values, keep)
            assert picks.dtype == torch.int64
            for b in range(2):
                expected = sorted(order(projected[b], values[b].tolist(), keep))
                assert picks[b].tolist() == expected


def test_larger_pictures_follow_the_rule() -> None:
    for tokens, width, keep in ((63, 5, 20), (90, 24, 30), (576, 64, 64)):
        projected, values = tokens_of(1, tokens, width, tokens), torch.rand(1, tokens) * 50
        expected = sorted(order(projected[0], values[0].tolist(), keep))
        assert select(projected, values, keep).tolist() == [expected]


def test_both_factors_count() -> None:
    projected, values = tokens_of(1, 64), torch.rand(1, 64)
    picks = select(projected, values, 16)
    alone = values.topk(16).indices.sort().values
    assert not torch.equal(picks, alone)
    assert not torch.equal(picks, divprune.select(projected, 16))
    assert not torch.equal(picks, select(projected, values.flip(1), 16))
    assert not torch.equal(picks, select(projected.flip(1), values, 16))


def test_the_first_pick_is_the_most_sensitive() -> None:
    projected, values = tokens_of(5, 40), torch.rand(5, 40)
    assert torch.equal(select(projected, values, 1)[:, 0], values.argmax(-1))
    for keep in (2, 9, 30):
        assert (select(projected, values, keep) == values.argmax(-1, keepdim=True)).any(-1).all()


def test_the_least_sensitive_comes_last() -> None:
    projected, values = tokens_of(3, 20), torch.rand(3, 20)
    missing = select(projected, values, 19) != torch.arange(19)
    last = torch.where(missing.any(-1), missing.int().argmax(-1), 19)
    assert torch.equal(last, values.argmin(-1))


@pytest.mark.parametrize("level", [0.0, 1e-3, 7.0])
def test_constant_sensitivity_leaves_diversity_from_token_0(level: float) -> None:
    projected = tokens_of(2, 30)
    values = torch.full((2, 30), level)
    picks = select(projected, values, 12)
    for b in range(2):
        assert picks[b].tolist() == sorted(order(projected[b], [level] * 30, 12))
    assert (select(projected, values, 1) == 0).all()
    noise = values * (1 + 1e-7 * torch.randn(2, 30))  # rounding is no difference
    assert torch.equal(select(projected, noise, 12), picks)


@pytest.mark.parametrize("kinds", [1, 2, 5])
def test_equal_tokens_are_never_picked_twice(kinds: int) -> None:
    projected = tokens_of(1, kinds)[:, torch.arange(40) % kinds]
    for values in (torch.ones(1, 40), torch.rand(1, 40), projected.norm(dim=-1)):
        for keep in (1, 7, 39):
            picks = select(projected, values, keep)[0].tolist()
            assert picks == sorted(set(picks)) and len(picks) == keep


def test_keeping_all_is_the_identity() -> None:
    for tokens, keep in ((1, 1), (7, 7), (7, 99)):
        picks = select(tokens_of(2, tokens), torch.rand(2, tokens), keep)
        assert torch.equal(picks, torch.arange(tokens).expand(2, tokens))


def test_order_of_the_tokens_does_not_matter() -> None:
    projected, values, moved = tokens_of(1, 70), torch.rand(1, 70), torch.randperm(70)
    picks = select(projected[:, moved], values[:, moved], 15)
    assert torch.equal(moved[picks].sort().values, select(projected, values, 15))


def test_a_batch_equals_its_pictures_one_by_one() -> None:
    projected, values = tokens_of(4, 90, 32), torch.rand(4, 90)
    together = select(projected, values, 25)
    alone = [select(projected[b : b + 1], values[b : b + 1], 25) for b in range(4)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_picture_stays_in_bounds_and_spoils_no_other(bad: float) -> None:
    projected, values = tokens_of(2, 36), torch.rand(2, 36)
    good = select(projected[1:], values[1:], 20)
    for where in ([0], [7, 8], list(range(36))):
        spoiled_tokens, spoiled_values = projected.clone(), values.clone()
        spoiled_tokens[0, where] = bad
        spoiled_values[0, where] = bad
        for given in ((spoiled_tokens, values), (projected, spoiled_values)):
            picks = select(*given, 20)
            assert len(set(picks[0].tolist())) == 20 and picks.min() >= 0 and picks.max() < 36
            assert torch.equal(picks[1:], good)
        spoiled_values[0, where] = 0.0
        assert torch.equal(picks, select(projected, spoiled_values, 20))


@pytest.mark.parametrize(
    ("projected", "values", "keep", "words"),
    [
        ((5, 3), (5, 3), 2, r"\[5, 3\]"),
        ((1, 5, 3), (1, 5, 3), 2, "must agree"),
        ((1, 5, 3), (1, 5), 0, "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(
    projected: tuple[int, ...], values: tuple[int, ...], keep: int, words: str
) -> None:
    with pytest.raises(MethodError, match=words):
        select(torch.zeros(projected), torch.zeros(values), keep)


# --- the method ----------------------------------------------------------------------------------


def facts() -> ModelFacts:
    shape = TransformerShape(2, 8, 2, 2, 4, 16, 2)
    return ModelFacts("none", (4, 10), 1, 2, 1, 2, shape, shape, 0, 0)


def view_of(
    method: ZerothOrder,
    projector: nn.Module,
    encoded: Tensor,
    picture: Picture,
    origin: Tensor | None = None,
) -> View:
    (stage,) = method.stages(facts())
    with torch.no_grad():
        signals: dict[Signal, Any] = {
            Signal.ENCODED: encoded,
            Signal.PROJECTOR: projector,
            Signal.FEATURES: projector(encoded),
        }
    if origin is None:
        origin = torch.arange(encoded.shape[1]).repeat(len(encoded), 1)
    return View(stage, facts(), picture, origin, {}, signals.__getitem__)


def run(method: ZerothOrder, view: View, keep: int) -> Tensor:
    picks = method.select(view, keep).indices
    assert picks.dtype == torch.int64 and picks.shape == (view.images, keep)
    assert (picks.diff(dim=1) > 0).all() and picks.min() >= 0 and picks.max() < view.tokens
    return picks


@pytest.mark.parametrize("mode", MODES)
def test_the_method_is_its_functions(mode: str) -> None:
    projector, encoded = llava(), tokens_of(2, 40)
    method = ZerothOrder(keep=10, mode=mode, directions=8, step=0.1, seed=3)
    generator = torch.Generator().manual_seed(3)
    options: dict[str, Any] = {"directions": 8, "step": 0.1, "generator": generator}
    values = sensitivity(projector, encoded, mode=mode, **options)
    picks = run(method, view_of(method, projector, encoded, plain(4, 10)), 10)
    assert torch.equal(picks, select(projector(encoded), values, 10))


def test_seeds_and_directions_change_the_draw() -> None:
    projector, encoded = llava(), tokens_of(1, 576)

    def picks(**options: Any) -> list[int]:
        method = ZerothOrder(keep=64, mode="jvp", **{"directions": 2, **options})
        return run(method, view_of(method, projector, encoded, plain(24, 24)), 64)[0].tolist()

    assert picks() == picks() and picks() == picks(seed=0)
    assert picks() != picks(seed=1) and picks() != picks(directions=3)


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_keeps_the_same_tokens_in_any_batch(mode: str) -> None:
    projector, encoded = llava(), tokens_of(3, 40)
    method = ZerothOrder(keep=10, mode=mode)
    together = run(method, view_of(method, projector, encoded, plain(4, 10)), 10)
    for b in range(3):
        alone = view_of(method, projector, encoded[b : b + 1], plain(4, 10))
        assert torch.equal(run(method, alone, 10)[0], together[b])


def test_a_linear_projector_leaves_diversity() -> None:
    projector, encoded = nn.Linear(12, 16), tokens_of(1, 40)
    for mode in ("exact", "jvp"):
        method = ZerothOrder(keep=10, mode=mode)
        picks = run(method, view_of(method, projector, encoded, plain(4, 10)), 10)
        assert torch.equal(picks, select(projector(encoded), torch.ones(1, 40), 10))


@pytest.mark.parametrize("mode", MODES)
def test_a_half_precision_model_keeps_the_tokens_of_the_fp32_model(mode: str) -> None:
    """At least 95 of 100: the picks differ only where rounding the features makes them."""
    shared = 0
    for seed in range(4):
        projector = llava(32, 64, 48, seed)
        patches = torch.nn.functional.interpolate(
            torch.randn(1, 32, 6, 6, generator=torch.Generator().manual_seed(seed)), (24, 24)
        )
        encoded = patches.flatten(2).mT + tokens_of(1, 576, 32, seed) / 4
        encoded = encoded * torch.logspace(-0.5, 0.5, 576)[torch.randperm(576)][:, None]
        method, half = ZerothOrder(keep=64, mode=mode), copy.deepcopy(projector).bfloat16()
        wide = run(method, view_of(method, projector, encoded, plain(24, 24)), 64)
        low = run(method, view_of(method, half, encoded.bfloat16(), plain(24, 24)), 64)
        shared += len(set(wide[0].tolist()) & set(low[0].tolist()))
    assert shared >= 0.95 * 4 * 64


# --- tiled pictures ------------------------------------------------------------------------------


def test_quotas_are_largest_remainders() -> None:
    draw = random.Random(0)
    for _ in range(300):
        sizes = [draw.randint(1, 30) for _ in range(draw.randint(1, 9))]
        keep = draw.randint(1, sum(sizes))
        found = apportion(keep, sizes)
        assert found == shares(keep, sizes) and sum(found) == keep
        assert all(q <= size for q, size in zip(found, sizes, strict=True))
    assert apportion(322, [576] * 5) == [65, 65, 64, 64, 64]
    assert apportion(2, [4, 4, 4]) == [1, 1, 0]


@pytest.mark.parametrize("name", PICTURES)
def test_views_are_chosen_from_on_their_own(name: str) -> None:
    picture, draw = PICTURES[name], random.Random(name)
    projector, encoded = llava(), tokens_of(2, picture.tokens)
    values = sensitivity(projector, encoded)
    for keep in {1, 2, picture.tokens - 1, *draw.sample(range(3, picture.tokens - 1), 6)}:
        method = ZerothOrder(keep=keep)
        view = view_of(method, projector, encoded, picture)
        picks = run(method, view, keep)
        for b in range(2):
            assert picks[b].tolist() == by_view(view.features[b], values[b], picture, keep)


def test_views_can_be_joined() -> None:
    projector, encoded = llava(), tokens_of(2, TILED.tokens)
    values, joined = sensitivity(projector, encoded), ZerothOrder(keep=11, per_view=False)
    view = view_of(joined, projector, encoded, TILED)
    picks = run(joined, view, 11)
    assert torch.equal(picks, select(view.features, values, 11))
    assert not torch.equal(picks, run(ZerothOrder(keep=11), view, 11))


def test_a_thinned_picture_is_one_view() -> None:
    projector, method = llava(), ZerothOrder(keep=11)
    origin = torch.stack([torch.randperm(TILED.tokens)[:20].sort().values for _ in range(2)])
    view = view_of(method, projector, tokens_of(2, 20), TILED, origin)
    values = sensitivity(projector, tokens_of(2, 20))
    assert torch.equal(run(method, view, 11), select(view.features, values, 11))


def test_a_call_in_inference_mode_leaves_nothing_behind() -> None:
    picture, projector = Picture((Part((2, 3), (3, 2)),)), llava()
    encoded, method = tokens_of(1, picture.tokens, seed=9), ZerothOrder(keep=7, mode="jvp", seed=5)
    with torch.inference_mode():
        before = run(method, view_of(method, projector, encoded, picture), 7)
    after = run(method, view_of(method, projector, encoded.requires_grad_(), picture), 7)
    assert torch.equal(before, after)
    assert not any(part.tokens.is_inference() for part in view_shares(picture, 7))


class Watch(TorchDispatchMode):
    """Notes the most numbers in one tensor, and every operation that waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in ("local_scalar", "nonzero", "masked_select", "item")):
            self.waits.append(str(func))
        if isinstance(made, Tensor) and made.untyped_storage().nbytes():
            self.largest = max(self.largest, made.untyped_storage().nbytes() // 4)
        return made


@pytest.mark.parametrize("name", ["plain", "tiles"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_read_back_and_no_large_tensor_made(name: str, mode: str) -> None:
    projector, picture = llava(12, 24, 64), PICTURES[name]
    encoded, method = tokens_of(2, picture.tokens), ZerothOrder(keep=9, mode=mode, directions=2)
    view = view_of(method, projector, encoded, picture)
    expected = run(method, view, 9)  # keeps what a second call finds
    with Watch() as seen:
        found = method.select(view, 9).indices
    assert torch.equal(found, expected) and seen.waits == []
    assert 0 < seen.largest <= 2 * 2 * picture.tokens * 64  # directions x I x N x C


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [{"mode": "zeroth"}, {"directions": 0}, {"step": 0.0}, {"seed": -1}, {"per_view": 1}]
)
def test_options_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=next(iter(given))):
        ZerothOrder(keep=5, **given)


def test_a_projector_without_closed_form_is_refused_with_the_way_out() -> None:
    projector, method = nn.Sequential(nn.Linear(12, 16), nn.Tanh()), ZerothOrder(keep=5)
    view = view_of(method, projector, tokens_of(1, 40), plain(4, 10))
    with pytest.raises(MethodError, match="use mode='jvp'"):
        method.select(view, 5)
    sampled = ZerothOrder(keep=5, mode="jvp")
    run(sampled, view_of(sampled, projector, tokens_of(1, 40), plain(4, 10)), 5)
