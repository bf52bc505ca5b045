"""Methods that act inside the LLM, attached to a model, against masked keys and loops by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import llava_oracles as hand
import tiny
import vistoken
from llava_oracles import Choice, Once, Row, Stream
from test_language import greedy
from vistoken.contract import Place
from vistoken.pruning import Pruner
from vistoken.pruning.adaptinfer import AdaptInfer
from vistoken.pruning.fastv import FastV
from vistoken.pruning.pyramid import Pyramid
from vistoken.pruning.vflowopt import VFlowOpt
from vistoken.pruning.vmtc import VMTC

LAYERS = 6
SEEN = 2  # the vision layer whose attention the methods read: -2 of 4


@pytest.fixture(autouse=True)
def no_graph() -> Iterator[None]:
    with torch.no_grad():
        yield


def tiny_llava(attention: str = "sdpa") -> Any:
    return hand.tiny_llava(layers=LAYERS, attention=attention)


def vision_maps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The bare tower's own attention [I, H, 1 + N, 1 + N] at the layer that is projected."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    return tower(inputs["pixel_values"], output_attentions=True).attentions[SEEN]


def cls_row(maps: Tensor) -> Tensor:
    """[N] of one picture: head mean, CLS column dropped."""
    return maps[:, 0, 1:].mean(0)


# --- the oracle itself ------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_llm_by_hand_is_the_bare_model(kv_heads: int) -> None:
    model = hand.tiny_llava(layers=LAYERS, kv_heads=kv_heads, attention="eager")
    inputs = hand.one_row()
    (row,) = hand.rows_of(inputs)
    visual = hand.features(model, inputs)
    out = model(**inputs, output_attentions=True)
    embeds, columns = hand.short_prompt(model, row, visual)
    logits, maps = hand.run_llm(model, embeds, columns, {}, renumber=True)
    assert torch.allclose(logits, out.logits[0], atol=1e-5)
    for mine, its in zip(maps, out.attentions, strict=True):
        assert torch.allclose(mine, its[0], atol=1e-6)
    by_hand = hand.greedy_by_hand(model, row, visual, renumber=True)
    hand.assert_rows(greedy(model, inputs, hand.STEPS), [by_hand])


# --- kept positions: masked keys --------------------------------------------------------------


def check_masked(
    method: Pruner,
    make: Callable[[], dict[str, Tensor]],
    attention: str,
    stages: dict[int, hand.Choose],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What each stage leaves, and the logits of prefill and decoding, equal masked keys."""
    model, inputs = tiny_llava(attention), make()
    seen = hand.watch(method, monkeypatch)
    found, kept = hand.pruned(model, inputs, method)
    oracle = tiny_llava("eager")
    bare = greedy(oracle, inputs, 0)
    left = hand.masked_stages(oracle, inputs, stages)
    assert hand.llm_stages(seen) == dict(zip(sorted(stages), left, strict=True))
    assert kept == left[-1]
    hand.assert_steps(found, greedy(oracle, inputs, hand.STEPS))
    assert not torch.allclose(found[0], bare[0], atol=1e-3)


calls = pytest.mark.parametrize(
    ("make", "attention"),
    [(hand.one_row, "eager"), (hand.padded_batch, "sdpa")],
)


@calls
@pytest.mark.parametrize("layer", [1, 2, 5])
def test_fastv(layer: int, make: Any, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row of layer K - 1, and no other, decides what layers from K on see."""

    def choose(maps: Tensor, visual: list[int], row: Row, picture: int) -> list[int]:
        return hand.best(maps[:, -1, visual].mean(0), 8)

    check_masked(FastV(keep=8, layer=layer), make, attention, {layer - 1: choose}, monkeypatch)


def test_fastv_cache_is_long_before_layer_k_and_short_behind() -> None:
    model, inputs = tiny_llava(), hand.padded_batch()
    with vistoken.attach(model, FastV(keep=8, layer=3)) as held:
        cache = model(**inputs, use_cache=True).past_key_values
        report = held.report()
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [87] * 3 + [31] * 3
    assert report.layer_tokens == [108] * 3 + [24] * 3


@calls
@pytest.mark.parametrize(
    ("prior", "schedule"),
    [("received", "geometric"), ("given", "geometric"), ("received", "linear")],
)
def test_adaptinfer(
    prior: str, schedule: str, make: Any, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three stages; at each one the words that the words look at say what counts."""
    counts = [36 * (6 / 36) ** (i / 3) for i in (1, 2, 3)]
    if schedule == "linear":
        counts = [36 - 30 * i / 3 for i in (1, 2, 3)]
    whole = {layer: math.floor(n + 0.5) for layer, n in zip((0, 2, 4), counts, strict=True)}
    differs = []

    def choose(layer: int) -> hand.Choose:
        def keep(maps: Tensor, visual: list[int], row: Row, picture: int) -> list[int]:
            mean = maps.double().mean(0)
            text = mean[row.text][:, row.text]
            weight = text.sum(0 if prior == "received" else 1)
            scores = (weight / weight.sum()) @ mean[row.text][:, visual]
            stay = hand.best(scores, whole[layer])
            differs.append(hand.best(mean[row.text][:, visual].mean(0), whole[layer]) != stay)
            return stay

        return keep

    method = AdaptInfer(keep=6, prior=prior, schedule=schedule)
    stages = {layer: choose(layer) for layer in whole}
    check_masked(method, make, attention, stages, monkeypatch)
    if prior == "received":
        assert any(differs)  # the prior matters


def scaled(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min())


@calls
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_pyramid(alpha: float, make: Any, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After LLM layer 2, by what the tower looked at and by the word that looks most."""
    maps_of = vision_maps(tiny_llava(), make())

    def choose(maps: Tensor, visual: list[int], row: Row, picture: int) -> list[int]:
        guide = maps.mean(0)[row.text][:, visual].amax(0)
        own = scaled(cls_row(maps_of[picture]))
        return hand.best((1 - alpha) * own + alpha * scaled(guide), 8)

    check_masked(Pyramid(keep=8, alpha=alpha), make, attention, {2: choose}, monkeypatch)


def test_pyramid_without_text_prunes_before_the_llm() -> None:
    model, inputs = tiny_llava(), hand.padded_batch()
    found, kept = hand.pruned(model, inputs, Pyramid(keep=8, alpha=0.0))
    maps, visual = vision_maps(model, inputs), hand.features(model, inputs)
    assert kept == [hand.best(cls_row(one), 8) for one in maps]
    by_row = []
    for row in hand.rows_of(inputs):
        own = range(row.first, row.first + len(row.pictures))
        left = [kept[i] for i in own]
        tokens = [visual[i][kept[i]] for i in own]
        by_row.append(hand.greedy_by_hand(model, row, tokens, left=left, renumber=False))
    hand.assert_rows(found, by_row)


# --- merged before the LLM, then cut inside it -------------------------------------------------


def importance(maps: Tensor, threshold: float) -> Tensor:
    """VFlowOpt's map [N] from a tower's attention [H, 1 + N, 1 + N], as if it had no CLS token."""
    among = maps[:, 1:, 1:].double()
    mean = (among / among.sum(-1, keepdim=True)).mean(0)
    received = mean.mean(0)
    most = [i for i, r in enumerate(received) if r > threshold * received.mean()]
    return mean[most or list(range(len(mean)))].mean(0)


def recycled(tokens: Tensor, scores: Tensor, keep: int, cell: int) -> tuple[list[int], Tensor, int]:
    """Tokens that stay, their embeddings, how many groups of several: one more leaves each time."""
    ranked = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    side = tiny.GRID
    for untouched in range(len(scores), -1, -1):
        groups: dict[tuple[int, int], list[int]] = {}
        for i in ranked[untouched:]:
            groups.setdefault((i // side // cell, i % side // cell), []).append(i)
        if untouched + len(groups) == keep:
            break
    merged = {i: tokens[i] for i in ranked[:untouched]}
    for members in groups.values():  # the most important member comes first
        weight = scores[members] / scores[members].sum()
        merged[members[0]] = (weight @ tokens[members].double()).float()
    stay = sorted(merged)
    several = sum(len(members) > 1 for members in groups.values())
    return stay, torch.stack([merged[i] for i in stay]), several


@calls
@pytest.mark.parametrize("positions", ["auto", "renumber"])
def test_vflowopt(
    positions: str, make: Any, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One map: 25 tokens enter the LLM, 20 layer 2 and 9 layer 4, so that a layer sees 18."""
    model, inputs = tiny_llava(attention), make()
    method = VFlowOpt(
        keep=18, threshold=1.2, cell=2.0, projected_share=0.7, first_share=0.8, positions=positions
    )
    seen = hand.watch(method, monkeypatch)
    found, kept = hand.pruned(model, inputs, method)
    maps, features = vision_maps(model, inputs), hand.features(model, inputs)
    by_row, entered, ended, groups = [], [], [], 0
    for row in hand.rows_of(inputs):
        scores, left, tokens = [], [], []
        for picture in range(row.first, row.first + len(row.pictures)):
            scores.append(importance(maps[picture], 1.2))
            stay, merged, several = recycled(features[picture], scores[-1], 25, 2)
            groups += several
            left.append(stay)
            tokens.append(merged)

        def cut(
            count: int, row: Row = row, scores: Any = scores, left: Any = left
        ) -> Callable[[Stream], Choice]:
            def decide(stream: Stream) -> Choice:
                choice = Choice()
                for run, score, own in zip(row.pictures, scores, left, strict=True):
                    alive = [i for i in own if run[i] in stream.columns]
                    stay = [alive[j] for j in hand.best(score[alive], count)]
                    choice.drop |= {run[i] for i in alive if i not in stay}
                    if count == 9:
                        ended.append(stay)
                return choice

            return decide

        entered += left
        stages = {1: Once(cut(20)), 3: Once(cut(9))}
        by_row.append(
            hand.greedy_by_hand(
                model, row, tokens, left=left, stages=stages, renumber=positions == "renumber"
            )
        )
    assert seen[Place.PROJECTED, None] == entered
    assert [len(stay) for stay in seen[Place.LLM_LAYER, 1]] == [20] * len(kept)
    assert kept == ended == seen[Place.LLM_LAYER, 3] and groups > len(kept)
    hand.assert_rows(found, by_row)


# --- VMTC and CMAI -----------------------------------------------------------------------------


def lloyd(points: Tensor, count: int) -> list[list[int]]:
    """Ten rounds of k-means from strided points: members, the closest to the center first."""
    points = points.double()
    total = len(points)
    centers = points[[(2 * j + 1) * total // (2 * count) for j in range(count)]]
    for step in range(11):
        distance = torch.cdist(points, centers)
        nearest = distance.argmin(1)
        members = [(nearest == j).nonzero()[:, 0].tolist() for j in range(count)]
        assert all(members)
        if step < 10:
            centers = torch.stack([points[own].mean(0) for own in members])
    found = []
    for j, own in enumerate(members):
        least = min(float(distance[i, j]) for i in own)
        speaker = next(i for i in own if float(distance[i, j]) <= least * (1 + 1e-4) + 1e-6)
        found.append([speaker, *(i for i in own if i != speaker)])
    return found


def compressed(features: Tensor, attention: Tensor) -> tuple[list[int], Tensor]:
    """VMTC with 12 tokens, 3 of them clusters."""
    primary = hand.best(attention, 9)
    rest = [i for i in range(len(features)) if i not in primary]
    merged = {i: features[i] for i in primary}
    for members in lloyd(features[rest], 3):
        merged[rest[members[0]]] = features[[rest[i] for i in members]].mean(0)
    stay = sorted(merged)
    return stay, torch.stack([merged[i] for i in stay])


@calls
@pytest.mark.parametrize("cmai", [False, True])
def test_vmtc(cmai: bool, make: Any, attention: str) -> None:
    """Merged before the LLM; behind layer 1 words do not see the quarter they focus on least."""
    model, inputs = tiny_llava(attention), make()
    found, kept = hand.pruned(model, inputs, VMTC(keep=12, cmai=cmai))
    maps, features = vision_maps(model, inputs), hand.features(model, inputs)
    by_row, expected = [], []
    for row in hand.rows_of(inputs):
        own = range(row.first, row.first + len(row.pictures))
        pairs = [compressed(features[i], cls_row(maps[i])) for i in own]
        left, tokens = [stay for stay, _ in pairs], [merged for _, merged in pairs]
        expected += left

        def decide(stream: Stream, row: Row = row, left: Any = left) -> Choice:
            choice = Choice()
            words = stream.rows(row.text, row.text).double().mean(0)
            for run, stay in zip(row.pictures, left, strict=True):
                visual = [run[i] for i in stay]
                picture = stream.rows(row.text, visual).double().mean(0)
                focus = words / words.sum(1, keepdim=True)
                focus = focus @ (picture / picture.sum(1, keepdim=True))
                for query, scores in zip(row.text, focus.tolist(), strict=True):
                    ranked = sorted(zip(scores, visual, strict=True))
                    choice.hide |= {(query, key) for _, key in ranked[: len(visual) // 4]}
            return choice

        stages = {1: Once(decide)} if cmai else {}
        by_row.append(
            hand.greedy_by_hand(model, row, tokens, left=left, stages=stages, renumber=True)
        )
    assert kept == expected
    hand.assert_rows(found, by_row)


# --- calls -------------------------------------------------------------------------------------

METHODS = [
    (FastV(keep=8), FastV(keep=36)),
    (AdaptInfer(keep=6), AdaptInfer(keep=36)),
    (Pyramid(keep=8), Pyramid(keep=36)),
    (VFlowOpt(keep=12, threshold=1.2, cell=2.0), VFlowOpt(keep=36)),
    (VMTC(keep=12, cmai=True), VMTC(keep=36)),
]
names = [method.name for method, _ in METHODS]


@pytest.mark.parametrize("method", [method for method, _ in METHODS], ids=names)
def test_a_batch_is_its_rows(method: Pruner) -> None:
    hand.check_batch_is_its_rows(method, layers=LAYERS)


@pytest.mark.parametrize(("method", "neutral"), METHODS, ids=names)
def test_no_trace_is_left(method: Pruner, neutral: Pruner) -> None:
    hand.check_leaves_no_trace(method, neutral, layers=LAYERS)
