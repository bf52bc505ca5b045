"""Random windows and tensors for the backends of attention over a grid, as backends are called."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from vistoken.kernels.windows import Window, disc_window, neighborhood

Inputs = dict[str, Any]
LONGEST = {1: 60, 2: 14, 3: 7}
TENSORS = ("q", "k", "v", "extra_k", "extra_v", "global_q")


def draw_window(dice: Random) -> Window:
    """Windows of one to three axes with strides and causal axes, or discs."""
    rank = dice.choice((1, 2, 2, 3))
    grid = [dice.randint(1, LONGEST[rank]) for _ in range(rank)]
    if rank == 2 and dice.random() < 0.3:
        return disc_window(grid, dice.randint(1, 9))
    kernel = [dice.choice((length, dice.randint(1, length))) for length in grid]
    stride = [dice.choice((1, k, dice.randint(1, k))) for k in kernel]
    causal = [dice.random() < 0.3 for _ in grid]
    ((_, window),) = neighborhood(grid, kernel, stride, 1, causal).groups()
    return window


def draw_inputs(
    dice: Random, window: Window, dtype: torch.dtype, channels: tuple[int, ...] = (1, 3, 8, 16)
) -> Inputs:
    """Arguments of a backend's `forward`, by name."""
    batch, kv_heads, group = dice.randint(1, 2), dice.randint(1, 3), dice.randint(1, 3)
    dim, value_dim = dice.choice(channels), dice.choice(channels)
    extra, more = dice.choice((None, 0, 1, 9)), dice.choice((None, 0, 1, 5))

    def tensor(rows: tuple[int, ...], heads: int, size: int) -> Tensor:
        return torch.randn(batch, *rows, heads, size, dtype=dtype)

    return {
        "q": tensor(window.grid, kv_heads * group, dim),
        "k": tensor(window.grid, kv_heads, dim),
        "v": tensor(window.grid, kv_heads, value_dim),
        "window": window,
        "scale": dice.choice((dim**-0.5, 1.0, 0.0, -0.3)),
        "extra_k": None if extra is None else tensor((extra,), kv_heads, dim),
        "extra_v": None if extra is None else tensor((extra,), kv_heads, value_dim),
        "global_q": None if more is None else tensor((more,), kv_heads * group, dim),
    }


def results_and_gradients(forward: Any, inputs: Inputs, seed: int = 0) -> dict[str, Tensor]:
    """What a backend returns, and the gradients of a sum of all of it with random factors."""
    leaves = {
        name: inputs[name].detach().clone().requires_grad_()
        for name in TENSORS
        if inputs[name] is not None
    }
    results = forward(**{**inputs, **leaves})
    names = ("out", "lse", "global_out", "global_lse")
    found = {name: x for name, x in zip(names, results, strict=True) if x is not None}
    draw = torch.Generator().manual_seed(seed)
    factors = {n: torch.randn(x.shape, generator=draw).to(x.device) for n, x in found.items()}
    loss = sum((x * factors[name]).sum() for name, x in found.items())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {**found, **{f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}}


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error (Frobenius) over the tensors; shapes and dtypes must agree."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, x in found.items():
        y = expected[name]
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        assert not x.isnan().any(), name
        x, y = x.detach().double(), y.detach().double()
        error, size = (x - y).norm(), y.norm()
        worst = max(worst, (error / size if size > 1e-9 else error).item())
    return worst
