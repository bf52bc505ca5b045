"""SparseVLM attached to a model, against the bare model's maps and a loop over layers by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llava_oracles as hand
import tiny
import vistoken
from llava_oracles import Choice, Once, Row, Stages, Stream
from test_language import greedy
from vistoken.pruning._sparsevlm import schedule
from vistoken.pruning.sparsevlm import SparseVLM

LAYERS = 8
STAGES = {"v1.5": (0, 1, 4), "v2": (0, 1, 4), "rank": (0, 1, 4, 5)}  # 2, 6, 15, 19 of 32, in 8
WIDTH = 8  # of a head


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pictures of 100 tokens, so that several clusters are recycled."""
    monkeypatch.setattr(tiny, "GRID", 10)
    monkeypatch.setattr(tiny, "TOKENS", 100)
    with torch.no_grad():
        yield


def tiny_llava(**more: Any) -> Any:
    return hand.tiny_llava(layers=LAYERS, **more)


def tops(mode: str, keep: int) -> dict[int, int]:
    """How many tokens each stage keeps by score; the numbers have tests of their own."""
    return {stage.layer: stage.top for stage in schedule(mode, tiny.TOKENS, keep, LAYERS)}


# --- the method by hand -------------------------------------------------------------------------


def raters(model: Any, row: Row, visual: Tensor) -> list[int]:
    """Columns of the text whose relevance to one picture is above the mean."""
    match = visual.double() @ hand.words(model, row, row.text).double().T
    relevance = match.softmax(-1).mean(0).tolist()  # over the text, then over the picture
    mean = sum(relevance) / len(relevance)
    chosen = [c for c, r in zip(row.text, relevance, strict=True) if r > mean * (1 + 1e-6)]
    return chosen or row.text


def clusters(points: Tensor, count: int) -> list[list[int]]:
    """Density-peak clusters: members of each, its center first; by descending product."""
    n = len(points)
    far = [(points - a).double().norm(dim=1) / points.shape[1] ** 0.5 for a in points]
    far = [row.tolist() for row in far]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in far]
    ahead = [[j for j in range(n) if (-density[j], j) < (-density[i], i)] for i in range(n)]
    longest = max(max(row) for row in far)
    apart = [min((far[i][j] for j in ahead[i]), default=longest) for i in range(n)]
    order = sorted(range(n), key=lambda i: (-density[i] * apart[i], i))
    centers = order[:count]
    found = [[center] for center in centers]
    for i in range(n):
        if i not in centers:
            found[min(range(count), key=lambda c: (far[i][centers[c]], c))].append(i)
    return found


def recycling_stage(
    row: Row, rating: list[list[int]], count: Callable[[Tensor, int], int], log: list[Any]
) -> Once:
    """One stage of v1.5 or rank; count: maps of raters to picture and tokens left -> top."""

    def decide(stream: Stream) -> Choice:
        choice = Choice()
        for run, rows in zip(row.pictures, rating, strict=True):
            visual = [column for column in run if column in stream.columns]
            block = stream.rows(rows, visual).mean(0)
            scores = block.mean(0)
            top = min(count(block, len(visual)), len(visual))
            pruned = len(visual) - top
            take = int(0.3 * pruned) + 1
            groups = int(take / 10) + 1
            if pruned == 0 or top + groups >= len(visual):
                log.append((visual, 0))
                continue
            stay = hand.best(scores, top)
            rest = [j for j in range(len(visual)) if j not in stay]
            candidates = [rest[j] for j in hand.best(scores[rest], take)]
            columns = [visual[j] for j in candidates]
            for members in clusters(stream.hidden[stream.at(columns)], groups):
                choice.merge[columns[members[0]]] = [columns[m] for m in members]
            kept = {visual[j] for j in stay} | (set(choice.merge) & set(run))
            choice.drop |= set(visual) - kept
            log.append((sorted(kept), groups))
        return choice

    return Once(decide)


def by_hand(
    model: Any, inputs: dict[str, Tensor], count: Callable[[int], Any], mode: str, renumber: bool
) -> tuple[list[list[Tensor]], list[list[list[int]]], int]:
    """Logits of each row by step, what each stage leaves of each picture, all clusters made."""
    seen, found, groups = hand.features(model, inputs), [], 0
    left: list[list[list[int]]] = [[] for _ in STAGES[mode]]
    for row in hand.rows_of(inputs):
        visual = seen[row.first : row.first + len(row.pictures)]
        rating = [raters(model, row, picture) for picture in visual]
        logs: list[list[Any]] = [[] for _ in STAGES[mode]]
        stages: Stages = {
            layer: recycling_stage(row, rating, count(layer), log)
            for layer, log in zip(STAGES[mode], logs, strict=True)
        }
        found.append(hand.greedy_by_hand(model, row, visual, stages=stages, renumber=renumber))
        for stage, log in zip(left, logs, strict=True):
            for run, (columns, made) in zip(row.pictures, log, strict=True):
                stage.append([run.index(column) for column in columns])
                groups += made
    return found, left, groups


def gravity(distance: int) -> float:
    """Product of all-ones queries and keys of a head, so far apart, over the root of its width."""
    angles = (distance * 10_000.0 ** (-2 * i / WIDTH) for i in range(WIDTH // 2))
    return 2 * sum(math.cos(angle) for angle in angles) / WIDTH**0.5


def corrected(maps: Tensor, rows: list[int], visual: list[int], heads: int) -> list[float]:
    """Scores of v2, from the full maps of a layer [H, S, S] at the positions they were made."""
    floor = 0.1 * WIDTH**0.5
    weights = [[1 / max(gravity(r - v), floor) for v in visual] for r in rows]
    per_head = maps[:, rows][:, :, visual].double() * torch.tensor(weights).double()
    chosen = hand.best(per_head.sum((1, 2)), heads)
    return per_head[chosen].mean((0, 1)).tolist()


# --- kept positions: masked keys -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "attention"),
    [(hand.one_row, "eager"), (hand.padded_batch, "sdpa"), (hand.padded_batch, "eager")],
)
def test_v2_equals_masked_keys(
    make: Callable[[], Any], attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny_llava(attention=attention), make()
    method = SparseVLM(keep=30, mode="v2", heads=2)
    seen = hand.watch(method, monkeypatch)
    found, kept = hand.pruned(model, inputs, method)

    oracle, counts = tiny_llava(attention="eager"), tops("v2", 30)
    pictures = hand.features(oracle, inputs)
    bare = greedy(oracle, inputs, 0)

    without: list[bool] = []  # do the heads and the gravity matter?

    def choose(layer: int) -> hand.Choose:
        def keep(maps: Tensor, visual: list[int], row: Row, picture: int) -> list[int]:
            rows = raters(oracle, row, pictures[picture])
            assert 0 < len(rows) < len(row.text)
            stay = hand.best(corrected(maps, rows, visual, 2), counts[layer])
            without.append(hand.best(corrected(maps, rows, visual, 4), counts[layer]) != stay)
            flat = maps[:, rows][:, :, visual].mean((0, 1))
            without.append(hand.best(flat, counts[layer]) != stay)
            return stay

        return keep

    stages = {layer: choose(layer) for layer in STAGES["v2"]}
    left = hand.masked_stages(oracle, inputs, stages)
    assert hand.llm_stages(seen) == dict(zip(STAGES["v2"], left, strict=True))
    assert kept == left[-1]
    assert len({len(stage[0]) for stage in left}) == 3  # every stage drops some
    if make is hand.padded_batch:
        assert any(without[::2]) and any(without[1::2])
    hand.assert_steps(found, greedy(oracle, inputs, hand.STEPS))
    assert not torch.allclose(found[0], bare[0], atol=1e-3)


# --- recycling and renumbered positions: a loop over layers ---------------------------------------


@pytest.mark.parametrize("positions", ["auto", "original"])
@pytest.mark.parametrize("make", [hand.one_row, hand.padded_batch])
def test_v15_equals_a_loop_that_cuts_merges_and_renumbers(
    make: Callable[[], Any], positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny_llava(), make()
    method = SparseVLM(keep=30, positions=positions)
    seen = hand.watch(method, monkeypatch)
    found, kept = hand.pruned(model, inputs, method)
    counts = tops("v1.5", 30)
    expected, left, groups = by_hand(
        model, inputs, lambda layer: lambda *_: counts[layer], "v1.5", positions == "auto"
    )
    assert hand.llm_stages(seen) == dict(zip(STAGES["v1.5"], left, strict=True))
    assert kept == left[-1] and groups > 3 * len(kept)  # several in a stage
    hand.assert_rows(found, expected)


def test_rank_mode_counts_singular_values(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_llava(), hand.one_row()
    method = SparseVLM(keep=12, mode="rank", scale=6.0, bias=2.5)
    seen = hand.watch(method, monkeypatch)
    found, kept = hand.pruned(model, inputs, method)
    ranks = []

    def count(layer: int) -> Any:
        def top(block: Tensor, left: int) -> int:
            values = np.linalg.svd(block.numpy(), compute_uv=False)
            slack = values.max() * max(block.shape) * np.finfo(np.float32).eps
            ranks.append(int((values > slack).sum()))
            wanted = int(ranks[-1] * 6.0 + 2.5)
            if layer != 5:
                return wanted
            made = [int((int(0.3 * (left - t)) + 1) / 10) + 1 for t in range(wanted + 1)]
            return max(t for t in range(1, wanted + 1) if t == 1 or t + made[t] <= 12)

        return top

    expected, left, _ = by_hand(model, inputs, count, "rank", True)
    assert hand.llm_stages(seen) == dict(zip(STAGES["rank"], left, strict=True))
    assert kept == left[-1] and len(kept[0]) <= 12 and max(ranks) > 1
    hand.assert_rows(found, expected)


@pytest.mark.parametrize("mode", ["v1.5", "v2"])
def test_one_word_behind_the_picture_rates(mode: str) -> None:
    """No word can be above the mean of one: it rates, and nothing is NaN."""
    model = tiny_llava()
    inputs = {**tiny.batch(tiny.prompt(4, "image", 1)), "pixel_values": tiny.pictures(1)}
    (row,) = hand.rows_of(inputs)
    assert raters(model, row, hand.features(model, inputs)[0]) == row.text == [105]
    found, kept = hand.pruned(model, inputs, SparseVLM(keep=30, mode=mode), 2)
    assert all(bool(logits.isfinite().all()) for logits in found)
    if mode == "v1.5":
        counts = tops(mode, 30)
        expected, left, _ = by_hand(
            model, inputs, lambda layer: lambda *_: counts[layer], mode, True
        )
        assert kept == left[-1]
        hand.assert_rows(found, [steps[:3] for steps in expected])


# --- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["v1.5", "v2"])
def test_a_batch_is_its_rows(mode: str) -> None:
    heads: dict[str, Any] = {"heads": 2} if mode == "v2" else {}
    hand.check_batch_is_its_rows(SparseVLM(keep=30, mode=mode, **heads), layers=LAYERS)


@pytest.mark.parametrize("mode", ["v1.5", "v2", "rank"])
def test_no_trace_is_left(mode: str) -> None:
    more: dict[str, Any] = {"scale": 4.0} if mode == "rank" else {}
    method = SparseVLM(keep=20, mode=mode, **more)
    hand.check_leaves_no_trace(method, SparseVLM(keep=100, mode=mode), layers=LAYERS)


@pytest.mark.parametrize(
    ("mode", "budget", "left", "entering", "reported"),
    [
        ("v1.5", 192, (309, 204, 113), 206.5, 192.03),
        ("v1.5", 64, (82, 32, 18), 82.3, 64.8),
        ("v2", 128, (238, 108, 60), 144.1, 128.0),
    ],
)
def test_official_tables_at_576_tokens_and_32_layers(
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    budget: int,
    left: tuple[int, int, int],
    entering: float,
    reported: float,
) -> None:
    monkeypatch.setattr(tiny, "GRID", 24)
    monkeypatch.setattr(tiny, "TOKENS", 576)
    model = tiny.tiny_llava(layers=32, vision_layers=2)
    inputs = {**tiny.batch(tiny.prompt(4, "image", 8)), "pixel_values": tiny.pictures(1)}
    with vistoken.attach(model, SparseVLM(keep=budget, mode=mode)) as held:
        cache = model(**inputs, use_cache=True).past_key_values
        report = held.report()
    tokens = [576] * 3 + [left[0]] * 4 + [left[1]] * 9 + [left[2]] * 16
    assert report.layer_tokens == tokens
    assert [cache.get_seq_length(layer) for layer in range(32)] == [13 + n for n in tokens]
    assert report.mean_tokens == pytest.approx(entering, abs=0.05)
    assert sum([*tokens[1:], left[2]]) / 32 == pytest.approx(reported, abs=0.05)
