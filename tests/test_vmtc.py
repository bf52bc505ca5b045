"""VMTC and CMAI against loops: k-means with its repairs, cluster means, focus, hidden pairs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vistoken.contract import ModelFacts, Place, Selection, Signal, Stage, View
from vistoken.cost import TransformerShape
from vistoken.errors import MethodError
from vistoken.pictures import plain
from vistoken.pruning._kmeans import DISTANCES, INITS, kmeans
from vistoken.pruning.vmtc import VMTC, cluster_rest


def facts(text_layers: int = 8, **more: Any) -> ModelFacts:
    shape = TransformerShape(2, 8, 2, 2, 4, 16, 2)
    return ModelFacts("none", (5, 8), 1, 4, 2, text_layers, shape, shape, 0, 0, **more)


# --- k-means -------------------------------------------------------------------------------------


def slow_kmeans(
    points: list[list[float]], clusters: int, iterations: int, init: str, distance: str
) -> tuple[list[int], list[int]]:
    """(cluster of each point, representative of each cluster), one point after the other."""
    if distance == "cosine":
        lengths = [math.sqrt(sum(x * x for x in p)) or 1.0 for p in points]
        points = [[x / n for x in p] for p, n in zip(points, lengths, strict=True)]

    def away(a: list[float], b: list[float]) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    count, width = len(points), len(points[0])
    if init == "strided":
        start = [math.floor((j + 0.5) * count / clusters) for j in range(clusters)]
    else:
        mean = [sum(p[c] for p in points) / count for c in range(width)]
        start = [min(range(count), key=lambda i: away(points[i], mean))]
        while len(start) < clusters:
            start.append(
                max(range(count), key=lambda i: min(away(points[i], points[s]) for s in start))
            )
    centers = [points[i] for i in start]

    def assign() -> list[int]:
        return [min(range(clusters), key=lambda j: away(p, centers[j])) for p in points]

    for _ in range(iterations):
        label = assign()
        for j in range(clusters):
            group = [p for p, own in zip(points, label, strict=True) if own == j]
            if group:
                centers[j] = [sum(p[c] for p in group) / len(group) for c in range(width)]
    label = assign()
    far = [away(p, centers[own]) for p, own in zip(points, label, strict=True)]
    middle = [sum(p[c] for p in points) / count for c in range(width)]
    norm = sum(away(p, middle) for p in points) / count
    speaker: dict[int, int] = {}
    for j in set(label):
        group = [i for i in range(count) if label[i] == j]
        least = min(far[i] for i in group)
        speaker[j] = next(i for i in group if far[i] <= 1.001 * least + 1e-6 * norm)
    free = sorted((i for i in range(count) if i not in speaker.values()), key=lambda i: -far[i])
    for j in range(clusters):
        if j not in speaker:
            speaker[j] = free.pop(0)
            label[speaker[j]] = j
    return label, [speaker[j] for j in range(clusters)]


def check_clusters(member: Tensor, center: Tensor) -> None:
    """Every point in one cluster, no cluster empty, representatives are members."""
    assert (member.sum(1) == 1).all() and member.any(-1).all()
    assert member.gather(2, center[..., None]).all()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_kmeans_equals_loops(init: str, distance: str, shift: float) -> None:
    for count, clusters, iterations in (
        (1, 1, 3),
        (5, 5, 2),
        (13, 4, 0),
        (13, 4, 1),
        (40, 7, 10),
        (61, 20, 4),
        (37, 1, 2),
    ):
        points = torch.randn(3, count, 4) + shift * torch.tensor([1.0, 0, 0, 0])
        member, center = kmeans(
            points, clusters, iterations=iterations, init=init, distance=distance
        )
        check_clusters(member, center)
        for row in range(3):
            label, speakers = slow_kmeans(
                points[row].double().tolist(), clusters, iterations, init, distance
            )
            assert member[row].int().argmax(0).tolist() == label
            assert center[row].tolist() == speakers


def test_empty_clusters_are_filled_by_the_farthest_points() -> None:
    """Few distinct points on whole numbers, so that distances are exact and clusters run empty."""
    repaired = 0
    for seed in range(60):
        draw = torch.Generator().manual_seed(seed)
        points = torch.randint(-1, 2, (1, 16, 1), generator=draw).float()
        points = torch.cat([points, -points], 1)  # the mean is exactly 0
        clusters, iterations = 3 + seed % 13, seed % 3
        member, center = kmeans(points, clusters, iterations=iterations)
        check_clusters(member, center)
        label, speakers = slow_kmeans(
            points[0].double().tolist(), clusters, iterations, "strided", ""
        )
        assert member[0].int().argmax(0).tolist() == label
        assert center[0].tolist() == speakers
        repaired += clusters > len(set(points[0, :, 0].tolist()))
    assert repaired > 40


@pytest.mark.parametrize("fill", [0.0, 3.5, torch.nan, torch.inf, 3e38])
def test_degenerate_points_still_make_full_clusters(fill: float) -> None:
    points = torch.full((2, 11, 3), fill)
    points[1, 4:] = torch.randn(7, 3)
    for init in INITS:
        for distance in DISTANCES:
            for clusters in (1, 4, 11):
                check_clusters(*kmeans(points, clusters, init=init, distance=distance))


def test_kmeans_repeats_itself_and_leaves_the_random_state_alone() -> None:
    points, before = torch.randn(2, 50, 6), torch.get_rng_state()
    first = kmeans(points, 9, init="farthest")
    again = kmeans(points, 9, init="farthest")
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_kmeans_lowers_the_spread() -> None:
    blobs = torch.randn(1, 6, 1, 8) * 5 + torch.randn(1, 6, 20, 8) * 0.1
    points = blobs.flatten(1, 2)[:, torch.randperm(120)]

    def spread(iterations: int, init: str) -> float:
        member, _ = kmeans(points, 6, iterations=iterations, init=init)
        share = member / member.sum(-1, keepdim=True)
        own = member.float().mT @ (share @ points)
        return float((points - own).square().sum())

    assert spread(10, "strided") <= spread(1, "strided") <= spread(0, "strided")
    assert spread(10, "farthest") < 1.1 * 120 * 8 * 0.01  # finds the blobs


def test_autocast_and_half_precision_inputs() -> None:
    points = torch.randn(2, 60, 8).bfloat16()
    expected = kmeans(points.float(), 7)
    assert torch.equal(kmeans(points, 7)[0], expected[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kmeans(points, 7)[0], expected[0])


@pytest.mark.parametrize(
    ("clusters", "given"),
    [(0, {}), (8, {}), (2, {"init": "random"}), (2, {"distance": "dot"}), (2, {"iterations": -1})],
)
def test_bad_clusterings_are_refused(clusters: int, given: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match="kmeans: "):
        kmeans(torch.randn(1, 7, 2), clusters, **given)


# --- the merge -----------------------------------------------------------------------------------


def slow_vmtc(
    features: Tensor, attention: list[float], keep: int, merged: int, **given: Any
) -> list[tuple[int, list[float]]]:
    """(place, token) of one picture in fp64."""
    ranked = sorted(range(len(attention)), key=lambda i: (-attention[i], i))
    kept = sorted(ranked[: keep - merged])
    rest = [i for i in range(len(attention)) if i not in kept]
    points = [features[i].double().tolist() for i in rest]
    label, speakers = slow_kmeans(points, merged, **given)
    found = [(i, features[i].double().tolist()) for i in kept]
    for j in range(merged):
        group = [p for p, own in zip(points, label, strict=True) if own == j]
        mean = [sum(values) / len(group) for values in zip(*group, strict=True)]
        found.append((rest[speakers[j]], mean))
    return sorted(found)


def choose(method: VMTC, features: Tensor, attention: Tensor) -> Selection | None:
    stage = method.stages(facts())[0]
    assert stage.place is Place.PROJECTED and stage.signals <= method.signals
    rows, count = attention.shape
    signals = {Signal.FEATURES: features, Signal.CLS_ATTENTION: attention}
    origin = torch.arange(count).expand(rows, count)
    view = View(stage, facts(), plain(5, 8), origin, {}, signals.__getitem__)
    return method.select(view, method.keep)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 7, 40])
def test_vmtc_equals_loops(share: float, count: int) -> None:
    features, attention = torch.randn(3, count, 6), torch.rand(3, count)
    for keep in sorted({1, count // 2, count - 1}):
        given = {"iterations": 3, "init": "farthest", "distance": "cosine"}
        method = VMTC(keep=keep, clusters=share, **given)
        chosen = choose(method, features, attention)
        merged = math.floor(share * keep + 0.5)
        assert chosen.indices.shape == (3, keep)
        assert (chosen.tokens is None) == (merged == 0)
        tokens = chosen.tokens
        if tokens is None:
            tokens = features.gather(1, chosen.indices[..., None].expand(-1, -1, 6))
        for row in range(3):
            if merged:
                expected = slow_vmtc(features[row], attention[row].tolist(), keep, merged, **given)
            else:
                best = attention[row].topk(keep).indices.sort().values.tolist()
                expected = [(i, features[row, i].tolist()) for i in best]
            assert chosen.indices[row].tolist() == [place for place, _ in expected]
            means = torch.tensor([token for _, token in expected])
            torch.testing.assert_close(tokens[row], means.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_primary_tokens_keep_every_bit_and_all_mass_is_merged(dtype: torch.dtype) -> None:
    features, attention = torch.randn(2, 40, 8).to(dtype), torch.rand(2, 40)
    kept = attention.topk(6).indices.sort(dim=1).values
    places, tokens = cluster_rest(features, kept, 5)
    assert tokens.dtype == dtype and (places.diff(dim=1) > 0).all()
    for row in range(2):
        primary = set(kept[row].tolist())
        for place, token in zip(places[row].tolist(), tokens[row], strict=True):
            assert place not in primary or torch.equal(token, features[row, place])
        assert primary < set(places[row].tolist())


def test_one_cluster_is_the_mean_of_the_rest() -> None:
    features, kept = torch.randn(1, 9, 4), torch.tensor([[1, 5]])
    places, tokens = cluster_rest(features, kept, 1)
    rest = [0, 2, 3, 4, 6, 7, 8]
    merged = (set(places[0].tolist()) - {1, 5}).pop()
    at = places[0].tolist().index(merged)
    torch.testing.assert_close(tokens[0, at], features[0, rest].mean(0))
    away = (features[0, rest] - features[0, rest].mean(0)).square().sum(-1)
    assert merged == rest[int(away.argmin())]


def test_pictures_do_not_depend_on_their_batch() -> None:
    features, attention = torch.randn(4, 40, 8), torch.rand(4, 40)
    method = VMTC(keep=12, clusters=0.5)
    whole = choose(method, features, attention)
    for row in range(4):
        alone = choose(method, features[row : row + 1], attention[row : row + 1])
        assert torch.equal(alone.indices[0], whole.indices[row])
        torch.testing.assert_close(alone.tokens[0], whole.tokens[row])


def test_gradients_reach_all_tokens() -> None:
    features = torch.randn(2, 20, 4, requires_grad=True)
    kept = torch.tensor([[0, 3], [4, 5]])
    cluster_rest(features, kept, 4)[1].sum().backward()
    assert (features.grad.abs().sum(-1) > 0).all()


def test_merges_that_cannot_be_are_refused() -> None:
    for clusters in (0, 6):
        with pytest.raises(MethodError, match=f"4 tokens and {clusters} clusters"):
            cluster_rest(torch.randn(1, 9, 2), torch.arange(4)[None], clusters)


# --- the method ----------------------------------------------------------------------------------


def test_stages_and_what_they_read() -> None:
    both = frozenset({Signal.FEATURES, Signal.CLS_ATTENTION})
    assert VMTC(keep=5).stages(facts()) == (Stage(Place.PROJECTED, None, both),)
    (alone,) = VMTC(keep=5, clusters=0.0).stages(facts())
    assert alone.signals == {Signal.CLS_ATTENTION}
    (alone,) = VMTC(keep=5, clusters=1).stages(facts())
    assert alone.signals == {Signal.FEATURES}
    first, second = VMTC(keep=5, cmai=True).stages(facts(32))
    assert first.signals == both and second.layer == 8
    assert VMTC(keep=5, cmai=True).reads() == VMTC.signals
    assert VMTC(keep=5, cmai=True).stages(facts(32, first_text_stage=11))[1].layer == 11
    assert VMTC(keep=5, cmai=True, cmai_layer=3).stages(facts())[1].layer == 3
    assert VMTC(keep=5, cmai=True).always and not VMTC(keep=5).always


@pytest.mark.parametrize(
    ("layer", "about"),
    [(7, facts()), (99, facts()), (1, facts(first_text_stage=2)), (None, facts(1)), (0, facts(1))],
)
def test_layers_outside_the_model_are_refused(layer: int | None, about: ModelFacts) -> None:
    with pytest.raises(MethodError, match=r"vmtc: cmai needs a layer .* from \d+ to -?\d+"):
        VMTC(keep=5, cmai=True, cmai_layer=layer).stages(about)
    assert VMTC(keep=5, cmai_layer=layer).stages(about)  # without cmai nothing is asked of it


def test_a_met_budget_changes_nothing() -> None:
    assert choose(VMTC(keep=40), torch.randn(1, 40, 2), torch.rand(1, 40)) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"clusters": 1.5}, "clusters must be at least 0 and at most 1"),
        ({"iterations": 2.0}, "iterations must be at least 0"),
        ({"init": "random"}, "init must be one of"),
        ({"distance": "l1"}, "distance must be one of"),
        ({"heads": "max"}, "heads must be one of"),
        ({"rule": "top"}, "rule must be one of"),
        ({"threshold": 1.0}, "below 1 with rule='quantile'"),
        ({"threshold": -0.1}, "at least 0 and below 1"),
        ({"threshold": math.nan}, "threshold must be"),
        ({"cmai_layer": 1.5}, "cmai_layer must be a whole number"),
        ({"cmai": 1}, "cmai must be"),
    ],
)
def test_bad_options_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=f"vmtc: .*{words}"):
        VMTC(keep=9, **given)


def test_recipes_round_trip() -> None:
    method = VMTC(ratio=0.5, clusters=0.4, cmai=True, rule="relative", threshold=0.7)
    recipe = json.loads(json.dumps(method.to_dict()))
    assert recipe.pop("name") == "vmtc" and VMTC.from_options(recipe) == method


def test_no_value_is_read_back() -> None:
    """Fake tensors have no values: anything that needs one raises."""
    with FakeTensorMode():
        features, attention = torch.randn(2, 40, 6, dtype=torch.bfloat16), torch.rand(2, 40)
        for init in INITS:
            chosen = choose(VMTC(keep=9, clusters=0.5, init=init), features, attention)
            assert chosen.indices.shape == (2, 9) and chosen.tokens.shape == (2, 9, 6)
