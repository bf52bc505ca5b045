"""AdaptInfer: prior, scores and schedule against loops, and its stages called as a host does."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from vistoken.contract import ModelFacts, Place, Signal, View
from vistoken.cost import TransformerShape
from vistoken.errors import MethodError
from vistoken.language import LanguageRows
from vistoken.pictures import plain
from vistoken.pruning import top_indices
from vistoken.pruning.adaptinfer import (
    PRIORS,
    SCHEDULES,
    AdaptInfer,
    stage_counts,
    text_prior,
    visual_scores,
)


class Rows(LanguageRows):
    """Attention that was made up: [I, H, T, N] and [I, H, T, T]."""

    text_attention: Any = None
    text_to_text: Any = None

    def __init__(self, visual: Tensor, text: Tensor, mask: Tensor) -> None:
        self.text_attention, self.text_to_text, self.text_mask = visual, text, mask


def language(
    images: int = 2, text: int = 6, tokens: int = 30, padded: int = 2, seed: int = 0
) -> Rows:
    """Causal attention of text behind a picture; all but the first row are `padded` on the left."""
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, 3, text, tokens + text, generator=draw)
    later = torch.ones(text, text).triu(1).bool()
    mask = torch.ones(images, text, dtype=torch.bool)
    mask[1:, :padded] = False
    hidden = later | ~mask[:, None, None]
    logits[..., tokens:].masked_fill_(hidden, -torch.inf)
    attention = logits.softmax(-1) * mask[:, None, :, None]
    return Rows(attention[..., :tokens], attention[..., tokens:], mask)


def slow_prior(rows: Rows, picture: int, prior: str) -> list[float]:
    heads, text = rows.text_to_text.shape[1:3]
    weights = [0.0] * text
    for head, i, j in itertools.product(range(heads), range(text), range(text)):
        if rows.text_mask[picture, i] and rows.text_mask[picture, j]:
            value = rows.text_to_text[picture, head, i, j].item() / heads
            weights[j if prior == "received" else i] += value
    return [weight / sum(weights) for weight in weights]


def slow_scores(rows: Rows, picture: int, prior: list[float]) -> list[float]:
    heads, text, tokens = rows.text_attention.shape[1:]
    return [
        sum(
            prior[i] * rows.text_attention[picture, head, i, j].item() / heads
            for head, i in itertools.product(range(heads), range(text))
        )
        for j in range(tokens)
    ]


# --- the mathematics -----------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(("text", "padded"), [(6, 2), (1, 0), (9, 8)])
def test_prior_and_scores_equal_the_loops(prior: str, text: int, padded: int) -> None:
    rows = language(text=text, padded=padded)
    weights = text_prior(rows.text_to_text, rows.text_mask, prior=prior)
    scores = visual_scores(rows.text_attention, weights)
    assert weights.dtype == scores.dtype == torch.float32
    for picture in range(2):
        expected = slow_prior(rows, picture, prior)
        assert weights[picture].tolist() == pytest.approx(expected, abs=1e-6)
        assert sum(expected) == pytest.approx(1)
        wanted = slow_scores(rows, picture, expected)
        assert scores[picture].tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_two_priors_differ() -> None:
    rows = language()
    received, given = (text_prior(rows.text_to_text, rows.text_mask, prior=p) for p in PRIORS)
    assert (received - given).abs().max() > 0.05


@pytest.mark.parametrize("prior", PRIORS)
def test_uniform_text_makes_the_plain_mean(prior: str) -> None:
    rows = language()
    even = torch.full((2, 3, 6, 6), 0.01)  # everything attends to everything alike
    weights = text_prior(even, rows.text_mask, prior=prior)
    for picture, own in enumerate(rows.text_mask):
        plain_mean = rows.text_attention[picture][:, own].mean((0, 1))
        score = visual_scores(rows.text_attention, weights)[picture]
        assert torch.allclose(score, plain_mean, atol=1e-7)
    silent = text_prior(torch.zeros(2, 3, 6, 6), rows.text_mask, prior=prior)
    assert torch.allclose(silent, weights)


def test_padding_takes_no_part() -> None:
    """A prior of a padded text, also with rubbish at the padding, is that of the text alone."""
    rows = language(images=2, padded=2)
    rubbish = rows.text_to_text.clone()
    rubbish[1, :, :2] = 7.0
    rubbish[1, :, :, :2] = 7.0
    for prior in PRIORS:
        weights = text_prior(rubbish, rows.text_mask, prior=prior)
        alone = text_prior(rows.text_to_text[1:, :, 2:, 2:], rows.text_mask[1:, 2:], prior=prior)
        assert weights[1, :2].tolist() == [0, 0]
        assert torch.allclose(weights[1:, 2:], alone)


def test_scores_are_fp32_under_autocast() -> None:
    rows = language()
    weights = text_prior(rows.text_to_text, rows.text_mask)
    expected = visual_scores(rows.text_attention, weights)
    with torch.autocast("cpu", torch.bfloat16):
        again = text_prior(rows.text_to_text, rows.text_mask)
        assert torch.equal(visual_scores(rows.text_attention, again), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_counts_fall_to_the_budget(schedule: str) -> None:
    choose = random.Random(0)
    for _ in range(1000):
        tokens, stages = choose.randint(1, 3000), choose.randint(1, 5)
        keep = choose.randint(1, tokens)
        counts = (tokens, *stage_counts(tokens, keep, stages, schedule=schedule))
        assert sorted(counts, reverse=True) == list(counts)
        assert counts[-1] == keep and len(counts) == stages + 1
        for before, here, after in zip(counts, counts[1:], counts[2:], strict=False):
            if schedule == "linear":
                assert abs((before - here) - (here - after)) <= 2
            else:  # equal factors, up to rounding by a half
                assert (here - 0.5) ** 2 <= (before + 0.5) * (after + 0.5)
                assert (here + 0.5) ** 2 >= (before - 0.5) * (after - 0.5)
    assert stage_counts(576, 72, 3) == (288, 144, 72)
    assert stage_counts(576, 72, 3, schedule="linear") == (408, 240, 72)


# --- the method, called as a host calls it -------------------------------------------------------


def facts(layers: int = 32, first: int = 0) -> ModelFacts:
    shape = TransformerShape(2, 8, 2, 2, 4, 16, 2)
    return ModelFacts(
        "none", (5, 6), 1, 2, 1, layers, shape, shape, 0, 0, first_text_stage=first
    )  # fmt: skip


def run(method: AdaptInfer, keep: int, images: int = 2, left: int = 30) -> list[Tensor]:
    """Tokens of the picture [I, n] that are left after every stage."""
    known, memory = facts(), {}
    origin = torch.arange(30 - left, 30).expand(images, -1)
    kept = []
    for number, stage in enumerate(method.stages(known)):
        rows = language(images=images, seed=number)
        rows.text_attention = rows.text_attention.transpose(1, 3)[
            torch.arange(images)[:, None], origin
        ].transpose(1, 3)
        view = View(stage, known, plain(5, 6), origin, memory, {Signal.LLM_ATTENTION: rows}.get)
        chosen = method.select(view, keep)
        if chosen is not None:
            assert torch.equal(chosen.indices, chosen.indices.sort().values)
            weights = text_prior(rows.text_to_text, rows.text_mask, prior=method.prior)
            scores = visual_scores(rows.text_attention, weights)
            best = scores.argsort(descending=True, stable=True)[:, : chosen.indices.shape[1]]
            assert torch.equal(chosen.indices, best.sort().values)
            origin = origin.gather(1, chosen.indices)
        kept.append(origin)
    return kept


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_keep_the_best_and_compose(prior: str, schedule: str) -> None:
    for keep in (1, 4, 15, 29):
        method = AdaptInfer(keep=keep, prior=prior, schedule=schedule)
        kept = run(method, keep)
        counts = stage_counts(30, keep, 3, schedule=schedule)
        assert tuple(row.shape[1] for row in kept) == counts
        assert counts[-1] == method.survivors(30, keep, facts()) == keep
        for before, after in itertools.pairwise(kept):  # indices of the picture, ever fewer
            for old, new in zip(before.tolist(), after.tolist(), strict=True):
                assert set(new) <= set(old) and sorted(set(new)) == new


def test_a_batch_equals_its_pictures() -> None:
    rows = language(images=3)
    for prior in PRIORS:
        together = text_prior(rows.text_to_text, rows.text_mask, prior=prior)
        for i in range(3):
            part = slice(i, i + 1)
            own = text_prior(rows.text_to_text[part], rows.text_mask[part], prior=prior)
            assert torch.allclose(own, together[part], atol=1e-7)
            scores = visual_scores(rows.text_attention, together)[part]
            assert torch.allclose(visual_scores(rows.text_attention[part], own), scores, atol=1e-7)


def test_after_an_earlier_method_the_schedule_starts_from_what_is_left() -> None:
    assert [row.shape[1] for row in run(AdaptInfer(keep=3), 3, left=24)] == [12, 6, 3]
    assert [row.shape[1] for row in run(AdaptInfer(keep=28), 28, left=24)] == [24, 24, 24]


def test_layers_are_those_found_for_llava_and_scale() -> None:
    def layers(depth: int, first: int = 0, **options: Any) -> list[int | None]:
        stages = AdaptInfer(keep=5, **options).stages(facts(depth, first))
        assert {stage.place for stage in stages} == {Place.LLM_LAYER}
        assert {stage.signals for stage in stages} == {frozenset({Signal.LLM_ATTENTION})}
        return [stage.layer for stage in stages]

    assert layers(32) == [1, 10, 20] and layers(28) == [1, 9, 18] and layers(64) == [2, 20, 40]
    assert layers(8) == [0, 3, 5] and layers(3) == [0, 1] and layers(2) == [0]
    assert layers(28, first=2) == [2, 9, 18] and layers(28, first=10) == [10, 18]
    assert layers(32, layers="0, 30") == [0, 30] and layers(32, layers="7") == [7]


@pytest.mark.parametrize(
    "bad", ["", "a", "1,", "2,1", "1,1", "1.5", "-1,2", "AUTO", 3, None], ids=str
)
def test_layers_must_be_rising_numbers(bad: Any) -> None:
    with pytest.raises(MethodError, match="adaptinfer: layers must be"):
        AdaptInfer(keep=5, layers=bad)


@pytest.mark.parametrize(
    ("layers", "depth", "first", "words"),
    [
        ("1,31", 32, 0, "layers must be from 0 to 30 in this model of 32"),
        ("1,10", 32, 2, "layers must be from 2 to 30"),
        ("auto", 1, 0, "has 1 LLM layers"),
        ("auto", 4, 3, "needs an LLM layer from 3 on"),
    ],
)
def test_layers_outside_the_model_are_refused(
    layers: str, depth: int, first: int, words: str
) -> None:
    with pytest.raises(MethodError, match=words):
        AdaptInfer(keep=5, layers=layers).stages(facts(depth, first))


@pytest.mark.parametrize(
    "call",
    [
        lambda rows: text_prior(rows.text_to_text, rows.text_mask, prior="softmax"),
        lambda rows: text_prior(rows.text_to_text, rows.text_mask[:, 1:]),
        lambda rows: text_prior(rows.text_attention, rows.text_mask),
        lambda rows: visual_scores(rows.text_attention, torch.zeros(2, 5)),
        lambda rows: stage_counts(30, 31, 3),
        lambda rows: stage_counts(30, 0, 3),
        lambda rows: stage_counts(30, 3, 0),
        lambda rows: stage_counts(30, 3, 1, schedule="cosine"),
    ],
)
def test_functions_refuse_what_does_not_fit(call: Any) -> None:
    with pytest.raises(MethodError, match="adaptinfer: "):
        call(language())


def test_broken_attention_stays_in_its_picture_and_in_bounds() -> None:
    rows = language()
    weights = text_prior(rows.text_to_text, rows.text_mask)
    good = visual_scores(rows.text_attention, weights)
    for value in (math.nan, math.inf):
        broken = rows.text_attention.clone()
        broken[0, :, :, ::3] = value
        scores = visual_scores(broken, weights)
        assert torch.equal(scores[1], good[1])
        picks = top_indices(scores, 25)[0].tolist()
        assert picks == sorted(set(picks)) and set(picks) <= set(range(30))
