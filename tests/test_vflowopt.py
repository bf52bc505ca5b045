"""VFlowOpt's budget over layers, and its stages called as a host calls them."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vistoken.contract import ModelFacts, Place, Selection, Signal, View
from vistoken.cost import TransformerShape
from vistoken.errors import MethodError
from vistoken.pictures import Part, Picture, plain
from vistoken.pruning import vflowopt
from vistoken.pruning.vflowopt import PRESETS, VFlowOpt, cell_numbers, preset, stage_counts

CPU = torch.device("cpu")
TILED = Picture((Part((4,), (4,)), Part((2, 4), (4, 3, 0))), separators=(16, 24))

# --- the budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "r_2", "average"),
    [(0.5, 0.487, 0.501), (0.25, 0.8773, 0.251), (0.1, 0.6011, 0.1)],
)
def test_presets_meet_their_layer_averaged_budget(
    budget: float, r_2: float, average: float
) -> None:
    assert preset(budget) == pytest.approx(PRESETS[budget], rel=1e-12)
    r_v, r_1 = PRESETS[budget][2:]
    mean = r_v * (9 + 9 * r_1 + 10 * r_1 * r_2) / 28
    assert mean == pytest.approx(average, abs=6e-4)
    keep = round(729 * budget)
    one, two, three = stage_counts(729, keep, (9, 9, 10), (r_v, r_1))
    assert (one, two) == (math.floor(729 * r_v + 0.5), math.floor(one * r_1 + 0.5))
    assert three / two == pytest.approx(r_2, abs=0.016)  # solved, as the paper's r_2 is


def test_presets_between_and_outside() -> None:
    middle = [(a + b) / 2 for a, b in zip(PRESETS[0.25], PRESETS[0.5], strict=True)]
    assert preset(0.375) == pytest.approx(middle)
    assert preset(0.05) == pytest.approx((39.26, 17.39, 0.0583, 1.0))
    assert preset(0.75) == pytest.approx((28.68, 11.76, (1 + 0.7233) / 2, (1 + 0.7487) / 2))
    assert preset(1.0) == (28.68, 11.76, 1.0, 1.0)
    for percent in range(1, 101):
        assert preset(percent / 100)[2] >= percent / 100
    for bad in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(MethodError, match="budget"):
            preset(bad)


def test_counts_fall_and_average_to_the_budget() -> None:
    choose = random.Random(0)
    for _ in range(3000):
        tokens = choose.randint(1, 800)
        keep = choose.randint(1, tokens)
        lengths = [choose.randint(1, 15) for _ in range(choose.randint(1, 3))]
        shares = [choose.random() for _ in lengths[1:]]
        if choose.random() < 0.5:
            shares = list(preset(keep / tokens)[2:])[: len(shares)]
        counts = stage_counts(tokens, keep, lengths, shares)
        assert sorted(counts, reverse=True) == list(counts)
        assert counts[-1] >= 1 and counts[0] <= tokens
        mean = sum(map(math.prod, zip(counts, lengths, strict=True))) / sum(lengths)
        assert keep - 1 < mean <= keep
    assert stage_counts(50, 50, (9, 9, 10), (0.2, 0.3)) == (50, 50, 50)


def test_shares_are_met_where_they_can_be() -> None:
    assert stage_counts(100, 40, (9, 9, 10), (0.7, 0.5)) == (70, 35, 17)
    assert stage_counts(100, 50, (9, 9, 10), (0.2, 0.5)) == (50, 50, 50)  # moved up
    assert stage_counts(100, 20, (9, 9, 10), (1.0, 1.0))[0] == (20 * 28 - 19) // 9  # moved down
    for bad in ({"keep": 0}, {"keep": 101}, {"shares": (0.5,)}, {"lengths": (9, 0, 10)}):
        given = {"tokens": 100, "keep": 5, "lengths": (9, 9, 10), "shares": (0.5, 0.5), **bad}
        with pytest.raises(MethodError, match="needs 1 <= keep"):
            stage_counts(**given)


# --- the method, called as a host calls it -------------------------------------------------------


def facts(grid: tuple[int, int] = (13, 15), layers: int = 28, first: int = 0) -> ModelFacts:
    shape = TransformerShape(2, 12, 3, 3, 4, 16, 2)
    return ModelFacts(
        "none", grid, 0, 2, 1, layers, shape, shape, 0, 0, first_text_stage=first
    )  # fmt: skip


def vision(picture: Picture, images: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries and keys of a layer of 3 heads with a few sinks."""
    draw = torch.Generator().manual_seed(seed)
    shape = (images, 3, picture.tokens, 4)
    queries, keys = (torch.randn(shape, generator=draw) for _ in range(2))
    queries[..., 0] = 2
    keys[:, :, torch.randint(shape[2], (2,), generator=draw), 0] = 5
    return queries, keys


def run(
    method: VFlowOpt,
    picture: Picture,
    keep: int,
    layers: int = 28,
    images: int = 2,
    left: Tensor | None = None,
    seed: int = 0,
) -> tuple[list[Tensor], list[Selection | None]]:
    """Tokens of the picture [I, n] that are left after every stage, and what was selected."""
    known, memory = facts(layers=layers), {}
    every = torch.arange(picture.tokens).expand(images, -1)
    origin = every if left is None else left
    queries, keys = vision(picture, images, seed=seed)
    features = torch.randn(images, picture.tokens, 6, generator=torch.Generator().manual_seed(seed))
    row = torch.arange(images)[:, None]
    signals = {
        Signal.VISION_QUERIES: queries.transpose(1, 2)[row, origin].transpose(1, 2),
        Signal.VISION_KEYS: keys.transpose(1, 2)[row, origin].transpose(1, 2),
        Signal.FEATURES: features[row, origin],
    }
    kept, selections = [], []
    for stage in method.stages(known):
        view = View(stage, known, picture, origin, memory, signals.__getitem__)
        chosen = method.select(view, keep)
        if chosen is not None:
            origin = origin.gather(1, chosen.indices)
        kept.append(origin)
        selections.append(chosen)
    return kept, selections


@pytest.mark.parametrize("picture", [plain(13, 15), TILED], ids=["plain", "tiled"])
@pytest.mark.parametrize("layers", [3, 8, 28, 32])
def test_stages_follow_the_counts_and_one_map(picture: Picture, layers: int) -> None:
    total = picture.tokens
    for keep in (1, total // 10, total // 4, total // 2, total - 1):
        method = VFlowOpt(keep=keep)
        known = facts(layers=layers)
        kept, selections = run(method, picture, keep, layers)
        edges = (0, *method.cuts(known), layers)
        lengths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
        threshold, side, *shares = preset(keep / total)
        counts = stage_counts(total, keep, lengths, shares)
        assert tuple(len(row[0]) for row in kept) == counts
        assert method.survivors(total, keep, known) == counts[-1]
        queries, keys = vision(picture)
        score = vflowopt.importance(queries, keys, threshold, 0.5, tiles=picture)
        for before, after, count in zip(kept, kept[1:], counts[1:], strict=False):
            here = score.gather(1, before)
            order = here.argsort(descending=True, stable=True)[:, :count].sort().values
            assert torch.equal(after, before.gather(1, order))
        if counts[0] < total:
            features = torch.randn(2, total, 6, generator=torch.Generator().manual_seed(0))
            cell, cells = cell_numbers(picture, side, CPU)
            picks, merged = vflowopt.recycle(features, score, counts[0], cell, cells)
            assert torch.equal(selections[0].indices, picks)
            assert torch.equal(selections[0].tokens, merged)
        assert all(chosen is None or chosen.tokens is None for chosen in selections[1:])


def test_cuts_are_the_papers_and_scale() -> None:
    assert VFlowOpt(keep=9).cuts(facts(layers=28)) == (9, 18)
    assert VFlowOpt(keep=9).cuts(facts(layers=32)) == (10, 21)
    assert [VFlowOpt(keep=9).cuts(facts(layers=n)) for n in (1, 2, 3, 8)] == [
        (),
        (1,),
        (1, 2),
        (3, 5),
    ]
    assert VFlowOpt(keep=9).cuts(facts(layers=28, first=11)) == (12, 18)
    assert VFlowOpt(keep=9, second_layer=4).cuts(facts()) == (3, 4)
    assert VFlowOpt(keep=9, first_layer=20).cuts(facts()) == (20, 21)
    places = [(stage.place, stage.layer) for stage in VFlowOpt(keep=9).stages(facts())]
    llm = Place.LLM_LAYER
    assert places == [(Place.PROJECTED, None), (llm, 8), (llm, 17)]  # before 9 is after 8


def test_without_recycling_tokens_are_dropped_and_features_not_read() -> None:
    method = VFlowOpt(keep=40, recycle=False)
    assert Signal.FEATURES not in method.stages(facts())[0].signals
    kept, selections = run(method, plain(13, 15), 40)
    assert selections[0].tokens is None
    score = vflowopt.importance(*vision(plain(13, 15)), preset(40 / 195)[0], 0.5)
    order = score.argsort(descending=True, stable=True)[:, : kept[0].shape[1]]
    assert torch.equal(kept[0], order.sort().values)


def test_options_override_the_presets() -> None:
    given = {"projected_share": 0.6, "first_share": 0.5, "first_layer": 4, "second_layer": 20}
    kept, _ = run(VFlowOpt(keep=60, **given), plain(13, 15), 60)
    assert [row.shape[1] for row in kept] == [117, 59, (60 * 28 - 4 * 117 - 16 * 59) // 8]
    base = run(VFlowOpt(keep=60), plain(13, 15), 60)
    for other in ({"threshold": 0.5}, {"cell": 2.0}):
        found = run(VFlowOpt(keep=60, **other), plain(13, 15), 60)
        assert not torch.equal(found[1][0].tokens, base[1][0].tokens)


@pytest.mark.parametrize(
    ("given", "layers", "words"),
    [
        ({"first_layer": 28}, 28, "first_layer must be from 1 to 27"),
        ({"second_layer": 28}, 28, "second_layer must be from 1 to 27"),
        ({"first_layer": 9, "second_layer": 9}, 28, "must come after"),
        ({"second_layer": 1}, 28, "must come after"),
        ({"projected_share": 0.1}, 28, r"projected_share=0.1 does not fit.*met by \(60, "),
        ({"projected_share": 0.9}, 28, None),
        ({"projected_share": 0.5, "first_share": 0.01}, 28, "first_share=0.01 does not fit"),
        ({"first_share": 0.9}, 2, "first_share=0.9 does not fit"),
        ({"first_share": 0.9}, 1, "first_share=0.9 does not fit"),
        ({"projected_share": 0.9}, 1, "projected_share=0.9 does not fit"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_runs(
    given: dict[str, Any], layers: int, words: str | None
) -> None:
    method = VFlowOpt(keep=60, **given)
    if words is None:
        assert method.stages(facts(layers=layers))
        return
    with pytest.raises(MethodError, match=words):
        method.stages(facts(layers=layers))


@pytest.mark.parametrize("bad", [-1, 9.0, True, None, "9"], ids=str)
def test_layers_are_whole_numbers(bad: Any) -> None:
    with pytest.raises(MethodError, match="first_layer must be"):
        VFlowOpt(keep=9, first_layer=bad)


def test_a_batch_equals_its_pictures_one_by_one() -> None:
    for picture in (plain(13, 15), TILED):
        kept, selections = run(VFlowOpt(keep=9), picture, 9, images=3)
        single, alone = run(VFlowOpt(keep=9), picture, 9, images=1)  # same seed, other shapes
        assert all(len(row) == 3 for row in kept) and len(single[0]) == 1
        queries, keys = vision(picture, 3)
        score = vflowopt.importance(queries, keys, 2.0, 0.5, tiles=picture)
        parts = [
            vflowopt.importance(queries[i : i + 1], keys[i : i + 1], 2.0, 0.5, tiles=picture)
            for i in range(3)
        ]
        assert torch.allclose(score, torch.cat(parts), rtol=1e-5, atol=0)
        cell, cells = cell_numbers(picture, 4.0, CPU)
        tokens = torch.randn(3, picture.tokens, 6)
        together = vflowopt.recycle(tokens, score, 20, cell, cells)
        for i in range(3):
            own = vflowopt.recycle(tokens[i : i + 1], score[i : i + 1], 20, cell, cells)
            assert torch.equal(own[0], together[0][i : i + 1])
            assert torch.allclose(own[1], together[1][i : i + 1], atol=1e-6)


def test_after_an_earlier_method() -> None:
    """Of a plain picture the tokens left attend to each other; a tiled one must be whole."""
    left = torch.stack([torch.randperm(195)[:80].sort().values for _ in range(2)])
    kept, selections = run(VFlowOpt(keep=30, cell=4.0), plain(13, 15), 30, left=left)
    row = torch.arange(2)[:, None]
    queries, keys = (x.transpose(1, 2)[row, left].transpose(1, 2) for x in vision(plain(13, 15)))
    threshold = preset(30 / 195)[0]
    score = vflowopt.importance(queries, keys, threshold, 0.5)
    features = torch.randn(2, 195, 6, generator=torch.Generator().manual_seed(0))
    cell, cells = cell_numbers(plain(13, 15), 4.0, CPU)
    entering = kept[0].shape[1]
    picks, merged = vflowopt.recycle(features[row, left], score, entering, cell[left], cells)
    assert torch.equal(selections[0].indices, picks)
    assert torch.allclose(selections[0].tokens, merged, atol=1e-6)
    counts = stage_counts(195, 30, (9, 9, 10), preset(30 / 195)[2:])
    assert tuple(row.shape[1] for row in kept) == counts
    for own, row in zip(left.tolist(), kept[-1].tolist(), strict=True):
        assert set(row) <= set(own)
    kept, selections = run(VFlowOpt(keep=100), plain(13, 15), 100, left=left)
    counts = stage_counts(195, 100, (9, 9, 10), preset(100 / 195)[2:])
    assert [row.shape[1] for row in kept] == [min(80, count) for count in counts]
    assert selections[0] is None  # fewer are left than enter the LLM
    with pytest.raises(MethodError, match="needs all 58 tokens of a tiled picture.*left 30"):
        run(VFlowOpt(keep=9), TILED, 9, left=torch.arange(30).expand(2, -1))


class _NoReadBack(TorchDispatchMode):
    """Refuses every operation whose result, or its shape, depends on values of a tensor."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        masks = [
            index
            for index in (args[1] if name in ("index", "index_put", "index_put_") else ())
            if index is not None and index.dtype == torch.bool
        ]
        assert not masks and not name.startswith(self.names), name
        return op(*args, **(kwargs or {}))


def test_nothing_is_read_back_from_the_device() -> None:
    for picture, keep in ((plain(13, 15), 40), (TILED, 12)):
        kept, _ = run(VFlowOpt(keep=keep), picture, keep)  # fills the caches
        with _NoReadBack():
            again, _ = run(VFlowOpt(keep=keep), picture, keep)
        assert all(map(torch.equal, kept, again))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), _NoReadBack():
        torch.ones(1).item()
    with pytest.raises(AssertionError), _NoReadBack():
        kept[0][kept[0] > 3]
