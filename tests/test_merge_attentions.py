"""merge_attentions: the attention over all keys, with its gradients, whatever a part saw."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vistoken.errors import MethodError
from vistoken.kernels import merge_attentions, na1d


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q [B, M, H, D] over k, v [B, N, H, D]; without keys it is 0 and -inf."""
    logits = torch.einsum("bmhd,bnhd->bmhn", q, k)
    if not k.shape[1]:
        return torch.zeros_like(q), logits.new_full(q.shape[:-1], -math.inf)
    return torch.einsum("bmhn,bnhd->bmhd", logits.softmax(-1), v), logits.logsumexp(-1)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("sizes", [[9], [4, 5], [1, 0, 8], [0, 3, 0, 5, 1]])
def test_parts_together_are_the_whole(sizes: list[int]) -> None:
    q, k, v = draw(2, 3, 2, 4), draw(2, 9, 2, 4), draw(2, 9, 2, 4)
    parts = [attend(q, *pair) for pair in zip(k.split(sizes, 1), v.split(sizes, 1), strict=True)]
    merged = merge_attentions(*zip(*parts, strict=True))
    whole = attend(q, k, v)
    weights = [torch.randn_like(x) for x in whole]
    grads = []
    for found in (merged, whole):
        loss = sum((x * w).sum() for x, w in zip(found, weights, strict=True))
        grads.append(torch.autograd.grad(loss, (q, k, v)))
    for a, b in zip((*merged, *grads[0]), (*whole, *grads[1]), strict=True):
        assert (a - b).abs().max() < 1e-13


def test_gradcheck() -> None:
    outputs, lses = [draw(2, 3, 4) for _ in range(3)], [draw(2, 3) for _ in range(3)]

    def call(*given: Tensor) -> Any:
        return merge_attentions(given[:3], given[3:])

    assert torch.autograd.gradcheck(call, (*outputs, *lses))
    assert torch.autograd.gradgradcheck(call, (*outputs, *lses), fast_mode=True)


def test_neighborhood_and_text() -> None:
    """A window and text keys in two calls are the same as in one, gradients too."""
    q, k, v = (draw(2, 7, 2, 4) for _ in range(3))
    text_k, text_v = draw(2, 3, 2, 4), draw(2, 3, 2, 4)
    inputs = (q, k, v, text_k, text_v)
    once = na1d(
        q, k, v, 3, scale=1.0, additional_keys=text_k, additional_values=text_v, return_lse=True
    )
    parts = (na1d(q, k, v, 3, scale=1.0, return_lse=True), attend(q, text_k, text_v))
    twice = merge_attentions(*zip(*parts, strict=True))
    grads = [torch.autograd.grad(out.sin().sum() + lse.sum(), inputs) for out, lse in (once, twice)]
    for a, b in zip((*once, *grads[0]), (*twice, *grads[1]), strict=True):
        assert (a - b).abs().max() < 1e-13


def test_what_saw_nothing_is_not_read() -> None:
    some, none = draw(2, 3, 4), torch.full((2, 3, 4), math.nan, dtype=torch.float64)
    none.requires_grad_()
    lse = draw(2, 3)
    empty = torch.full((2, 3), -math.inf, dtype=torch.float64).requires_grad_()
    out, merged = merge_attentions([none, some], [empty, lse])
    assert torch.equal(out, some) and torch.equal(merged, lse)
    grads = torch.autograd.grad(out.sum() + merged.sum(), (some, none, lse, empty))
    assert [float(g.sum()) for g in grads] == [24, 0, 6, 0]
    out, merged = merge_attentions([none, none], [empty, empty])
    assert (out == 0).all() and (merged == -math.inf).all()
    grads = torch.autograd.grad(out.sum() + merged.sum(), (none, empty))
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_any_size_of_logits(shift: float) -> None:
    lses = [torch.tensor([0.0, 200.0]) + shift, torch.tensor([math.log(3), 0.0]) + shift]
    out, lse = merge_attentions([torch.zeros(2, 1), torch.ones(2, 1)], lses)
    assert (out[:, 0] - torch.tensor([0.75, 0.0])).abs().max() < 2e-3 * (shift != 0) + 1e-6
    assert (lse - shift - torch.tensor([math.log(4), 200])).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    outputs = [torch.randn(2, 5, 4).to(dtype) for _ in range(3)]
    lses = [torch.randn(2, 5) for _ in range(3)]
    out, lse = merge_attentions(outputs, lses)
    wide = torch.promote_types(dtype, torch.float32)
    assert out.dtype == dtype and lse.dtype == wide
    exact, _ = merge_attentions([x.double() for x in outputs], lses)
    assert (out.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps


def test_empty_batches_and_compile() -> None:
    out, lse = merge_attentions([torch.zeros(0, 3, 4)] * 2, [torch.zeros(0, 3)] * 2)
    assert out.shape == (0, 3, 4) and lse.shape == (0, 3)
    given = ([torch.randn(2, 3, 4) for _ in range(2)], [torch.randn(2, 3) for _ in range(2)])
    compiled = torch.compile(merge_attentions, backend="eager", fullgraph=True)
    for a, b in zip(compiled(*given), merge_attentions(*given), strict=True):
        assert torch.equal(a, b)


A, L = torch.zeros(2, 3, 4), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("outputs", "lses", "words"),
    [
        ([], [], "at least one, got 0 outputs and 0 lses"),
        ([A, A], [L], "got 2 outputs and 1 lses"),
        (A, [L], "outputs must be a list of tensors, got Tensor"),
        ([A], L, "lses must be a list of tensors, got Tensor"),
        ([A, None], [L, L], "outputs must be a list of tensors"),
        ([A, A.half()], [L, L], r"outputs\[1\] must be like outputs\[0\], .* torch.float16"),
        ([A, A[:1]], [L, L], r"outputs\[1\] must be like .* got \(1, 3, 4\)"),
        ([A], [L[:1]], r"lses\[0\] must have the shape \(2, 3\) .* got \(1, 3\)"),
        ([A], [A], r"lses\[0\] must have the shape \(2, 3\) .* got \(2, 3, 4\)"),
        ([A], [L.long()], r"lses\[0\] must have a floating dtype, got torch.int64"),
        ([A.long()], [L], r"outputs\[0\] must have a floating dtype"),
        ([A], [L.to("meta")], r"lses\[0\] must be on cpu, got meta"),
        ([torch.tensor(1.0)], [torch.tensor(1.0)], r"outputs\[0\] must be like"),
    ],
)
def test_what_does_not_fit(outputs: Any, lses: Any, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        merge_attentions(outputs, lses)
