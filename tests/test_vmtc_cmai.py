"""CMAI against loops: focus of text on the picture, and the pairs it hides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vistoken.contract import ModelFacts, Place, Selection, Signal, Stage, View
from vistoken.cost import TransformerShape
from vistoken.errors import MethodError
from vistoken.language import LanguageRows
from vistoken.pictures import plain
from vistoken.pruning.vmtc import HEADS, RULES, VMTC, focus, hidden_pairs


def facts(text_layers: int = 8, **more: Any) -> ModelFacts:
    shape = TransformerShape(2, 8, 2, 2, 4, 16, 2)
    return ModelFacts("none", (5, 8), 1, 4, 2, text_layers, shape, shape, 0, 0, **more)


# --- CMAI ----------------------------------------------------------------------------------------


class Rows(LanguageRows):
    """Attention rows of a prompt whose text is padded on the left."""

    def __init__(self, text: int, count: int, padding: list[int], heads: int = 3) -> None:
        rows = len(padding)
        self.text_mask = torch.arange(text) >= torch.tensor(padding)[:, None]
        logits = torch.randn(rows, heads, text, count + text)
        future = torch.ones(text, text, dtype=torch.bool).triu(1)
        logits[..., count:].masked_fill_(future | ~self.text_mask[:, None, None, :], -torch.inf)
        weights = logits.softmax(-1) * self.text_mask[:, None, :, None]
        self._image, self._text = weights[..., :count], weights[..., count:]

    @property
    def text_attention(self) -> Tensor:
        return self._image

    @property
    def text_to_text(self) -> Tensor:
        return self._text


def slow_focus(rows: Rows, row: int, heads: str, normalize: bool) -> list[list[float]]:
    image, text = rows.text_attention[row].double(), rows.text_to_text[row].double()

    def scaled(block: list[list[float]]) -> list[list[float]]:
        return [[x / sum(r) if normalize and sum(r) else x for x in r] for r in block]

    def product(tt: list[list[float]], ti: list[list[float]]) -> Tensor:
        count = len(ti[0])
        return torch.tensor(
            [[sum(r[s] * ti[s][j] for s in range(len(ti))) for j in range(count)] for r in tt],
            dtype=torch.float64,
        )

    if heads == "mean":
        return product(scaled(text.mean(0).tolist()), scaled(image.mean(0).tolist())).tolist()
    each = [
        product(scaled(t), scaled(i)) for t, i in zip(text.tolist(), image.tolist(), strict=True)
    ]
    return torch.stack(each).mean(0).tolist()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("normalize", [True, False])
def test_focus_equals_loops(heads: str, normalize: bool) -> None:
    rows = Rows(6, 9, [0, 4, 5])
    score = focus(rows.text_attention, rows.text_to_text, heads=heads, normalize=normalize)
    assert score.shape == (3, 6, 9) and score.dtype == torch.float32
    for row in range(3):
        expected = torch.tensor(slow_focus(rows, row, heads, normalize))
        torch.testing.assert_close(score[row].double(), expected.double(), rtol=1e-5, atol=1e-8)
    assert (score[~rows.text_mask] == 0).all()
    if normalize:
        torch.testing.assert_close(score.sum(-1), rows.text_mask.float())


def test_focus_of_one_text_token_is_its_attention() -> None:
    rows = Rows(1, 7, [0, 0])
    image = rows.text_attention.mean(1)
    score = focus(rows.text_attention, rows.text_to_text)
    torch.testing.assert_close(score, image / image.sum(-1, keepdim=True))


@pytest.mark.parametrize("count", [1, 2, 9, 40])
def test_hidden_pairs_follow_their_rules(count: int) -> None:
    score = torch.rand(2, 5, count)
    score[0, 0] = 0.25  # all equal: nothing is below
    for share in (0.0, 0.1, 0.25, 0.5, 0.99):
        pairs = hidden_pairs(score, share)
        assert not pairs[0, 0].any()
        for row in score[1]:
            ranked = sorted(row.tolist())
            limit = ranked[math.floor(share * count)]
            assert hidden_pairs(row[None, None], share)[0, 0].tolist() == [
                x < limit for x in row.tolist()
            ]
        assert (pairs[1].sum(-1) == math.floor(share * count)).all() and not pairs.all(-1).any()
    assert torch.equal(hidden_pairs(score, 0.3, rule="absolute"), score < 0.3)
    mean = score.sum(-1, keepdim=True) / count
    assert torch.equal(hidden_pairs(score, 0.5, rule="relative"), score < mean / 2)


@pytest.mark.parametrize(
    ("rule", "threshold"),
    [("absolute", -1e30), ("relative", -1e30), ("absolute", 0), ("quantile", 0)],
)
def test_the_lowest_threshold_hides_nothing(rule: str, threshold: float) -> None:
    rows = Rows(6, 9, [0, 4])
    chosen = hide(VMTC(keep=9, cmai=True, rule=rule, threshold=threshold), rows)
    assert chosen.hidden.dtype == torch.bool and not chosen.hidden.any()


def hide(method: VMTC, rows: Rows, layer: int = 2) -> Selection:
    stage = method.stages(facts())[1]
    assert stage == Stage(Place.LLM_LAYER, layer, frozenset({Signal.LLM_ATTENTION}))
    images, count = rows.text_attention.shape[0], rows.text_attention.shape[-1]
    origin = torch.arange(count).expand(images, count)
    view = View(stage, facts(), plain(5, 8), origin, {}, {Signal.LLM_ATTENTION: rows}.__getitem__)
    return method.select(view, count)


@pytest.mark.parametrize("rule", RULES)
def test_pairs_of_low_focus_are_hidden_and_padding_is_not(rule: str) -> None:
    rows = Rows(6, 20, [0, 4, 5])
    threshold = {"quantile": 0.5, "relative": 0.9, "absolute": 0.045}[rule]
    chosen = hide(VMTC(keep=20, cmai=True, rule=rule, threshold=threshold), rows)
    assert torch.equal(chosen.indices, torch.arange(20).expand(3, 20)) and chosen.tokens is None
    score = focus(rows.text_attention, rows.text_to_text)
    expected = hidden_pairs(score, threshold, rule=rule)
    assert torch.equal(chosen.hidden[rows.text_mask], expected[rows.text_mask])
    assert chosen.hidden[rows.text_mask].any() and not chosen.hidden[~rows.text_mask].any()


def test_masked_pairs_get_no_weight_and_every_row_sees_something() -> None:
    """Hide as a later layer would, even everything: the text token itself is always left."""
    rows = Rows(6, 9, [0, 4])
    chosen = hide(VMTC(keep=9, cmai=True, rule="absolute", threshold=2.0), rows)
    assert chosen.hidden[rows.text_mask].all()
    logits = torch.randn(2, 6, 9 + 6)
    future = torch.ones(6, 6, dtype=torch.bool).triu(1) | ~rows.text_mask[:, None]
    logits[..., 9:].masked_fill_(future, -torch.inf)
    logits[..., :9].masked_fill_(chosen.hidden, -torch.inf)
    weights = logits.softmax(-1)
    assert (weights[..., :9][chosen.hidden] == 0).all()
    assert torch.isfinite(weights[rows.text_mask]).all()


def test_bad_arguments_of_the_functions_are_refused() -> None:
    rows = Rows(2, 3, [0])
    with pytest.raises(MethodError, match="heads"):
        focus(rows.text_attention, rows.text_to_text, heads="max")
    with pytest.raises(MethodError, match="rule"):
        hidden_pairs(torch.rand(1, 2, 3), 0.5, rule="max")
    with pytest.raises(MethodError, match="threshold"):
        hidden_pairs(torch.rand(1, 2, 3), 1.0)


def test_no_value_is_read_back() -> None:
    """Fake tensors have no values: anything that needs one raises."""
    with FakeTensorMode():
        rows = Rows.__new__(Rows)
        rows.text_mask = torch.ones(2, 4, dtype=torch.bool)
        rows._image, rows._text = torch.rand(2, 3, 4, 9), torch.rand(2, 3, 4, 4)
        assert hide(VMTC(keep=9, cmai=True), rows).hidden.shape == (2, 4, 9)
