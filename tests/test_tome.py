"""ToMe: schedules against a search over all of them, and whole towers against loops over lists."""

from __future__ import annotations

import json
import math
import random
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vistoken.contract import ModelFacts, Place, Signal, Stage, View
from vistoken.cost import TransformerShape
from vistoken.errors import MethodError
from vistoken.pictures import plain
from vistoken.pruning.tome import ORDERS, SCHEDULES, ToMe, merges

HEADS, DIM, WIDTH = 2, 3, 5


def facts(depth: int, prefix: int = 1, grid: tuple[int, int] = (5, 7), **more: Any) -> ModelFacts:
    """A tower whose layer `depth` is projected."""
    shape = TransformerShape(2, 8, 2, 2, 4, 16, 2)
    return ModelFacts("none", grid, prefix, depth + 2, depth, 4, shape, shape, 0, 0, **more)


# --- the schedule --------------------------------------------------------------------------------


def run_schedule(tokens: int, layers: int, keep: int, schedule: str, first: int = 0) -> list[int]:
    found = []
    for layer in range(first, first + layers):
        count = merges(tokens, layer, first + layers - 1, keep, schedule)
        assert 0 <= count <= tokens // 2
        found.append(count)
        tokens -= count
    assert tokens == max(keep, 0) or tokens < keep
    return found


@cache
def least_peak(tokens: int, layers: int, keep: int) -> float:
    """The smallest possible largest number of merges in a layer, over every schedule there is."""
    if layers == 0:
        return 0 if tokens == keep else math.inf
    return min(
        max(r, least_peak(tokens - r, layers - 1, keep))
        for r in range(min(tokens // 2, tokens - keep) + 1)
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_budget_within_reach_is_met(schedule: str) -> None:
    choose = random.Random(1)
    for _ in range(400):
        tokens, layers = choose.randint(1, 700), choose.choice([1, 2, 3, 5, 12, 22, 26])
        least = math.ceil(tokens / 2**layers)
        keep = choose.choice([least, choose.randint(least, tokens), tokens, tokens + 3])
        counts = run_schedule(tokens, layers, keep, schedule, first=choose.randint(0, 3))
        assert sum(counts) == max(tokens - keep, 0)
        assert sum(counts) > 0 or keep >= tokens


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_budget_out_of_reach_names_the_smallest_that_works(schedule: str) -> None:
    for tokens, layers in ((576, 3), (35, 2), (7, 1), (576, 5)):
        with pytest.raises(MethodError, match=f"{tokens} .* smallest budget is") as caught:
            merges(tokens, 0, layers - 1, 1, schedule)
        least = int(caught.value.args[0].rstrip(".").split()[-1])
        counts = run_schedule(tokens, layers, least, schedule)
        assert sum(counts) == tokens - least
        with pytest.raises(MethodError, match="smallest budget"):
            merges(tokens, 0, layers - 1, least - 1, schedule)


def test_constant_has_the_lowest_peak_of_all_schedules() -> None:
    for tokens, layers in ((13, 3), (24, 4), (31, 5)):
        for keep in range(math.ceil(tokens / 2**layers), tokens):
            counts = run_schedule(tokens, layers, keep, "constant")
            assert max(counts) == least_peak(tokens, layers, keep)
            assert counts == sorted(counts, reverse=True)


def test_constant_is_even_where_half_of_the_tokens_is_no_limit() -> None:
    counts = run_schedule(576, 22, 64, "constant")
    assert set(counts) == {23, 24} and counts == sorted(counts, reverse=True)
    assert run_schedule(576, 22, 576 - 44, "constant") == [2] * 22
    tight = run_schedule(576, 22, 4, "constant")  # 26 each would exceed half of the last layers
    assert set(tight[:14]) == {28, 29} and tight[-1] < 14


def test_decreasing_falls_linearly_from_twice_the_mean() -> None:
    for tokens, layers, keep in ((576, 22, 64), (576, 22, 192), (729, 26, 100), (576, 7, 288)):
        counts = run_schedule(tokens, layers, keep, "decreasing")
        peak = 2 * (tokens - keep) / layers
        for layer, count in enumerate(counts):
            assert abs(count - peak * (layers - 1 - layer) / (layers - 1)) <= 1.5
        assert all(a >= b for a, b in pairwise(counts)) and counts[-1] <= 1


def test_merges_beyond_the_last_layer_are_none_and_bad_names_are_refused() -> None:
    assert merges(50, 5, 4, 10, "constant") == 0
    with pytest.raises(MethodError, match="'linear'"):
        merges(50, 0, 4, 10, "linear")


# --- a tower in loops ----------------------------------------------------------------------------


class Tower:
    """Keys and hidden states that depend on the token only, so order and batch are free."""

    def __init__(self, depth: int) -> None:
        self.heads = torch.randn(depth, HEADS, WIDTH, DIM).double()
        self.mix = torch.randn(depth, WIDTH, WIDTH).double() / WIDTH**0.5

    def keys(self, layer: int, tokens: Tensor) -> Tensor:
        """[I, L, C] to [I, H, L, D]."""
        return tokens[:, None].to(self.heads.dtype) @ self.heads[layer]

    def after(self, layer: int, tokens: Tensor) -> Tensor:
        return torch.tanh(tokens @ self.mix[layer].to(tokens.dtype))


def drive(
    method: ToMe,
    tower: Tower,
    about: ModelFacts,
    x: Tensor,
    keep: int,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the method as a host does; returns origin, tokens without prefix, and sizes."""
    prefix, memory = about.prefix_tokens, {}
    rows, total = x.shape[0], x.shape[1] - prefix
    origin, sizes = torch.arange(total).expand(rows, total), torch.ones(rows, total)
    for stage in method.stages(about):
        if stage.place is not Place.VISION_BLOCK:
            continue
        layer = stage.layer
        if origin.shape[1] > keep:
            signals = {
                Signal.VISION_KEYS: tower.keys(layer, x).float(),
                Signal.HIDDEN: x[:, prefix:],
                Signal.SIZES: sizes,
            }
            mask = None if visible is None else visible.gather(1, origin)
            picture = plain(*about.grid)
            view = View(stage, about, picture, origin, memory, signals.__getitem__, mask, prefix)
            chosen = method.select(view, keep)
            if chosen is not None:
                assert (chosen.indices.diff(dim=1) > 0).all()
                origin, sizes = origin.gather(1, chosen.indices), chosen.sizes
                x = torch.cat([x[:, :prefix], chosen.tokens], 1)
                if visible is None:
                    assert sizes.sum(1).tolist() == [total] * rows
        x = tower.after(layer, x)
    return origin, x[:, prefix:], sizes


def slow_tower(
    tower: Tower, counts: list[int], x: Tensor, prefix: int, released: bool
) -> list[tuple[int, list[float], int]]:
    """One picture [P + N, C] as a list of (raster index, hidden, size), merged one by one."""
    tokens = [(i, row, 1) for i, row in enumerate(x[prefix:])]
    for layer, count in enumerate(counts):
        keys = [tower.keys(layer, row[None, None]).mean(1)[0, 0] for _, row, _ in tokens]
        sets: tuple[list[int], list[int]] = ([], [])
        for place in range(len(tokens)):
            sets[(place + prefix) % 2].append(place)
        edges = []
        for a in sets[0]:
            scores = [float(torch.cosine_similarity(keys[a], keys[b], dim=0)) for b in sets[1]]
            edges.append((max(scores), a, sets[1][scores.index(max(scores))]))
        strongest = sorted(edges, key=lambda edge: -edge[0])[:count]
        gone = {a for _, a, _ in strongest}
        merged = {}
        for b in sets[1]:
            group = [tokens[b]] + [tokens[a] for _, a, target in strongest if target == b]
            size = sum(n for _, _, n in group)
            merged[b] = (tokens[b][0], sum(row * n for _, row, n in group) / size, size)
        rest = {a: tokens[a] for a in sets[0] if a not in gone}
        everything = {**rest, **merged}
        order = list(everything) if released else sorted(everything)
        tokens = [everything[place] for place in order]
        tokens = [(i, tower.after(layer, row), n) for i, row, n in tokens]
    return sorted(((i, row.tolist(), n) for i, row, n in tokens), key=lambda token: token[0])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_towers_equal_loops(order: str, schedule: str, prefix: int) -> None:
    for depth, keep in ((1, 20), (4, 11), (6, 2), (5, 34)):
        tower, about = Tower(depth), facts(depth, prefix)
        x = torch.randn(2, prefix + 35, WIDTH).double()
        method = ToMe(keep=keep, schedule=schedule, order=order)
        origin, tokens, sizes = drive(method, tower, about, x, keep)
        counts = run_schedule(35, depth, keep, schedule)
        assert origin.shape == (2, keep)
        for row in range(2):
            expected = slow_tower(tower, counts, x[row], prefix, order == "released")
            assert origin[row].tolist() == [i for i, _, _ in expected]
            assert sizes[row].tolist() == [n for _, _, n in expected]
            rows = torch.tensor([r for _, r, _ in expected], dtype=torch.float64)
            torch.testing.assert_close(tokens[row], rows)


def test_the_two_orders_form_other_sets_from_the_second_merge_on() -> None:
    tower, x = Tower(2), torch.randn(3, 36, WIDTH).double()
    for depth, same in ((1, True), (2, False)):
        picks = [drive(ToMe(keep=20, order=o), tower, facts(depth), x, 20)[0] for o in ORDERS]
        assert torch.equal(*picks) is same


def test_pictures_do_not_depend_on_their_batch() -> None:
    tower, x = Tower(5), torch.randn(4, 36, WIDTH).double()
    visible = torch.rand(4, 35) > 0.3
    for mask in (None, visible):
        whole = drive(ToMe(keep=9), tower, facts(5), x, 9, mask)
        for row in range(4):
            own = None if mask is None else mask[row : row + 1]
            alone = drive(ToMe(keep=9), tower, facts(5), x[row : row + 1], 9, own)
            assert torch.equal(alone[0][0], whole[0][row])
            torch.testing.assert_close(alone[1][0], whole[1][row])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tiles_keep_all_visible_tokens_that_fit(schedule: str, prefix: int) -> None:
    """Whatever the mask, min(keep, visible) visible tokens leave the tower; hosts count on it."""
    choose, left = random.Random(prefix), 0
    for _ in range(14):
        order = choose.choice(ORDERS)
        rows, columns = choose.randint(1, 6), choose.randint(1, 7)
        total, depth = rows * columns, choose.randint(1, 6)
        least = math.ceil(total / 2**depth)
        keep = choose.choice([least, choose.randint(least, total)])
        visible = torch.rand(6, total) < torch.tensor([0, 0.1, 0.4, 0.8, 0.97, 2.0])[:, None]
        about = facts(depth, prefix, (rows, columns), tiled=True)
        method = ToMe(keep=1, schedule=schedule, order=order)
        x = torch.randn(6, prefix + total, WIDTH).double()
        origin, _, sizes = drive(method, Tower(depth), about, x, keep, visible)
        seen = visible.gather(1, origin)
        assert seen.sum(1).tolist() == visible.sum(1).clamp(max=keep).tolist()
        # visible tokens stand for all visible ones, padding for padding
        assert (sizes * seen).sum(1).tolist() == visible.sum(1).tolist()
        rest = sizes.sum(1)
        assert (rest <= total).all() and (rest[seen.all(1)] == visible.sum(1)[seen.all(1)]).all()
        left += int((~seen).sum())
    assert left > 0  # some tiles had room for padding


# --- the method, called as a host calls it -------------------------------------------------------


def test_stages() -> None:
    found = ToMe(keep=8).stages(facts(4))
    assert [(s.place, s.layer) for s in found] == [(Place.VISION_BLOCK, n) for n in range(4)]
    assert all(s.signals == {Signal.VISION_KEYS, Signal.HIDDEN, Signal.SIZES} for s in found)
    *inside, last = ToMe(ratio=0.8, last_layer=2).stages(facts(4, tiled=True))
    assert [s.layer for s in inside] == [0, 1, 2]
    assert last == Stage(Place.PROJECTED, None, frozenset({Signal.SIZES}))
    assert {s.place for s in (*inside, last)} == ToMe.places


@pytest.mark.parametrize(
    ("method", "about", "words"),
    [
        (ToMe(keep=3), facts(3), "35 visual tokens cannot shrink to 3 in 3 .* budget is 5"),
        (ToMe(keep=8, last_layer=1), facts(5), "in 2 .* budget is 9"),
        (ToMe(ratio=0.99), facts(4), "smallest budget is 3"),
        (ToMe(keep=8, last_layer=5), facts(5), "last_layer must be at most 4"),
        (ToMe(keep=8), facts(0), "layer 0"),
    ],
    ids=str,
)
def test_models_that_cannot_work_are_refused(method: ToMe, about: ModelFacts, words: str) -> None:
    with pytest.raises(MethodError, match=f"tome.*{words}"):
        method.stages(about)


def test_a_budget_that_keeps_all_is_no_trouble() -> None:
    assert ToMe(keep=35).stages(facts(1)) and ToMe(ratio=0.0).stages(facts(1))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"schedule": "linear"}, "schedule must be one of 'constant', 'decreasing'"),
        ({"order": "lists"}, "order must be one of 'raster', 'released'"),
        ({"last_layer": -1}, "last_layer must be at least 0"),
        ({"last_layer": 1.5}, "last_layer must be a whole number"),
    ],
)
def test_bad_options_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=f"tome: {words}"):
        ToMe(keep=9, **given)


def test_recipes_round_trip() -> None:
    method = ToMe(ratio=0.5, schedule="decreasing", last_layer=3, order="released")
    recipe = json.loads(json.dumps(method.to_dict()))
    assert recipe.pop("name") == "tome" and ToMe.from_options(recipe) == method


def test_a_layer_without_merges_is_left_alone() -> None:
    about = facts(4)
    stage = ToMe(keep=8).stages(about)[0]

    def read(signal: Signal) -> Any:
        raise AssertionError(f"{signal} was read")

    origin = torch.arange(8).expand(2, 8)
    view = View(stage, about, plain(5, 7), origin, {}, read, None, 1)
    assert ToMe(keep=8).select(view, 8) is None


def test_the_cut_behind_the_projector_drops_the_smallest() -> None:
    about = facts(4, tiled=True)
    stage = ToMe(keep=4).stages(about)[-1]
    sizes = torch.tensor([[1.0, 5, 1, 2, 1, 9], [3, 3, 3, 3, 3, 3]])
    view = View(
        stage, about, plain(5, 7), torch.arange(6).expand(2, 6), {}, {Signal.SIZES: sizes}.get
    )
    assert ToMe(keep=4).select(view, 4).indices.tolist() == [[0, 1, 3, 5], [0, 1, 2, 3]]


def test_gradients_flow_through_the_tower() -> None:
    tower = Tower(4)
    x = torch.randn(2, 36, WIDTH, dtype=torch.float64, requires_grad=True)
    drive(ToMe(keep=5), tower, facts(4), x, 5)[1].square().sum().backward()
    assert (x.grad[:, 1:].abs().sum(-1) > 0).all()


def test_no_value_is_read_back() -> None:
    """Fake tensors have no values: anything that needs one raises."""
    about = facts(3)
    with FakeTensorMode():
        for mask in (None, torch.rand(2, 35) > 0.5):
            origin = torch.arange(35).expand(2, 35)
            signals = {
                Signal.VISION_KEYS: torch.randn(2, HEADS, 36, DIM, dtype=torch.bfloat16),
                Signal.HIDDEN: torch.randn(2, 35, WIDTH, dtype=torch.bfloat16),
                Signal.SIZES: torch.ones(2, 35),
            }
            method = ToMe(keep=9, order="released")
            view = View(
                method.stages(about)[0],
                about,
                plain(5, 7),
                origin,
                {},
                signals.__getitem__,
                mask,
                1,
            )
            chosen = method.select(view, 9)
            assert chosen.indices.shape == (2, 26) and chosen.tokens.shape == (2, 26, WIDTH)
            assert chosen.tokens.dtype == torch.bfloat16 and chosen.sizes.dtype == torch.float32
