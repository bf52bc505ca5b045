"""SparseVLM's tables, their extension to other models and budgets, and the options."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from vistoken.contract import ModelFacts, Place, Signal, Stage
from vistoken.cost import TransformerShape
from vistoken.errors import MethodError
from vistoken.pruning._sparsevlm import layer_averages, schedule, stage_layers
from vistoken.pruning.sparsevlm import SparseVLM


def facts(layers: int = 32, first: int = 0, axes: int = 1) -> ModelFacts:
    shape = TransformerShape(layers, 64, 4, 4, 16, 128, 3)
    return ModelFacts("none", (24, 24), 1, 24, 22, layers, shape, shape, 0, 0, False, axes, first)


TABLE = [  # mode, budget, after each stage, reported and entering average (LLaVA-1.5-7B)
    ("v1.5", 192, (300, 200, 110), (309, 204, 113), 192.03, 206.5),
    ("v1.5", 128, (303, 110, 36), (312, 117, 39), 128.6, 145.4),
    ("v1.5", 96, (238, 48, 26), (249, 55, 27), 96.9, 114.1),
    ("v1.5", 64, (66, 30, 17), (82, 32, 18), 64.8, 82.3),
    ("v2", 192, (300, 200, 118), (300, 200, 118), 192.4, 206.8),
    ("v2", 128, (238, 108, 60), (238, 108, 60), 128.0, 144.1),
    ("v2", 96, (246, 54, 28), (246, 54, 28), 96.8, 113.9),
    ("v2", 64, (66, 34, 20), (66, 34, 20), 64.4, 81.8),
]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_the_official_tables(row: Any) -> None:
    mode, budget, top, left, reported, entering = row
    plan = schedule(mode, 576, budget)
    assert [tuple(stage) for stage in plan] == list(zip((2, 6, 15), top, left, strict=True))
    averages = layer_averages(576, plan)
    assert averages == pytest.approx((reported, entering), abs=0.051)
    assert averages[0] == sum([576] * 2 + [left[0]] * 4 + [left[1]] * 9 + [left[2]] * 17) / 32
    assert SparseVLM(keep=budget, mode=mode).survivors(576, budget, facts()) == left[-1]
    five = schedule(mode, 5 * 576, 5 * budget)  # the same share of a tiled picture
    assert [stage.top for stage in five] == [5 * count for count in top]


@pytest.mark.parametrize("mode", ["v1.5", "v2"])
def test_any_budget_has_a_schedule_that_grows_with_it(mode: str) -> None:
    for depth, tokens in itertools.product((2, 4, 8, 24, 28, 32, 40, 80), (1, 2, 7, 36, 576, 2880)):
        before = (0.0, 0)
        for keep in range(1, tokens + 1, 1 if tokens < 99 else tokens // 97):
            plan = schedule(mode, tokens, keep, depth)
            lengths = [tokens, *(stage.left for stage in plan)]
            assert lengths == sorted(lengths, reverse=True) and lengths[-1] >= 1
            average = layer_averages(tokens, plan, depth)[0]
            assert (average, lengths[-1]) >= before and lengths[-1] >= before[1]
            if tokens == 576 and keep >= 64:  # the budget is the average it promises
                assert keep - 1.1 <= average <= keep * 1.08 + 1
            before = (average, lengths[-1])
        assert {stage.left for stage in schedule(mode, tokens, tokens, depth)} == {tokens}


def test_layers_scale_with_the_depth() -> None:
    expected = {2: [0], 3: [0, 1], 4: [0, 1, 2], 8: [0, 1, 4], 24: [1, 4, 11], 28: [2, 5, 13]}
    expected |= {32: [2, 6, 15], 36: [2, 7, 17], 40: [2, 7, 19], 64: [4, 12, 30], 80: [5, 15, 37]}
    for depth, layers in expected.items():
        assert list(stage_layers("v2", depth)) == layers
        stages = SparseVLM(keep=64).stages(facts(depth))
        assert [stage.layer for stage in stages] == [None, *layers]
    assert list(stage_layers("rank", 32)) == [2, 6, 15, 19]
    assert stage_layers("v1.5", 32, first=8) == {8: 1, 15: 2}  # the later of two takes the layer
    assert [s.top for s in schedule("v1.5", 576, 64, 32, 8)] == [30, 17]
    for depth, first in ((1, 0), (0, 0), (4, 3), (32, 31)):
        with pytest.raises(MethodError, match="prunes before the LLM"):
            SparseVLM(keep=64).stages(facts(depth, first))


# --- options -------------------------------------------------------------------------------------


def test_stages_name_what_they_read() -> None:
    for mode in ("v1.5", "v2", "rank"):
        first, *later = SparseVLM(keep=64, mode=mode).stages(facts())
        early = frozenset({Signal.FEATURES, Signal.TEXT_EMBEDDINGS})
        assert first == Stage(Place.PROJECTED, None, early)
        assert {stage.place for stage in later} == {Place.LLM_LAYER}
        assert {Signal.HIDDEN in stage.signals for stage in later} == {mode != "v2"}
        assert all(stage.signals <= SparseVLM.signals for stage in (first, *later))


def test_positions_depend_on_the_mode() -> None:
    for mode, kept in (("v1.5", False), ("rank", False), ("v2", True)):
        assert SparseVLM(keep=9, mode=mode).keeps_positions(facts()) == kept
        assert SparseVLM(keep=9, mode=mode).keeps_positions(facts(axes=3))
        for positions in ("renumber", "original"):
            method = SparseVLM(keep=9, mode=mode, positions=positions)
            assert method.keeps_positions(facts()) == (positions == "original")
        with pytest.raises(MethodError, match="three axes"):
            SparseVLM(keep=9, mode=mode, positions="renumber").keeps_positions(facts(axes=3))


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "v1"},
        {"heads": 0, "mode": "v2"},
        {"heads": 3},
        {"scale": 1.0, "mode": "v2"},
        {"bias": 1},
        {"scale": -1.0, "mode": "rank"},
    ],
    ids=str,
)
def test_options_of_another_mode_and_bad_ones_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match="sparsevlm"):
        SparseVLM(keep=64, **options)
