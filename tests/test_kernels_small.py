"""The attention row and the token gather against fp64 and loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vistoken.kernels import attention_row, gather_tokens

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
EPS = torch.finfo(torch.float32).eps


# --- attention_row -------------------------------------------------------------------------------


def exact_row(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """softmax(q k * scale) in fp64 loops over one query [D] and keys [K, D]."""
    q = [float(x) for x in query]
    logits = [scale * sum(a * float(b) for a, b in zip(q, key, strict=True)) for key in keys]
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)


def budget(query: Tensor, keys: Tensor, scale: float) -> float:
    """Relative error of a softmax weight whose D-term fp32 logits are each off by a few ulps.

    An error e of the logits becomes a factor exp(2 e) of the weights; e is bounded by the ulp of
    the sum of the absolute products times their number. The inputs are read exactly.
    """
    size = (query.double().abs() @ keys.double().abs().mT * abs(scale)).max().item()
    return 2 * EPS * (query.shape[-1] * size + keys.shape[-2] + 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("keys", "width"), [(1, 1), (7, 3), (37, 8), (577, 64)])
@pytest.mark.parametrize("size", [0.01, 1.0, 6.0])
def test_row_equals_fp64(dtype: torch.dtype, keys: int, width: int, size: float) -> None:
    q = (size * torch.randn(width)).to(dtype)
    k = torch.randn(keys, width).to(dtype)
    row = attention_row(q[None], k, width**-0.5)
    assert row.dtype == torch.float32 and row.shape == (1, keys)
    # fp64 inputs lose their last digits on the way to fp32, which the reference must see too
    q, k = (x.float() if dtype == torch.float64 else x for x in (q, k))
    expected = exact_row(q, k, width**-0.5)
    error = ((row[0] - expected).abs() / (expected + 1e-37)).max()
    assert error <= budget(q[None], k, width**-0.5)
    assert abs(row.double().sum() - 1) <= EPS * (keys + 4)


def test_half_precision_rows_are_as_fine_as_fp32() -> None:
    """Products rounded to bf16 would be off by 1e-3: the budget above is far below that."""
    q, k = torch.randn(1, 64).bfloat16(), torch.randn(577, 64).bfloat16()
    assert budget(q, k, 0.125) < 1e-3
    rounded = (q @ k.mT * 0.125).softmax(-1).double()[0]
    expected = exact_row(q[0], k, 0.125)
    assert ((rounded - expected).abs() / expected).max() > 1e-3


def test_row_under_autocast_stays_fp32() -> None:
    q, k = torch.randn(2, 3, 1, 16), torch.randn(2, 3, 37, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attention_row(q, k, 0.25)
    assert torch.equal(inside, attention_row(q, k, 0.25))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_batch_are_the_rows_of_the_whole_map(dtype: torch.dtype) -> None:
    q, k = (torch.randn(2, 4, n, 8).to(dtype) for n in (5, 37))
    rows = attention_row(q, k, 0.3)
    assert rows.shape == (2, 4, 5, 37)
    for b, h, i in ((0, 0, 0), (1, 3, 4), (0, 2, 3)):
        expected = exact_row(q[b, h, i], k[b, h], 0.3).float()
        torch.testing.assert_close(rows[b, h, i], expected, rtol=1e-5, atol=0)
    full = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), torch.eye(37).double().expand(2, 4, 37, 37), scale=0.3
    )
    torch.testing.assert_close(rows.double(), full, rtol=1e-5, atol=1e-9)


def test_strides_and_expanded_inputs_do_not_matter() -> None:
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 37, 8)
    expected = attention_row(q, k, 0.3)
    split = torch.stack([k, q.expand_as(k)], -1)  # as a slice of a fused projection
    assert torch.allclose(attention_row(split[..., :1, :, 1], split[..., 0], 0.3), expected)
    swapped = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.allclose(attention_row(q, swapped, 0.3), expected)
    shared = attention_row(q[:1, :1].expand(2, 4, 1, 8), k[:1].expand(2, 4, 37, 8), 0.3)
    assert torch.allclose(shared[1], attention_row(q[:1, :1], k[:1], 0.3)[0])


def test_row_of_huge_and_equal_logits() -> None:
    keys = torch.eye(4).half() * 1000
    row = attention_row(torch.tensor([[1000.0, 0, 0, 0]]).half(), keys, 1.0)
    assert row.tolist() == [[1.0, 0.0, 0.0, 0.0]]  # 1e6 overflows fp16
    assert attention_row(torch.zeros(1, 4), keys, 1.0).tolist() == [[0.25] * 4]


# --- gather_tokens -------------------------------------------------------------------------------


def gathered(tokens: Tensor, indices: Tensor) -> Tensor:
    picked = [torch.stack([tokens[b, i] for i in row]) for b, row in enumerate(indices.tolist())]
    return torch.stack(picked)


@pytest.mark.parametrize("rest", [(), (5,), (3, 4), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_gather_takes_the_rows(rest: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens = torch.randint(-9, 9, (3, 11, *rest)).to(dtype)
    for indices in (
        torch.randint(0, 11, (3, 4)),
        torch.arange(11).expand(3, 11),
        torch.tensor([[10], [0], [5]]),
        torch.tensor([[2, 2, 0]]).expand(3, 3),
    ):
        found = gather_tokens(tokens, indices)
        assert found.dtype == dtype and torch.equal(found, gathered(tokens, indices))


def test_gather_of_strided_and_expanded_tokens() -> None:
    indices = torch.tensor([[0, 3], [6, 1]])
    tokens = torch.randn(2, 5, 7).transpose(1, 2)
    assert torch.equal(gather_tokens(tokens, indices), gathered(tokens, indices))
    shared = torch.randn(1, 7, 5).expand(2, 7, 5)
    assert torch.equal(gather_tokens(shared, indices), gathered(shared, indices))
    strided = torch.stack([indices, indices + 9], -1)[..., 0]
    assert torch.equal(gather_tokens(tokens, strided), gathered(tokens, indices))


def test_gather_sends_the_gradient_to_the_picked_rows() -> None:
    """A row picked twice receives the sum; a row left out receives zero."""
    tokens = torch.randn(2, 4, 3, requires_grad=True)
    indices = torch.tensor([[0, 2, 2], [1, 0, 3]])
    weight = torch.randn(2, 3, 3)
    (gather_tokens(tokens, indices) * weight).sum().backward()
    expected = torch.zeros(2, 4, 3)
    for b in range(2):
        for slot, i in enumerate(indices[b].tolist()):
            expected[b, i] += weight[b, slot]
    assert tokens.grad is not None
    torch.testing.assert_close(tokens.grad, expected)
    assert (tokens.grad[0, [1, 3]] == 0).all()
    double = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, indices), (double,))


def test_gather_refuses_indices_out_of_range() -> None:
    for bad in (7, -1):
        with pytest.raises((RuntimeError, IndexError)):
            gather_tokens(torch.randn(1, 7, 5), torch.tensor([[bad]]))
