"""Which keys a query sees, found by search instead of by the formulas of the package."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor


def seen(length: int, kernel: int, stride: int, dilation: int, causal: bool) -> list[set[int]]:
    """The keys of an axis that each of its queries sees."""
    sets: list[set[int]] = [set() for _ in range(length)]
    for first in range(dilation):
        line = list(range(length))[first::dilation]
        for start in range(0, len(line), stride):
            sharing = list(range(start, min(start + stride, len(line))))
            # a query that would share, were the line longer, may be the one in the middle
            middle = min(start + stride // 2, len(line) - 1)
            if causal:
                keys = [j for j in range(len(line)) if j <= sharing[-1]][-kernel:]
                keys_of = {i: [j for j in keys if j <= i] for i in sharing}
            else:
                windows = [range(i, i + kernel) for i in range(len(line) - kernel + 1)]
                best = min(windows, key=lambda window: abs(window[kernel // 2] - middle))
                keys_of = dict.fromkeys(sharing, list(best))
            for i, keys in keys_of.items():
                sets[line[i]] = {line[j] for j in keys}
    return sets


def visible(
    grid: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
) -> Tensor:
    """bool [tokens, tokens]: which query of a grid sees which key, both row-major."""
    axes = zip(grid, kernel, stride, dilation, causal, strict=True)
    sets = [seen(*axis) for axis in axes]
    places = list(product(*map(range, grid)))
    rows = [
        [all(b in s[a] for a, b, s in zip(x, y, sets, strict=True)) for y in places] for x in places
    ]
    return torch.tensor(rows)
