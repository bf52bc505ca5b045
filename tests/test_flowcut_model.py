"""FlowCut as a method: tiled pictures, the stage in the LLM, models it fits, options."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcut_tower import dot, facts, flat, flow, head_mean, read, run, softmax, synthetic
from vistoken.contract import Place, Signal, Stage, View
from vistoken.errors import MethodError
from vistoken.pictures import plain
from vistoken.pruning.flowcut import FlowCut

TOWER = frozenset({Signal.CLS_ATTENTION, Signal.VISION_VALUES})
NO_CLS = frozenset({Signal.VISION_QUERIES, Signal.VISION_KEYS, Signal.VISION_VALUES})

# --- tiles ---------------------------------------------------------------------------------------


def test_visible_tokens_are_never_lost_to_others() -> None:
    choose = random.Random(0)
    for seed in range(20):
        tokens, depth = 40, choose.choice([2, 7, 10])
        layers = synthetic(2, tokens, depth, seed=seed)
        keep = choose.choice([3, 10, 25])
        visible = torch.rand(2, tokens) < choose.choice([0.1, 0.3, 0.8])
        ratio = choose.choice([None, 0.0, 0.7])
        found, lengths = run(FlowCut(keep=keep, entropy=ratio), layers, keep, visible=visible)
        reached = visible.gather(1, found).sum(1)
        assert torch.equal(reached, visible.sum(1).clamp(max=keep)) and lengths[-1] == keep


def test_tokens_that_all_reach_the_llm_change_nothing() -> None:
    layers = synthetic(2, 40, 8)
    method, everything = FlowCut(keep=9), torch.ones(2, 40, dtype=torch.bool)
    expected = run(method, layers, 9)[0]
    assert torch.equal(run(method, layers, 9, visible=everything)[0], expected)
    assert torch.equal(run(method, layers, 9, visible=~everything)[0], expected)


def test_hidden_tokens_go_last_stage_first_even_when_they_score_best() -> None:
    layers = flat(30, 2, True)  # token 3 has all the attention
    visible = torch.ones(1, 30, dtype=torch.bool)
    assert 3 in run(FlowCut(keep=4), layers, 4, visible=visible)[0]
    visible[0, 3] = False
    assert 3 not in run(FlowCut(keep=4), layers, 4, visible=visible)[0]
    middle, lengths = run(FlowCut(keep=4), flat(30, 3, True)[:2], 20, visible=visible)
    assert 3 not in middle[0] and lengths[-1] == 20


def test_tower_budget_is_half_per_tile_and_at_least_what_is_needed() -> None:
    method = FlowCut(keep=160)
    assert [method.tower_budget(k, 5, k // 5) for k in (640, 320, 160)] == [320, 160, 80]
    assert method.tower_budget(160, 5, 97) == 97
    assert method.tower_budget(161, 2, 81) == 81  # twice 80 would leave less than the budget
    assert method.tower_budget(64, 1, 64) == 64


@dataclass
class Rows:
    """What an LLM layer's attention gives, made up."""

    last_query: Tensor
    last_value: Tensor
    keys: Tensor
    values: Tensor


@pytest.mark.parametrize("mode", ["released", "paper"])
def test_the_llm_stage_follows_its_rule(mode: str) -> None:
    method = FlowCut(keep=6, mode=mode)
    known = facts(4, tiled=True)
    stage = method.stages(known)[-1]
    assert stage == Stage(Place.LLM_LAYER, 1, frozenset({Signal.LLM_ATTENTION}))
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        heads, tokens, width = 3, 25, 5
        last = torch.randn(2, 2, heads, width, generator=draw)
        keys, values = torch.randn(2, 2, heads, tokens, width, generator=draw)
        rows = Rows(last[0] * 2, last[1], keys, values)
        origin = torch.arange(tokens).repeat(2, 1)
        view = View(stage, known, plain(5, 5), origin, {}, lambda _, rows=rows: rows)
        found = method.select(view, 6).indices
        for i in range(2):
            a, u = [], []
            for h in range(heads):
                root = math.sqrt(width)
                a.append(softmax([dot(rows.last_query[i, h], k) / root for k in keys[i, h]]))
                u.append(softmax([dot(rows.last_value[i, h], v) / root for v in values[i, h]]))
            w = values[i].double().mean(0).abs().sum(-1).tolist()
            alike = head_mean(u)
            if mode == "paper":
                flat_values = values[i].transpose(0, 1).flatten(1)
                cosine = torch.cosine_similarity(flat_values, rows.last_value[i].flatten()[None])
                alike = cosine.clamp(min=0).tolist()
            score = flow(head_mean(a), alike, w)
            best = sorted(range(tokens), key=lambda j: (-score[j], j))[:6]
            assert found[i].tolist() == sorted(best)


# --- the method ----------------------------------------------------------------------------------


def test_stages_follow_the_feature_layer() -> None:
    stages = FlowCut(keep=9).stages(facts(22))
    assert stages == tuple(Stage(Place.VISION_LAYER, i, TOWER) for i in range(22))
    stages = FlowCut(keep=9).stages(facts(26, prefix=0))
    assert stages == tuple(Stage(Place.VISION_LAYER, i, NO_CLS) for i in range(26))
    for stage in FlowCut(keep=9, llm_layer=3).stages(facts(5, tiled=True, first_text_stage=3)):
        assert stage.place in FlowCut.places and stage.signals <= FlowCut.signals


def test_models_that_lack_a_layer_are_refused() -> None:
    with pytest.raises(MethodError, match="no layer to prune after"):
        FlowCut(keep=9).stages(facts(0))
    for layer, given in ((1, {"first_text_stage": 2}), (7, {}), (1, {"text_layers": 2})):
        with pytest.raises(MethodError, match=f"llm_layer must be at least.*got {layer}"):
            FlowCut(keep=9, llm_layer=layer).stages(facts(4, tiled=True, **given))
    assert FlowCut(keep=9, llm_layer=99).stages(facts(4))  # untiled pictures have no such stage


def test_a_second_method_in_the_tower_is_refused() -> None:
    layers, known, memory = synthetic(1, 20, 4), facts(4), {}
    method = FlowCut(keep=3, entropy=1.0)
    for stage, tokens in zip(method.stages(known), (20, 18), strict=False):
        at = torch.arange(tokens)[None]
        view = View(
            stage,
            known,
            plain(4, 5),
            at,
            memory,
            lambda signal, at=at: read(layers[0], at, 1, signal),
            prefix=1,
        )
        if tokens == 20:
            assert method.select(view, 3) is None
            continue
        with pytest.raises(MethodError, match="20 tokens were left .* now there are 18"):
            method.select(view, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mode": "papr"}, "mode must be one of"),
        ({"entropy": 1.5}, "entropy must be at least 0 and at most 1"),
        ({"entropy": 0.9, "batch_invariant": False}, "entropy=0.9 belongs to the fixed schedule"),
        ({"batch_invariant": 1}, "batch_invariant must be"),
        ({"llm_layer": -1}, "llm_layer must be at least 0"),
    ],
)
def test_bad_options_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=f"flowcut: {words}"):
        FlowCut(keep=9, **given)


def test_recipes_round_trip() -> None:
    for method in (FlowCut(ratio=0.5, entropy=0.9), FlowCut(keep=4, batch_invariant=False)):
        recipe = json.loads(json.dumps(method.to_dict()))
        assert recipe.pop("name") == "flowcut" and FlowCut.from_options(recipe) == method


def test_training_keeps_no_graph_in_the_memory() -> None:
    layers = synthetic(1, 20, 4)
    for layer in layers:
        layer.values.requires_grad_()
    with torch.inference_mode():
        expected = run(FlowCut(keep=3), synthetic(1, 20, 4), 3)[0]
    known, memory = facts(4), {}
    stage, at = FlowCut(keep=3).stages(known)[0], torch.arange(20)[None]
    view = View(
        stage, known, plain(4, 5), at, memory, lambda s: read(layers[0], at, 1, s), prefix=1
    )
    FlowCut(keep=3).select(view, 3)
    assert memory and not any(value.requires_grad for value in memory.values())
    assert torch.equal(run(FlowCut(keep=3), layers, 3)[0], expected)
