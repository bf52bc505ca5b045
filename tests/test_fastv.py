"""FastV against loops: the picks, the layer it cuts after, and what it refuses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vistoken.contract import ModelFacts, Place, Signal, Stage, View
from vistoken.cost import TransformerShape
from vistoken.errors import MethodError
from vistoken.language import LanguageRows
from vistoken.pictures import plain
from vistoken.pruning.fastv import FastV, select


class LastRow(LanguageRows):
    """Attention of the prompt's last token as given."""

    last_attention: Any = None

    def __init__(self, attention: Tensor) -> None:
        self.last_attention = attention


def facts(layers: int = 32, first: int = 0, axes: int = 1) -> ModelFacts:
    shape = TransformerShape(layers, 64, 4, 4, 16, 128, 3)
    return ModelFacts("none", (6, 6), 1, 24, 22, layers, shape, shape, 0, 0, False, axes, first)


def attention(images: int, heads: int, tokens: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(images, heads, tokens + 3, generator=draw), -1)[..., 3:]


def slow(rows: Tensor, keep: int) -> list[list[int]]:
    """Per picture: means over the heads, the largest, the earlier of equals, in reading order."""
    found = []
    for picture in rows.double().tolist():
        means = [math.fsum(column) / len(picture) for column in zip(*picture, strict=True)]
        found.append(sorted(sorted(range(len(means)), key=lambda i: (-means[i], i))[:keep]))
    return found


def run(method: FastV, rows: Tensor, keep: int) -> Tensor:
    images, tokens = rows.shape[0], rows.shape[-1]
    origin = torch.arange(tokens, device=rows.device).repeat(images, 1)
    (stage,) = method.stages(facts())
    signals = {Signal.LLM_ATTENTION: LastRow(rows)}
    view = View(stage, facts(), plain(1, tokens), origin, {}, signals.__getitem__)
    chosen = method.select(view, keep)
    assert chosen.tokens is None and chosen.sizes is None and chosen.hidden is None
    return chosen.indices


def test_picks_are_the_largest_head_means() -> None:
    for seed, (heads, tokens) in enumerate(itertools.product((1, 4, 7), (1, 2, 36, 63, 576))):
        rows = attention(2, heads, tokens, seed)
        for keep in sorted({1, tokens // 3, tokens} - {0}):
            picks = run(FastV(keep=keep), rows, keep)
            assert picks.dtype == torch.int64 and picks.tolist() == slow(rows, keep)
            assert torch.equal(picks[1:], run(FastV(keep=keep), rows[1:], keep))


def test_heads_are_averaged_and_not_the_maximum_taken() -> None:
    rows = torch.zeros(1, 4, 3)
    rows[0, 0, 2], rows[0, :, 1] = 0.9, 0.3  # one head sees token 2, all of them token 1
    assert run(FastV(keep=1), rows, 1).tolist() == [[1]]


def test_ties_go_to_the_earlier_token() -> None:
    levels = torch.randint(1, 4, (5, 1, 63), generator=torch.Generator().manual_seed(0)) / 64
    for keep in (1, 20, 62):
        assert select(levels.expand(5, 4, 63), keep).tolist() == slow(levels, keep)


def test_half_precision_attention_is_averaged_in_fp32() -> None:
    """1 and 256 heads of 1/256 differ by less than the sum in bf16 can hold."""
    rows = torch.full((1, 256, 2), 1.0)
    rows[0, 0, 1] += 0.5
    assert select(rows.bfloat16(), 1).tolist() == [[1]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_picture_stays_in_bounds_and_spoils_no_other(bad: float) -> None:
    rows = attention(2, 4, 36)
    good = select(rows, 9)
    rows[0, 1] = bad
    picks = select(rows, 9)
    assert torch.equal(picks[1], good[1]) and len(set(picks[0].tolist())) == 9
    assert picks.min() >= 0 and picks.max() < 36


def test_the_device_is_never_waited_for() -> None:
    """Meta tensors hold no values: reading one back fails."""
    assert run(FastV(keep=64), attention(2, 4, 576).to("meta"), 64).shape == (2, 64)


@pytest.mark.parametrize(("ratio", "left"), [(0.5, 288), (0.75, 144), (2 / 3, 192), (0.999, 1)])
def test_the_budget_counts_the_tokens_after_the_cut(ratio: float, left: int) -> None:
    method = FastV(ratio=ratio)
    assert method.budget(576) == method.survivors(576, left, facts()) == left


@pytest.mark.parametrize("layer", [1, 2, 3, 31])
def test_it_cuts_after_the_layer_before_k(layer: int) -> None:
    expected = Stage(Place.LLM_LAYER, layer - 1, frozenset({Signal.LLM_ATTENTION}))
    assert FastV(keep=9, layer=layer).stages(facts()) == (expected,)


def test_positions_are_kept() -> None:
    assert FastV(keep=9).keeps_positions(facts()) and FastV(keep=9).keeps_positions(facts(axes=3))
    assert not FastV(keep=9, positions="renumber").keeps_positions(facts())


@pytest.mark.parametrize(
    ("layer", "model", "says"),
    [
        (32, facts(), "from 1 to 31"),
        (2, facts(2), "from 1 to 1 .*layer=1"),
        (2, facts(28, first=2), "from 3 to 27 .*layer=3"),
        (2, facts(1), "prunes before the LLM"),
        (2, facts(4, first=3), "prunes before the LLM"),
    ],
)
def test_layers_that_cannot_work_are_refused(layer: int, model: ModelFacts, says: str) -> None:
    with pytest.raises(MethodError, match=says):
        FastV(keep=9, layer=layer).stages(model)


@pytest.mark.parametrize("options", [{"layer": 0}, {"layer": -1}, {"layer": 1.5}], ids=str)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match="fastv: layer must be at least 1"):
        FastV(keep=9, **options)
