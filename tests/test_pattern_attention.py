"""Attention through patterns: on grids, along block lists and by regions, against a dense mask."""

from __future__ import annotations

import importlib.util
import math
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from pattern_cases import draw_band, draw_disc, draw_regions, draw_tiles, draw_window
from vistoken.errors import MethodError
from vistoken.kernels import list_reference, na2d, na3d
from vistoken.kernels.block_sparse import block_sparse_attention
from vistoken.kernels.patterns import (
    BandPattern,
    DiscPattern,
    Pattern,
    RegionPattern,
    SlidingTilePattern,
    WindowPattern,
    pattern_attention,
)


def dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention under a bool mask [tokens, tokens] or [b, h, tokens, tokens], and its lse."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    blind = ~visible.any(-1)
    logits = logits.masked_fill(~visible & ~blind[..., None], -math.inf)
    weights = logits.softmax(-1).masked_fill(blind[..., None], 0)
    lse = logits.logsumexp(-1).masked_fill(blind, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse.transpose(1, 2)


@pytest.mark.parametrize("draw", [draw_window, draw_disc, draw_band, draw_regions, draw_tiles])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_attention_equals_dense_attention_under_the_mask(draw: Any, backend: str | None) -> None:
    for seed in range(8):
        dice = Random(seed)
        pattern: Pattern = draw(dice)
        kv_heads = dice.choice((1, 2))
        inputs = [
            torch.randn(2, pattern.tokens, heads, width, dtype=torch.float64, requires_grad=True)
            for heads, width in ((2, 4), (kv_heads, 4), (kv_heads, 6))
        ]
        found = pattern_attention(*inputs, pattern, scale=0.6, return_lse=True, backend=backend)
        expected = dense(*inputs, pattern.visible(), 0.6)
        grads = []
        for out, lse in (found, expected):
            loss = out.square().sum() + lse.masked_fill(lse == -math.inf, 0).sin().sum()
            grads.append(torch.autograd.grad(loss, inputs))
        for a, b in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
            assert torch.allclose(a, b, 0, 1e-10)


def test_block_lists_give_what_the_grid_gives() -> None:
    """The lists of grid patterns are another way to the same numbers."""
    dice = Random(5)
    for draw in (draw_window, draw_disc, draw_tiles):
        pattern = draw(dice)
        q, k, v = torch.randn(3, 1, pattern.tokens, 2, 8, dtype=torch.float64)
        listed = block_sparse_attention(q, k, v, pattern.block_mask(16))
        assert torch.allclose(pattern_attention(q, k, v, pattern), listed, 0, 1e-12)


def test_patterns_without_globals_are_neighborhoods() -> None:
    q, k, v = torch.randn(3, 2, 60, 2, 8)
    grid = (x.view(2, 3, 4, 5, 2, 8) for x in (q, k, v))
    window = WindowPattern((3, 4, 5), (2, 3, 4), (1, 2, 1), 1, (True, False, False))
    expected = na3d(*grid, (2, 3, 4), (1, 2, 1), 1, (True, False, False)).flatten(1, 3)
    assert torch.equal(pattern_attention(q, k, v, window), expected)
    grid = (x.view(2, 6, 10, 2, 8) for x in (q, k, v))
    tiles = SlidingTilePattern((6, 10), (2, 5), (3, 1))
    expected = na2d(*grid, (6, 5), (2, 5)).flatten(1, 2)
    assert torch.equal(pattern_attention(q, k, v, tiles), expected)


def test_a_wide_pattern_is_dense() -> None:
    q, k, v = torch.randn(3, 1, 66, 2, 8, dtype=torch.float64)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)
    for pattern in (
        DiscPattern((6, 10), 12, 2, 4),
        WindowPattern((6, 10), (6, 10), 3, prefix=6),
        BandPattern(3, 20, [[19] * 3] * 3, 5, 1),
    ):
        assert torch.allclose(pattern_attention(q, k, v, pattern), plain, 0, 1e-12)


def test_the_lists_of_a_band_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = BandPattern(2, 20, [[19, 3], [3, 19]], suffix=4)
    other = BandPattern(2, 20, [[19, 3], [3, 19]], suffix=4)
    assert pattern == other and hash(pattern) == hash(other)
    q, k, v = torch.randn(3, 1, 44, 1, 8)
    out = pattern_attention(q, k, v, pattern)
    monkeypatch.setattr(BandPattern, "block_mask", None)
    assert torch.equal(pattern_attention(q, k, v, pattern), out)


def test_compiles_as_one_graph() -> None:
    """A band after its lists were made; routes of regions may be new at each call."""
    band = BandPattern(2, 20, [[19, 3], [3, 19]], suffix=4)
    band.kept_block_mask(torch.device("cpu"))

    def attention(q: Tensor, k: Tensor, v: Tensor, scores: Tensor) -> Tensor:
        regions = RegionPattern((5, 8), (2, 2), scores.argsort(-1)[..., :2], 1, 3)
        out = pattern_attention(q, k, v, band, backend="reference")
        return out + pattern_attention(q, k, v, regions, backend="reference")

    q, k, v = torch.randn(3, 1, 44, 2, 8)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        scores = torch.rand(1, 2, 4, 4)
        assert torch.allclose(compiled(q, k, v, scores), attention(q, k, v, scores), 0, 1e-6)


def test_wrong_tokens_are_named() -> None:
    q, k, v = torch.randn(3, 1, 44, 1, 8)
    with pytest.raises(MethodError, match="pattern is of 45 tokens, got 44 queries and 44 keys"):
        pattern_attention(q, k, v, WindowPattern((5, 8), 3, suffix=5))


def test_blind_queries_of_a_band() -> None:
    pattern = BandPattern(2, 20, [[-1, -1], [3, -1]])
    q, k, v = torch.randn(3, 1, 40, 1, 8)
    out, lse = pattern_attention(q, k, v, pattern, return_lse=True)
    assert (
        not out[:, :20].any() and (lse[:, :20] == -math.inf).all() and lse[:, 20:].isfinite().all()
    )
    expected, _ = list_reference.forward(q, k, v, pattern.block_mask(16), 8**-0.5)
    assert torch.allclose(out, expected, 0, 1e-6)


# --- text at one end of the sequence, without gradients: one operator writes both parts -----------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
ONE_END = (
    DiscPattern((5, 6), radius=3, prefix=5),
    DiscPattern((5, 6), radius=3, suffix=4),
    WindowPattern((3, 4, 5), 3, stride=(1, 2, 1), is_causal=(True, False, False), prefix=2),
)


@needs_triton
@pytest.mark.parametrize("pattern", ONE_END, ids=lambda pattern: f"{type(pattern).__name__}")
@torch.no_grad()
def test_text_and_grid_are_written_side_by_side(pattern: DiscPattern | WindowPattern) -> None:
    q, k, v = (torch.randn(2, pattern.tokens, 2, 16, device=DEVICE) for _ in range(3))
    call = partial(pattern_attention, pattern=pattern, return_lse=True)
    for found, expected in zip(
        call(q, k, v, backend="triton"), call(q, k, v, backend="reference"), strict=True
    ):
        assert found.is_contiguous()
        assert (found - expected).norm() <= 2e-6 * expected.norm()


@needs_triton
@torch.no_grad()
def test_the_operator_that_writes_them_side_by_side() -> None:
    from vistoken.kernels import sequence_operator
    from vistoken.kernels.windows import flatten_window

    pattern = ONE_END[0]
    q, k, v = (torch.randn(2, pattern.tokens, 2, 16, device=DEVICE) for _ in range(3))
    window = flatten_window(pattern.where)
    torch.library.opcheck(
        sequence_operator._attend, (q, k, v, window, 0.25, pattern.prefix, pattern.tokens)
    )
    compiled = torch.compile(
        lambda *x: pattern_attention(*x, pattern, backend="triton"),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    expected = pattern_attention(q, k, v, pattern, backend="reference")
    assert (compiled(q, k, v) - expected).norm() <= 2e-6 * expected.norm()
