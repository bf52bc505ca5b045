"""Neighborhood attention next to itself and to dense attention, where the results must agree."""

from __future__ import annotations

import importlib.util
import math
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dense_oracle import distance
from vistoken import kernels
from vistoken.kernels import merge_attentions

Three = tuple[Tensor, Tensor, Tensor]
BUDGET = 2e-6

triton = pytest.mark.skipif(
    not importlib.util.find_spec("triton") or torch.cuda.is_available(),
    reason="needs triton and its interpreter, which runs where there is no GPU",
)


@pytest.fixture(
    params=[
        pytest.param(("tiled", "cpu"), id="tiled"),
        pytest.param(("reference", "cpu"), id="reference"),
        pytest.param(("triton", "cpu"), id="triton", marks=triton),
        pytest.param(("triton", "cuda"), id="gpu", marks=pytest.mark.gpu),
    ]
)
def place(request: Any) -> tuple[str, str]:
    """A backend and its device."""
    return request.param


GRIDS = pytest.mark.parametrize("grid", [(24,), (4, 6), (2, 3, 4)], ids=str)


def draw(grid: tuple[int, ...], device: str, batch: int = 1, heads: int = 2) -> Three:
    q, k, v = (torch.randn(batch, *grid, heads, 16, device=device) for _ in range(3))
    return q, k, v


def na(x: Three, kernel: Any, backend: str, **options: Any) -> Tensor:
    """na1d, na2d or na3d, by the rank of the inputs."""
    return getattr(kernels, f"na{x[0].dim() - 3}d")(*x, kernel, backend=backend, **options)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Dense attention over all axes between the first and the heads, [B, *grid, H, D]."""
    flat = [x.flatten(1, -3).transpose(1, 2) for x in (q, k, v)]
    out = scaled_dot_product_attention(*flat, scale=scale).transpose(1, 2)
    return out.reshape(*q.shape[:-1], v.shape[-1])


def near(found: Tensor, wanted: Tensor) -> bool:
    return distance(found, wanted.double()) <= BUDGET


@GRIDS
def test_a_window_of_the_grid_is_dense_attention(
    grid: tuple[int, ...], place: tuple[str, str]
) -> None:
    backend, device = place
    x = draw(grid, device)
    for scale, stride in ((None, 1), (0.7, 2)):
        assert near(na(x, grid, backend, scale=scale, stride=stride), dense(*x, scale=scale))


@GRIDS
def test_a_stride_of_the_window_is_attention_in_blocks(
    grid: tuple[int, ...], place: tuple[str, str]
) -> None:
    backend, device = place
    block = [length // 2 if length % 2 == 0 else length for length in grid]
    x = draw(grid, device)

    def cut(t: Tensor) -> Tensor:
        """[B, *grid, H, D] to [B * blocks, *block, H, D]."""
        rank = len(grid)
        for axis, size in enumerate(block):
            t = t.unflatten(1 + 2 * axis, (-1, size))
        order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), -2, -1]
        return t.permute([i % t.dim() for i in order]).flatten(0, rank)

    wanted = dense(*map(cut, x))
    assert near(cut(na(x, block, backend, stride=block)), wanted)


@GRIDS
def test_the_largest_dilation_is_attention_on_strided_grids(
    grid: tuple[int, ...], place: tuple[str, str]
) -> None:
    backend, device = place
    dilation = [2 if length % 2 == 0 else 1 for length in grid]
    kernel = [length // d for length, d in zip(grid, dilation, strict=True)]
    x = draw(grid, device)
    out = na(x, kernel, backend, dilation=dilation)
    for start in range(2):
        cut = (slice(None), *(slice(start if d > 1 else 0, None, d) for d in dilation))
        assert near(out[cut], dense(*(t[cut] for t in x)))


def test_dilation_that_does_not_divide_the_axis(place: tuple[str, str]) -> None:
    backend, device = place
    x = draw((11, 7), device)
    out = na(x, (2, 3), backend, dilation=(4, 2), stride=(2, 1), is_causal=(True, False))
    for i in range(4):
        for j in range(2):
            cut = (slice(None), slice(i, None, 4), slice(j, None, 2))
            part = tuple(t[cut] for t in x)
            wanted = na(part, (2, 3), backend, stride=(2, 1), is_causal=(True, False))  # type: ignore[arg-type]
            assert near(out[cut], wanted)


@GRIDS
def test_entries_of_a_batch_and_heads_do_not_meet(
    grid: tuple[int, ...], place: tuple[str, str]
) -> None:
    backend, device = place
    x = draw(grid, device, batch=2)
    out = na(x, 2, backend)
    swapped = na(tuple(t.flip(0, -2) for t in x), 2, backend)  # type: ignore[arg-type]
    assert torch.equal(swapped.flip(0, -2), out)
    alone = na(tuple(t[1:, ..., 1:, :] for t in x), 2, backend)  # type: ignore[arg-type]
    assert near(alone, out[1:, ..., 1:, :])


@pytest.mark.parametrize("order", list(permutations(range(3)))[1:], ids=str)
def test_axes_are_alike(order: tuple[int, ...], place: tuple[str, str]) -> None:
    backend, device = place
    kernel, stride, causal = (2, 3, 2), (1, 3, 2), (True, False, False)
    x = draw((3, 5, 2), device, heads=1)
    out = na(x, kernel, backend, stride=stride, is_causal=causal)

    def turn(t: Tensor) -> Tensor:
        return t.permute(0, *(1 + i for i in order), 4, 5)

    def pick(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[i] for i in order)

    q, k, v = map(turn, x)
    turned = na((q, k, v), pick(kernel), backend, stride=pick(stride), is_causal=pick(causal))
    assert near(turned, turn(out))


def test_a_line_is_a_flat_picture_is_a_flat_video(place: tuple[str, str]) -> None:
    backend, device = place
    x = draw((13,), device)
    options: dict[str, Any] = {"stride": 2, "dilation": 2, "is_causal": True}
    line = na(x, 4, backend, **options)
    for ones in (1, 2):
        grown = tuple(t.view(1, *[1] * ones, 13, 2, 16) for t in x)
        full = {name: (*[type(y)(1)] * ones, y) for name, y in options.items()}
        full["is_causal"] = (*[False] * ones, True)
        assert near(na(grown, (*[1] * ones, 4), backend, **full).view_as(line), line)  # type: ignore[arg-type]


@GRIDS
def test_additional_keys_are_part_of_one_softmax(
    grid: tuple[int, ...], place: tuple[str, str]
) -> None:
    """With a full window: dense attention over all keys. With any: the merge of the two halves."""
    backend, device = place
    q, k, v = draw(grid, device)
    more_k, more_v = (torch.randn(1, 5, 2, 16, device=device) for _ in range(2))
    more: dict[str, Any] = {"additional_keys": more_k, "additional_values": more_v}
    whole = dense(q, *(torch.cat([x.flatten(1, -3), y], 1) for x, y in ((k, more_k), (v, more_v))))
    assert near(na((q, k, v), grid, backend, **more), whole)

    def halves(q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor, extra_v: Tensor) -> Any:
        window, sums = na((q, k, v), 2, backend, return_lse=True)
        heads = q.flatten(1, -3).transpose(1, 2) @ extra_k.permute(0, 2, 3, 1) / math.sqrt(16)
        text_sums = heads.logsumexp(-1).transpose(1, 2).unflatten(1, grid)
        text = dense(q, extra_k, extra_v)
        return merge_attentions([window, text], [sums, text_sums])

    def one(q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor, extra_v: Tensor) -> Any:
        options = {"additional_keys": extra_k, "additional_values": extra_v}
        return na((q, k, v), 2, backend, return_lse=True, **options)

    results = []
    for way in (one, halves):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, more_k, more_v)]
        out, lse = way(*leaves)
        loss = (out * torch.linspace(-1, 1, 16, device=device)).sum() + lse.square().sum()
        results.append([out, lse, *torch.autograd.grad(loss, leaves)])
    for found, wanted in zip(*results, strict=True):
        assert distance(found, wanted.double()) < 1e-5


def test_values_enter_linearly_and_keys_by_their_differences(place: tuple[str, str]) -> None:
    """A constant added to every key moves no result; V of ones gives ones."""
    backend, device = place
    q, k, v = draw((5, 6), device)
    out = na((q, k, v), 3, backend)
    shifted = na((q, k + torch.randn(16, device=device), v), 3, backend)
    assert distance(shifted, out.double()) < 1e-5
    assert near(na((q, k, 2 * v + 1), 3, backend), 2 * out + 1)
