"""SparseVLM against slow readings of its rules: raters, scores, stages, ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from test_sparsevlm_budgets import facts
from test_sparsevlm_recycling import draw, slow_recycle
from vistoken.contract import ModelFacts, Selection, Signal, View
from vistoken.errors import MethodError
from vistoken.language import LanguageRows, Text
from vistoken.pictures import plain
from vistoken.pruning._sparsevlm import schedule
from vistoken.pruning.sparsevlm import SparseVLM, rate, text_raters

# --- the oracle: plain loops over Python numbers -------------------------------------------------


def slow_raters(visual: Tensor, text: Tensor) -> list[bool]:
    """Softmax over the text for each visual token, mean over them, strictly above the average."""
    relevance = [0.0] * len(text)
    for v in visual.double().tolist():
        logits = [sum(map(math.prod, zip(v, t, strict=True))) for t in text.double().tolist()]
        powers = [math.exp(x - max(logits)) for x in logits]
        for j, power in enumerate(powers):
            relevance[j] += power / sum(powers) / len(visual)
    above = [r > sum(relevance) / len(text) * (1 + 1e-7) for r in relevance]
    return above if any(above) else [True] * len(text)


def slow_scores(
    attention: Tensor, raters: list[bool], gravity: Tensor | None, heads: int, dim: int
) -> list[float]:
    """Scores of one picture: attention [H, T, N], gravity [T, N]."""
    rated = [t for t, yes in enumerate(raters) if yes]
    maps = attention.double()
    if gravity is None:
        used = list(range(len(maps)))
    else:
        maps = maps / gravity.double().clamp(min=0.1 * math.sqrt(dim))
        mass = [maps[h][rated].sum().item() for h in range(len(maps))]
        used = sorted(range(len(maps)), key=lambda h: -mass[h])[:heads]
    columns = range(maps.shape[-1])
    count = len(used) * len(rated)
    return [sum(maps[h, t, n].item() for h in used for t in rated) / count for n in columns]


def slow_rank(rows: list[list[Fraction]]) -> int:
    """Rank by Gaussian elimination, exactly."""
    rank = 0
    for column in range(len(rows[0])):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] / rows[rank][column]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank


# --- views by hand -------------------------------------------------------------------------------


class Rows(LanguageRows):
    """Attention of text rows as given."""

    text_attention: Any = None
    gravity: Any = None

    def __init__(self, mask: Tensor, attention: Tensor, gravity: Tensor | None = None) -> None:
        self.text_mask, self.text_attention, self.gravity = mask, attention, gravity


def inputs(images: int, tokens: int, text: int, seed: int, heads: int = 4) -> dict[str, Tensor]:
    """All that is read for pictures of `tokens` tokens; some attention goes to other keys."""
    logits = torch.cat(
        [
            2 * draw(images, heads, text, tokens, seed=seed),
            torch.ones(1).expand(images, heads, text, 1),
        ],
        -1,
    )
    return {
        "features": draw(images, tokens, 8, seed=seed + 1),
        "text": draw(images, text, 8, seed=seed + 2),
        "mask": torch.ones(images, text, dtype=torch.bool),
        "attention": logits.softmax(-1)[..., :-1],
        "gravity": 4
        * torch.rand(images, text, tokens, generator=torch.Generator().manual_seed(seed)),
        "hidden": 3 * draw(images, tokens, 6, seed=seed + 3),
    }


def run(
    method: SparseVLM,
    given: dict[str, Tensor],
    keep: int,
    stage: int,
    memory: dict[str, Any],
    *,
    model: ModelFacts | None = None,
    total: int | None = None,
) -> Selection | None:
    """One call of `select`; `total` tokens had the picture at first."""
    model = model or facts()
    images, tokens = given["features"].shape[:2]
    values = {
        Signal.FEATURES: given["features"],
        Signal.TEXT_EMBEDDINGS: Text(given["text"], given["mask"]),
        Signal.HIDDEN: given["hidden"],
        Signal.LLM_ATTENTION: Rows(given["mask"], given["attention"], given["gravity"]),
    }
    origin = torch.arange(tokens, device=given["features"].device).repeat(images, 1)
    return method.select(
        View(
            method.stages(model)[stage],
            model,
            plain(1, total or tokens),
            origin,
            memory,
            values.__getitem__,
        ),
        keep,
    )


def through(method: SparseVLM, given: dict[str, Tensor], keep: int, **more: Any) -> list[Tensor]:
    """Indices, and tokens if merged, of the stages 0 (raters) and 1."""
    memory: dict[str, Any] = {}
    assert run(method, given, keep, 0, memory, **more) is None
    found = run(method, given, keep, 1, memory, **more)
    assert found is not None and found.sizes is None and found.hidden is None
    return [found.indices] + ([] if found.tokens is None else [found.tokens])


# --- raters --------------------------------------------------------------------------------------


def test_raters_are_the_text_above_the_average() -> None:
    shares = []
    for seed, (tokens, text) in enumerate(itertools.product((1, 5, 36), (1, 2, 3, 9, 20))):
        for scale, dtype in itertools.product((0.1, 1.0, 30.0), (torch.float32, torch.float16)):
            visual = (draw(tokens, 7, seed=seed) * scale).to(dtype)
            words = draw(text, 7, seed=seed + 50).to(dtype)
            found = text_raters(visual, words)
            assert found.dtype == torch.bool and found.tolist() == slow_raters(visual, words)
            shares.append(found.float().mean().item())
    assert min(shares) < 0.2 < sum(shares) / len(shares) < 0.8


def test_a_text_without_raters_rates_as_a_whole() -> None:
    for text in (1, 2, 3, 7, 11, 60):
        assert text_raters(draw(9, 5), draw(1, 5, seed=1).expand(text, 5)).all()
        assert text_raters(torch.zeros(9, 5), draw(text, 5)).all()
        assert text_raters(torch.full((9, 5), math.nan), draw(text, 5)).all()


def test_autocast_does_not_reach_the_raters() -> None:
    visual, text = draw(576, 32), draw(60, 32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        within = text_raters(visual, text)
    assert torch.equal(within, text_raters(visual, text))


def test_padded_texts_give_the_raters_of_single_ones() -> None:
    method, lengths = SparseVLM(keep=64), (3, 9, 1, 6)
    given = inputs(len(lengths), 20, 9, seed=3)
    for row, length in enumerate(lengths):
        given["mask"][row, : 9 - length] = False
        given["text"][row, : 9 - length] = 1e4  # padding must not be read
    memory: dict[str, Any] = {}
    run(method, given, 8, 0, memory)
    for row, length in enumerate(lengths):
        alone = text_raters(given["features"][row], given["text"][row, 9 - length :])
        assert memory["raters"][row].tolist() == [False] * (9 - length) + alone.tolist()


def test_bad_shapes_are_refused() -> None:
    for visual, text in (((3, 4), (2, 5)), ((1, 3, 4), (2, 4)), ((0, 4), (2, 4)), ((3, 4), (0, 4))):
        with pytest.raises(MethodError, match="text_raters"):
            text_raters(torch.zeros(visual), torch.zeros(text))


# --- the stages ----------------------------------------------------------------------------------


def test_three_stages_keep_what_loops_keep() -> None:
    """Every stage of 576 -> 309 -> 204 -> 113, and of v2, on new attention each time."""
    for mode, counts in (("v1.5", (309, 204, 113)), ("v2", (300, 200, 118))):
        method, memory = (
            SparseVLM(keep=192, mode=mode, **({"heads": 3} if mode == "v2" else {})),
            {},
        )
        given, tokens = inputs(2, 576, 5, seed=11), 576
        assert run(method, given, 192, 0, memory) is None
        raters = [slow_raters(v, t) for v, t in zip(given["features"], given["text"], strict=True)]
        for stage, left in enumerate(counts, start=1):
            given = {**given, **inputs(2, tokens, 5, seed=20 * stage)}
            found = run(method, given, 192, stage, memory, total=576)
            assert found is not None and found.indices.shape == (2, left)
            for row in range(2):
                gravity = given["gravity"][row] if mode == "v2" else None
                scores = slow_scores(given["attention"][row], raters[row], gravity, 3, 16)
                expected = slow_stage(given["hidden"][row], scores, left, mode)
                assert found.indices[row].tolist() == [index for index, _ in expected]
                if mode == "v1.5":
                    means = torch.stack([token for _, token in expected])
                    torch.testing.assert_close(
                        found.tokens[row], means.float(), atol=1e-5, rtol=1e-5
                    )
            assert (found.tokens is None) == (mode == "v2")
            tokens = left


def slow_stage(
    hidden: Tensor, scores: list[float], left: int, mode: str
) -> list[tuple[int, Tensor]]:
    """Index and content of what stays, in reading order; `left` counts the merged ones."""
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    for top in range(left, 0, -1) if mode == "v1.5" else [left]:
        kept, rest = best[:top], sorted(best[top:])
        result = [(i, hidden[i].double()) for i in kept]
        if mode == "v1.5":
            if top + int((int(0.3 * len(rest)) + 1) / 10) + 1 != left:
                continue
            places, means = slow_recycle(hidden[rest], [scores[i] for i in rest])
            result += [(rest[p], mean) for p, mean in zip(places, means, strict=True)]
        return sorted(result, key=lambda pair: pair[0])
    raise AssertionError("no count fits")


def test_a_stage_recycles_by_the_rule_also_where_densities_tie() -> None:
    """Of two clusters, points that are each other's nearest are equally dense."""
    for seed in range(12):
        given = inputs(2, 60, 4, seed=10 * seed)
        indices, tokens = through(SparseVLM(keep=20), given, 20)
        for row in range(2):
            raters = slow_raters(given["features"][row], given["text"][row])
            scores = slow_scores(given["attention"][row], raters, None, 0, 0)
            expected = slow_stage(given["hidden"][row], scores, indices.shape[1], "v1.5")
            assert indices[row].tolist() == [index for index, _ in expected]
            means = torch.stack([token for _, token in expected]).float()
            torch.testing.assert_close(tokens[row], means, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["v1.5", "v2"])
def test_a_batch_equals_its_pictures(mode: str) -> None:
    method, given = SparseVLM(ratio=0.7, mode=mode), inputs(3, 63, 8, seed=5)
    given["mask"][1, :5] = False
    given["attention"] = given["attention"] * given["mask"][:, None, :, None]
    given["gravity"][1, :5] = math.nan  # padding must not be read
    together = through(method, given, 19)
    for row in range(3):
        pads = 5 if row == 1 else 0
        one = {key: value[row : row + 1] for key, value in given.items()}
        one |= {"text": one["text"][:, pads:], "mask": one["mask"][:, pads:]}
        one |= {"attention": one["attention"][:, :, pads:], "gravity": one["gravity"][:, pads:]}
        for a, b in zip(through(method, one, 19), together, strict=True):
            torch.testing.assert_close(a, b[row : row + 1])


def test_ties_in_scores_go_to_the_earlier_token_and_dtypes_stay() -> None:
    given = inputs(1, 60, 4, seed=0)
    given["attention"] = torch.full_like(given["attention"], 1 / 64)
    (indices,) = through(
        SparseVLM(keep=9, mode="v2"), {**given, "gravity": torch.ones(1, 4, 60)}, 9
    )
    assert indices[0].tolist() == list(range(indices.shape[1]))
    indices, tokens = through(SparseVLM(keep=9), {**given, "hidden": given["hidden"].bfloat16()}, 9)
    top = schedule("v1.5", 60, 9)[0].top
    assert indices[0, :top].tolist() == list(range(top)) and tokens.dtype == torch.bfloat16
    assert torch.equal(tokens[0, :top], given["hidden"].bfloat16()[0, :top])


@pytest.mark.parametrize("mode", ["v1.5", "v2"])
def test_the_device_is_never_waited_for(mode: str) -> None:
    """Fake tensors hold no values: reading one back fails."""
    given = inputs(2, 576, 6, seed=0)
    with FakeTensorMode() as mode_of_torch:
        fake = {key: mode_of_torch.from_tensor(value) for key, value in given.items()}
        kept = through(SparseVLM(keep=64, mode=mode), fake, 64)[0]
        assert kept.shape == (2, 82 if mode == "v1.5" else 66)
        with pytest.raises(DataDependentOutputException):
            kept.max().item()


def test_gravity_is_clamped_at_2880_tokens() -> None:
    """Closed form of all-ones queries and keys under rotation: it changes its sign at 1,707."""
    dim, distance = 128, torch.arange(2880.0, 0.0, -1).double()
    frequency = 1e4 ** -(torch.arange(0, dim, 2).double() / dim)
    gravity = 2 / math.sqrt(dim) * (distance[:, None] * frequency).cos().sum(-1)
    assert gravity.min() < 0 and gravity[-1707] < 0 < gravity[-1706]
    even = torch.full((1, 2, 1, 2880), 1 / 2880)
    scores = rate(even, torch.ones(1, 1, dtype=torch.bool), gravity.float()[None, None], 2, dim)[0]
    ceiling = 1 / 2880 / (0.1 * math.sqrt(dim))
    assert scores.min() > 0 and scores.max() <= ceiling * (1 + 1e-6)
    expected = 1 / 2880 / gravity.clamp(min=0.1 * math.sqrt(dim))
    torch.testing.assert_close(scores, expected.float())


def test_broken_pictures_stay_in_bounds_and_spoil_no_other() -> None:
    for mode, key in itertools.product(
        ("v1.5", "v2"), ("attention", "hidden", "features", "gravity")
    ):
        given = inputs(2, 50, 4, seed=1)
        method = SparseVLM(keep=9, mode=mode)
        good = through(method, given, 9)
        given[key] = given[key].clone()
        given[key][0] = math.nan
        found = through(method, given, 9)
        row = found[0][0].tolist()
        assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < 50
        assert all(torch.equal(a[1], b[1]) for a, b in zip(good, found, strict=True))


def test_a_budget_for_all_but_recycled_tokens_drops_none() -> None:
    method, memory, given = SparseVLM(keep=575), {}, inputs(1, 576, 4, seed=0)
    run(method, given, 575, 0, memory)
    assert run(method, given, 575, 1, memory) is None


# --- rank ----------------------------------------------------------------------------------------


def rank_inputs(ranks: Sequence[int], text: int = 9, tokens: int = 30) -> dict[str, Tensor]:
    given = inputs(len(ranks), tokens, text, seed=2)
    generator = torch.Generator().manual_seed(0)
    for row, rank in enumerate(ranks):
        left = torch.randint(1, 5, (text, rank), generator=generator)
        right = torch.randint(0, 4, (rank, tokens), generator=generator)
        given["attention"][row] = (left @ right).float() / 1024
    return given


def test_the_rank_of_the_raters_sets_the_count() -> None:
    method = SparseVLM(keep=29, mode="rank", scale=2.5, bias=1.5)
    counts = set()
    for rank in (1, 2, 3, 5, 8):
        given = rank_inputs([rank])
        raters = text_raters(given["features"][0], given["text"][0])
        block = (given["attention"][0, 0][raters] * 1024).long().tolist()
        exact = slow_rank([[Fraction(x) for x in line] for line in block])
        top = max(1, min(int(exact * 2.5 + 1.5), 29))
        left = top + int((int(0.3 * (30 - top)) + 1) / 10) + 1
        indices, tokens = through(method, given, 29)
        assert indices.shape == (1, left) and tokens.shape == (1, left, 6)
        counts.add(left)
    assert len(counts) >= 3


def test_pictures_of_different_rank_keep_the_larger_count() -> None:
    method = SparseVLM(keep=29, mode="rank", scale=2.0)
    small, large = (through(method, rank_inputs([r]), 29)[0].shape[1] for r in (1, 3))
    both = through(method, rank_inputs([1, 3]), 29)[0]
    assert small < large and both.shape == (2, large)


def test_in_rank_the_budget_caps_the_last_stage() -> None:
    for keep, scale in itertools.product((2, 5, 12, 29), (0.0, 1.0, 100.0)):
        method, memory, given = SparseVLM(keep=keep, mode="rank", scale=scale), {}, rank_inputs([3])
        run(method, given, keep, 0, memory)
        found = [run(method, given, keep, stage, memory) for stage in (1, 2, 3, 4)]
        left = [30 if one is None else one.indices.shape[1] for one in found]
        assert left[0] == left[1] == left[2] and left[3] == min(left[0], keep)
        assert method.survivors(30, keep, facts()) <= left[3]
