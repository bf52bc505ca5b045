"""Random block masks and tensors for the backends of attention along block lists."""

from __future__ import annotations

from random import Random
from typing import Any

import torch

from vistoken.kernels.block_mask import BlockMask

Inputs = dict[str, Any]


def draw_mask(dice: Random, batch: int, heads: int, tokens: int = 150) -> BlockMask:
    """Blocks at random, some rows of them empty; often with a mask of pairs or short blocks."""
    block = dice.choice((16, 32)), dice.choice((16, 32))
    q_tokens, kv_tokens = dice.randint(1, tokens), dice.randint(1, tokens)
    nq, nk = -(-q_tokens // block[0]), -(-kv_tokens // block[1])
    size = dice.choice(((nq, nk), (heads, nq, nk), (batch, 1, nq, nk), (batch, heads, nq, nk)))
    block_map = torch.rand(size) < dice.choice((0.2, 0.6, 1.0))
    step, shift = dice.randint(2, 9), dice.randint(0, 5)
    mask = dice.choice(
        (
            None,
            lambda b, h, q, kv: (q * 7 + kv * 3 + shift) % step != 0,
            lambda b, h, q, kv: (q + kv + h * 3 + b) % step == 0,  # many a query sees nothing
            lambda b, h, q, kv: kv <= q,
        )
    )
    lengths = None
    if dice.random() < 0.4:
        lengths = torch.randint(0, block[1] + 1, (dice.choice((1, batch)), nk))
        ends = torch.full((nk,), block[1])
        ends[-1] = kv_tokens - (nk - 1) * block[1]
        lengths = lengths.minimum(ends)
    return BlockMask.from_map(
        block_map, q_tokens, kv_tokens, block, mask=mask, lengths=lengths, batch=batch, heads=heads
    )


def draw_list_inputs(
    dice: Random, dtype: torch.dtype, channels: tuple[int, ...] = (1, 3, 8, 16)
) -> Inputs:
    """Arguments of a backend's `forward`, by name."""
    batch, kv_heads, group = dice.randint(1, 2), dice.randint(1, 2), dice.randint(1, 3)
    dim, value_dim = dice.choice(channels), dice.choice(channels)
    mask = draw_mask(dice, batch, kv_heads * group)
    return {
        "q": torch.randn(batch, mask.q_tokens, kv_heads * group, dim, dtype=dtype),
        "k": torch.randn(batch, mask.kv_tokens, kv_heads, dim, dtype=dtype),
        "v": torch.randn(batch, mask.kv_tokens, kv_heads, value_dim, dtype=dtype),
        "mask": mask,
        "scale": dice.choice((dim**-0.5, 1.0, 0.0, -0.3)),
    }


def list_results(forward: Any, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Out, lse, and the gradients of a sum of both with random factors; no lse is -inf."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in ("q", "k", "v")}
    out, lse = forward(**{**inputs, **leaves})
    draw = torch.Generator().manual_seed(0)
    seen = lse.masked_fill(lse == -torch.inf, 0)
    loss = sum((x * torch.randn(x.shape, generator=draw).to(x.device)).sum() for x in (out, seen))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    blind = (lse == -torch.inf).double()
    named = {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out, "lse": seen, "blind": blind, **named}
