"""VisionZip against loops over tokens, for plain and tiled pictures."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from device_reads import Reads
from visionzip_oracle import merged_feature, roles, shares
from vistoken.contract import ModelFacts, Selection, Signal, View
from vistoken.cost import TransformerShape
from vistoken.errors import MethodError
from vistoken.pictures import Part, Picture, plain
from vistoken.pruning import cls_topk
from vistoken.pruning.visionzip import (
    VisionZip,
    apportion,
    assign,
    choose,
    merge,
    split,
    tile_layout,
)

TILED = Picture((Part((3,), (4,)), Part((2, 3), (4, 4))), separators=(12, 21))
PICTURES = {
    "plain": plain(4, 10),
    "row": plain(1, 7),
    "tiles": TILED,
    "uneven": Picture((Part((1, 5), (3, 2)),)),
    "frames": Picture((Part((3,), (3,)),) * 4, kind="video"),
    "dot": Picture((Part((1,), (1,)), Part((5,), (4,)))),
}


def facts(grid: tuple[int, int] = (4, 10)) -> ModelFacts:
    shape = TransformerShape(2, 8, 2, 2, 4, 16, 2)
    return ModelFacts("none", grid, 1, 4, 2, 4, shape, shape, 0, 0)


# --- inputs --------------------------------------------------------------------------------------


@dataclass
class Inputs:
    attention: Tensor
    keys: Tensor
    encoded: Tensor
    projector: nn.Module
    prefix: int

    def rows(self, *pictures: int) -> Inputs:
        at = list(pictures)
        taken = (x[at] for x in (self.attention, self.keys, self.encoded))
        return Inputs(*taken, self.projector, self.prefix)

    def read(self, signal: Signal) -> Any:
        if signal is Signal.FEATURES:
            return self.projector(self.encoded)
        return {
            Signal.CLS_ATTENTION: self.attention,
            Signal.VISION_KEYS: self.keys,
            Signal.ENCODED: self.encoded,
            Signal.PROJECTOR: self.projector,
        }[signal]


def inputs(
    images: int, tokens: int, *, seed: int = 0, prefix: int = 1, dtype: torch.dtype = torch.float32
) -> Inputs:
    draw = torch.Generator().manual_seed(seed)
    attention = torch.softmax(2 * torch.randn(images, tokens, generator=draw), -1)
    keys = torch.randn(images, 3, prefix + tokens, 5, generator=draw)
    keys[:, :, :prefix] *= 1e4
    encoded = torch.randn(images, tokens, 6, generator=draw)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 8))
    return Inputs(attention, keys.to(dtype), encoded.to(dtype), projector.to(dtype), prefix)


def view_of(method: VisionZip, given: Inputs, picture: Picture) -> View:
    images, tokens = given.attention.shape
    (stage,) = method.stages(facts())
    origin = torch.arange(tokens).repeat(images, 1)
    return View(stage, facts(), picture, origin, {}, given.read, prefix=given.prefix)


@torch.no_grad()
def run(method: VisionZip, given: Inputs, picture: Picture, keep: int) -> Selection:
    selection = method.select(view_of(method, given, picture), keep)
    assert selection.indices.dtype == torch.int64
    assert selection.indices.shape == (len(given.attention), keep)
    assert (selection.indices.diff(dim=1) > 0).all() and selection.indices.min() >= 0
    assert selection.indices.max() < given.attention.shape[1]
    return selection


# --- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mean", "released"])
@pytest.mark.parametrize("name", PICTURES)
def test_tokens_follow_the_rule(name: str, mode: str) -> None:
    picture, pick = PICTURES[name], random.Random(name)
    tiles, joined = picture.tile_of().tolist(), 0
    for seed in range(12):
        keep = pick.choice([1, 2, picture.tokens - 1, pick.randint(1, picture.tokens - 1)])
        contextual = pick.choice([10 / 64, 10 / 64, 0.5, 0.9, 1, min(3, keep), keep])
        given = inputs(2, picture.tokens, seed=seed, prefix=pick.choice([0, 1, 3]))
        method = VisionZip(keep=keep, mode=mode, contextual=contextual)
        found = run(method, given, picture, keep)
        dense = given.read(Signal.FEATURES)
        for i in range(2):
            keys = given.keys[i, :, given.prefix :]
            expected = roles(given.attention[i], keys, tiles, keep, contextual)
            assert found.indices[i].tolist() == expected.kept
            for slot, token in enumerate(expected.kept):
                if found.tokens is None or token not in expected.groups:
                    tokens = dense if found.tokens is None else found.tokens
                    at = token if found.tokens is None else slot
                    assert torch.equal(tokens[i, at], dense[i, token])
                    continue
                joins = expected.groups[token]
                wanted = merged_feature(given.encoded[i], token, joins, mode)
                wanted = given.projector(wanted.float())
                assert (found.tokens[i, slot] - wanted).abs().max() < 1e-5
                joined += len(joins)
    assert joined > 20


def test_splits_of_the_paper() -> None:
    assert [split(k, 10 / 64) for k in (64, 128, 192)] == [(54, 10), (108, 20), (162, 30)]
    assert [split(k, 10 / 64) for k in (1, 3, 4, 16)] == [(1, 0), (3, 0), (3, 1), (13, 3)]
    assert split(16, 0.5) == (8, 8) and split(16, 16) == (0, 16) and split(16, 0) == (16, 0)
    with pytest.raises(MethodError, match="17 contextual tokens do not fit a budget of 16"):
        split(16, 17)


@pytest.mark.parametrize("keep", [64, 128, 192])
def test_every_token_is_kept_or_joins_one_anchor(keep: int) -> None:
    given, picture = inputs(2, 576), plain(24, 24)
    layout = tile_layout(picture, keep, 10 / 64)
    found = choose(given.attention, layout)
    group = assign(given.keys[:, :, 1:], found, layout)
    dominant, contextual = split(keep, 10 / 64)
    assert (found.dominant.sum(-1) == dominant).all() and (found.anchor.sum(-1) == contextual).all()
    rest = ~found.dominant & ~found.anchor
    counts = torch.stack([((group == a) & rest).sum(-1) for a in range(contextual)], -1)
    assert (counts.sum(-1) == 576 - dominant - contextual).all()
    for i in range(2):
        others = (~found.dominant[i, 0]).nonzero()[:, 0]
        stride = (576 - dominant) // contextual
        assert found.anchor[i, 0].nonzero()[:, 0].tolist() == others[::stride][:contextual].tolist()
        least_dominant = given.attention[i][found.dominant[i, 0]].min()
        assert least_dominant >= given.attention[i][~found.dominant[i, 0]].max()


@pytest.mark.parametrize("mode", ["mean", "released"])
def test_anchors_alone_stay_what_they_are(mode: str) -> None:
    """With nothing left to join, a contextual token is its anchor, to the bit."""
    for dtype in (torch.float32, torch.bfloat16):
        given = inputs(2, 40, dtype=dtype)
        layout = tile_layout(plain(4, 10), 40, 9)
        found = choose(given.attention, layout)
        group = assign(given.keys[:, :, 1:], found, layout)
        merged = merge(given.encoded, found, group, layout, mode)
        assert merged.shape == (2, 1, 9, 6) and merged.dtype == dtype
        for i in range(2):
            anchors = found.anchor[i, 0].nonzero()[:, 0]
            assert torch.equal(merged[i, 0], given.encoded[i, anchors])


def test_modes_by_hand() -> None:
    """Token 0 is dominant; anchor 1 is joined by 2 and 3."""
    attention = torch.tensor([[9.0, 1.0, 1.0, 1.0]])
    encoded = torch.tensor([[100.0], [3.0], [6.0], [12.0]])[None]
    given = Inputs(attention, torch.ones(1, 1, 4, 2), encoded, nn.Identity(), 0)
    for mode, value in (("mean", 7.0), ("released", 12.0)):
        found = run(VisionZip(keep=2, contextual=1, mode=mode), given, plain(2, 2), 2)
        assert found.indices.tolist() == [[0, 1]]
        assert found.tokens[..., 0].tolist() == [[100.0, value]]


def test_released_doubles_the_scale_of_alike_features_and_mean_keeps_it() -> None:
    given = inputs(1, 40)
    given.encoded = given.encoded[:, :1].expand(1, 40, 6)
    for mode, factor in (("mean", 1), ("released", 2)):
        layout = tile_layout(plain(4, 10), 10, 2)
        found = choose(given.attention, layout)
        group = assign(given.keys[:, :, 1:], found, layout)
        merged = merge(given.encoded, found, group, layout, mode)
        assert torch.allclose(merged[0, 0], factor * given.encoded[0, :2], atol=1e-6)


def test_keys_are_averaged_over_heads_before_they_are_compared() -> None:
    """Heads (1, 0) and (-1, 0) cancel to (0, 1) / 2, which is the second anchor's direction."""
    heads = torch.tensor([[[1.0, 0], [0, 1], [2, 0.5]], [[1.0, 0], [0, 1], [-2, 0.5]]])
    keys = torch.cat([heads[:, :1], heads[:, 2:], heads[:, 1:2], heads[:, 2:]], 1)[None]
    attention = torch.zeros(1, 4)
    layout = tile_layout(plain(1, 4), 2, 2)
    found = choose(attention, layout)
    assert found.anchor[0, 0].tolist() == [True, False, True, False]
    assert assign(keys, found, layout)[0, 0].tolist() == [0, 1, 1, 1]


def test_ties_go_to_the_lower_index_and_the_earlier_anchor() -> None:
    given = inputs(1, 40)
    given.attention, given.keys = torch.full((1, 40), 0.1), torch.ones(1, 3, 41, 5)
    layout = tile_layout(plain(4, 10), 10, 3)
    found = choose(given.attention, layout)
    assert found.dominant[0, 0].nonzero()[:, 0].tolist() == list(range(7))
    assert found.anchor[0, 0].nonzero()[:, 0].tolist() == [7, 18, 29]
    joined = assign(given.keys[:, :, 1:], found, layout)[0, 0]
    assert joined[7:].tolist() == [0] * 11 + [1] + [0] * 10 + [2] + [0] * 10


# --- tiles ---------------------------------------------------------------------------------------


def test_apportion_is_largest_remainder() -> None:
    pick = random.Random(0)
    for _ in range(500):
        weights = [pick.choice([0, 1, 2, 7, 576, pick.randint(0, 99)]) for _ in range(6)]
        total = pick.randint(0, sum(weights))
        parts = apportion(total, weights)
        assert parts == shares(total, weights) and sum(parts) == total
        assert all(p <= w for p, w in zip(parts, weights, strict=True))
    assert apportion(160, [576] * 5) == [32] * 5 and apportion(7, [3, 3, 3]) == [3, 2, 2]


def test_each_tile_has_its_share() -> None:
    given = inputs(2, TILED.tokens)
    given.attention[:, :12] += 10  # the overview has all the attention
    for keep in (1, 5, 13, 26, 51):
        found = run(VisionZip(keep=keep), given, TILED, keep)
        counts = TILED.tile_of()[found.indices]
        sizes = TILED.tile_of().bincount().tolist()
        for row in counts:
            assert row.bincount(minlength=5).tolist() == shares(keep, sizes)


def test_tokens_join_anchors_of_their_own_tile() -> None:
    """What lies in one tile changes nothing in another, also with equal keys everywhere."""
    given, other = inputs(1, TILED.tokens), inputs(1, TILED.tokens)
    given.keys, other.keys = torch.ones(2, 1, 3, TILED.tokens + 1, 5)
    changed = TILED.tile_of() == 2
    other.encoded = torch.where(changed[:, None], given.encoded + 5, given.encoded)
    method = VisionZip(keep=20, contextual=0.5)
    one, two = (run(method, x, TILED, 20) for x in (given, other))
    assert torch.equal(one.indices, two.indices)
    same = (one.tokens == two.tokens).all(-1)[0]
    assert torch.equal(same, ~changed[one.indices[0]])


def test_a_plain_picture_that_was_pruned_before_is_one_run() -> None:
    given = inputs(1, 30)
    method = VisionZip(keep=12)
    found, whole = run(method, given, plain(4, 10), 12), run(method, given, plain(5, 6), 12)
    assert torch.equal(found.indices, whole.indices) and torch.equal(found.tokens, whole.tokens)
    with pytest.raises(MethodError, match="5 tiles .* left 30 of 52 tokens"):
        run(method, given, TILED, 12)


# --- batches, precision, limits ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "tiles", "uneven"])
def test_a_batch_equals_its_pictures_one_by_one(name: str) -> None:
    picture = PICTURES[name]
    given, method = inputs(3, picture.tokens), VisionZip(keep=9)
    together = run(method, given, picture, 9)
    for i in range(3):
        alone = run(method, given.rows(i), picture, 9)
        assert torch.equal(alone.indices[0], together.indices[i])
        assert torch.allclose(alone.tokens[0], together.tokens[i], atol=1e-6)
    turned = run(method, given.rows(2, 0, 0, 1), picture, 9)
    assert torch.equal(turned.indices, together.indices[[2, 0, 0, 1]])


@pytest.mark.parametrize("mode", ["mean", "released"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_merged_in_fp32(mode: str, dtype: torch.dtype, autocast: bool) -> None:
    given = inputs(2, 300, dtype=dtype)
    layout = tile_layout(plain(10, 30), 40, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = choose(given.attention, layout)
        group = assign(given.keys[:, :, 1:], found, layout)
        merged = merge(given.encoded, found, group, layout, mode)
    assert merged.dtype == dtype
    tiles = [0] * 300
    for i in range(2):
        expected = roles(given.attention[i], given.keys[i, :, 1:], tiles, 40, 3)
        for a, (anchor, joined) in enumerate(expected.groups.items()):
            assert len(joined) > 20
            exact = merged_feature(given.encoded[i], anchor, joined, mode)
            room = torch.finfo(dtype).eps * 0.51 * exact.abs() + 1e-6  # rounded once
            assert ((merged[i, 0, a].double() - exact).abs() <= room).all()


def test_a_half_precision_model_gets_its_dtype() -> None:
    given = inputs(2, 40, dtype=torch.bfloat16)
    assert run(VisionZip(keep=12), given, plain(4, 10), 12).tokens.dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_picture_spoils_no_other(bad: float) -> None:
    for name in ("plain", "tiles"):
        picture = PICTURES[name]
        given, method = inputs(2, picture.tokens), VisionZip(keep=9)
        good = run(method, given, picture, 9)
        given.attention[0, 3] = given.keys[0, 0, 8, 0] = given.encoded[0, 20, 0] = bad
        found = run(method, given, picture, 9)  # checks that indices are in bounds
        assert torch.equal(found.indices[1], good.indices[1])
        assert torch.equal(found.tokens[1], good.tokens[1])


@pytest.mark.parametrize("name", PICTURES)
def test_nothing_waits_for_the_device(name: str) -> None:
    picture = PICTURES[name]
    given, method, keep = inputs(2, picture.tokens), VisionZip(keep=5), min(5, picture.tokens - 1)
    run(method, given, picture, keep)  # the layout is made from host numbers, once
    view = view_of(method, given, picture)
    with Reads() as reads:
        method.select(view, keep)
        assert reads.count == 0
        torch.ones(1).item()
    assert reads.count == 1


def test_gradients_reach_kept_and_merged_tokens() -> None:
    given, method = inputs(1, TILED.tokens), VisionZip(keep=17, contextual=10)
    with torch.inference_mode():
        run(method, given, TILED, 17)  # what it caches must serve training
    given.encoded.requires_grad_()
    selection = method.select(view_of(method, given, TILED), 17)
    selection.tokens.sum().backward()
    assert (given.encoded.grad.abs().sum(-1) > 0).all()  # every token is kept or merged


def test_without_contextual_tokens_it_is_top_k_by_attention() -> None:
    given, method = inputs(2, 40), VisionZip(keep=12, contextual=0)
    assert method.reads() == {Signal.CLS_ATTENTION}
    found = run(method, given, plain(4, 10), 12)
    assert found.tokens is None
    assert torch.equal(found.indices, cls_topk.select(given.attention, 12))
    assert VisionZip(keep=12).reads() == VisionZip.signals
    assert run(VisionZip(keep=2), given, plain(4, 10), 2).tokens is None  # 0.3 round to none


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mode": "sum"}, "mode must be one of 'mean', 'released'"),
        ({"contextual": 1.0}, "contextual must be a share below 1 or a whole number"),
        ({"contextual": 2.5}, "contextual must be a share below 1 or a whole number"),
        ({"contextual": -1}, "contextual must be at least 0"),
        ({"contextual": True}, "contextual must be"),
    ],
)
def test_bad_options_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=f"visionzip: {words}"):
        VisionZip(keep=9, **given)


def test_more_contextual_tokens_than_budget_are_refused_before_the_model_runs() -> None:
    for method in (VisionZip(keep=9, contextual=10), VisionZip(ratio=0.9, contextual=5)):
        with pytest.raises(MethodError, match="do not fit a budget"):
            method.stages(facts())
    assert VisionZip(keep=9, contextual=9).stages(facts())
    assert VisionZip(ratio=0.9, contextual=5).stages(replace(facts(), tiled=True))  # of all tiles


def test_recipes_round_trip() -> None:
    for method in (VisionZip(ratio=0.5, contextual=3), VisionZip(keep=4, mode="released")):
        recipe = json.loads(json.dumps(method.to_dict()))
        assert recipe.pop("name") == "visionzip" and VisionZip.from_options(recipe) == method
