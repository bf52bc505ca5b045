"""Text dominance: how much more a VLM attends to its text than to what else it is given.

Metrics of Wu et al., "When Language Overrules", arXiv 2508.10552: MDI compares attention per
token, AEI a modality's share of the attention with its share of the tokens. Both are 1 where
attention is uniform. They are per token: MDI falls when visual tokens are pruned, whatever the
model does with those that are left, so report accuracy beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vistoken.errors import MethodError

Number = Tensor | float | int


def attention_mass(attention: Tensor, keys: Tensor, queries: Tensor | None = None) -> Tensor:
    """Return the attention mass [B] fp32 that the chosen queries give to the chosen keys.

    attention [B, H, Q, K] probabilities over all keys; keys [B, K] bool, say the text or the other
    tokens of each row; queries [B, Q] bool, the generated tokens (None: all). The mass is the sum
    over keys, averaged over heads and queries: padding, when False in both masks, takes no part.
    A row without queries is 0.
    """
    batch, heads, rows, columns = attention.shape
    if queries is None:
        queries = torch.ones(batch, rows, dtype=torch.bool, device=attention.device)
    if keys.shape != (batch, columns) or queries.shape != (batch, rows):
        raise MethodError(
            f"attention_mass: keys {list(keys.shape)} and queries {list(queries.shape)} must be "
            f"[B, K] and [B, Q] of attention {list(attention.shape)}."
        )
    # masked, not multiplied: what stands at padding may be NaN
    chosen = keys[:, None, None] & queries[:, None, :, None]
    mass = torch.where(chosen, attention.float(), 0.0).sum((1, 2, 3))
    return mass / (heads * queries.sum(-1)).clamp(min=1)


def mdi(text_mass: Number, other_mass: Number, text_count: Number, other_count: Number) -> Tensor:
    """Return the modality dominance index, (A_T / |T|) / (A_O / |O|), elementwise, fp64.

    text_mass, other_mass: attention to text and to other tokens, non-negative, in any common
    unit; text_count, other_count: numbers of those tokens, positive; tensors of shapes that
    broadcast, or numbers. Above 1 the text dominates. Infinite where only text is attended to,
    NaN where nothing is. Raises `MethodError` for negative masses and counts that are not
    positive, which reads tensors back from their device.
    """
    a, b, n, m = _checked("mdi", text_mass, other_mass, text_count, other_count)
    return (a / n) / (b / m)


def aei(mass: Number, other_mass: Number, count: Number, other_count: Number) -> Tensor:
    """Return the attention efficiency index, [A / (A + A_O)] / [n / (n + n_O)], elementwise, fp64.

    Of one modality (mass A, count n tokens) against the rest; limits, shapes and errors as in
    `mdi`. NaN where nothing is attended to.
    """
    a, b, n, m = _checked("aei", mass, other_mass, count, other_count)
    return (a / (a + b)) / (n / (n + m))


def depth_thirds(layers: int) -> dict[str, Sequence[int]]:
    """Return the layers of the `early`, `middle` and `late` third of `layers`, at least 3.

    Average masses over a third before taking an index. A remainder goes to the late third first,
    then to the middle one.
    """
    if layers < 3:
        raise MethodError(f"depth_thirds: needs at least 3 layers, got {layers}.")
    first, second = layers // 3, (2 * layers) // 3
    return {
        "early": range(first),
        "middle": range(first, second),
        "late": range(second, layers),
    }


def _checked(name: str, *values: Number) -> tuple[Tensor, ...]:
    masses_counts = [torch.as_tensor(value).double() for value in values]
    device = next((value.device for value in values if isinstance(value, Tensor)), None)
    if any(bool((mass < 0).any()) for mass in masses_counts[:2]):
        raise MethodError(f"{name}: attention masses must not be negative, got {values[:2]}.")
    if any(not bool((count > 0).all()) for count in masses_counts[2:]):
        raise MethodError(
            f"{name}: token counts must be positive, got {values[2:]}; leave out rows without "
            "text or without other tokens."
        )
    return tuple(value.to(device) for value in masses_counts)
