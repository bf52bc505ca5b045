"""Gather of token rows by per-sample indices."""

from __future__ import annotations

from torch import Tensor


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Return the rows `indices` [B, K] of `tokens` [B, N, ...] as [B, K, ...].

    Differentiable in `tokens`; never waits for the device.
    """
    shape = (*indices.shape, *tokens.shape[2:])
    index = indices.reshape(*indices.shape, *([1] * (tokens.dim() - 2))).expand(shape)
    return tokens.gather(1, index)
