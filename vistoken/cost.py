"""The cost model: FLOPs of a transformer's prefill and bytes of its KV cache.

One multiply-add counts as two FLOPs. Matrix products and attention products are counted; norms,
activations and softmax are not. Attention counts all S × S products, as fused kernels are counted
by `torch.utils.flop_counter`, also where a causal mask makes half of them idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TransformerShape:
    """The sizes of one transformer; `mlp_matrices` is 3 with a gate, else 2; `vocab` 0 if none."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    mlp_matrices: int
    vocab: int = 0

    def layer_flops(self, tokens: int) -> int:
        """FLOPs of one layer over a sequence of `tokens`."""
        query = self.width * self.heads * self.head_dim
        key_value = 2 * self.width * self.kv_heads * self.head_dim
        mlp = self.mlp_matrices * self.width * self.mlp_width
        attention = 2 * self.heads * self.head_dim * tokens
        return 2 * tokens * (2 * query + key_value + mlp + attention)

    def flops(self, tokens_per_layer: Sequence[int]) -> int:
        """FLOPs of all layers, given the sequence length that enters each."""
        return sum(self.layer_flops(tokens) for tokens in tokens_per_layer)

    def head_flops(self, tokens: int = 1) -> int:
        """FLOPs of the output head over `tokens` positions."""
        return 2 * tokens * self.width * self.vocab

    def kv_bytes(self, tokens_per_layer: Sequence[int], itemsize: int) -> int:
        """Bytes of keys and values after a prefill with these lengths."""
        return 2 * self.kv_heads * self.head_dim * itemsize * sum(tokens_per_layer)
