"""Random selection: the control that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vistoken.contract import Selection, Signal, View
from vistoken.method import option
from vistoken.pruning._pruner import Pruner, top_indices


@dataclass(frozen=True, kw_only=True)
class Random(Pruner):
    """Keep tokens drawn without replacement, by a seed and the picture's content.

    The same picture with the same seed keeps the same tokens in any batch, in any order and on
    any device. Report the mean over several seeds.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "control"
    tag: ClassVar[str] = "control"
    signals: ClassVar[frozenset[Signal]] = frozenset({Signal.IMAGE_KEY})

    seed: int = option(0, "seed of the draw", minimum=0, maximum=2**31 - 1)

    def select(self, view: View, keep: int) -> Selection:
        """Draw `keep` of the tokens of each image."""
        return Selection(select(view.image_key, view.tokens, keep, seed=self.seed))


def select(image_key: Tensor, tokens: int, keep: int, *, seed: int = 0) -> Tensor:
    """Return indices [B, keep] int64, ascending, drawn uniformly without replacement.

    image_key [B] int64 tells pictures apart. A counter-based generator (the finaliser of
    SplitMix64 over key, seed and index) gives each token a number; the largest `keep` stay.
    """
    index = torch.arange(tokens, device=image_key.device)
    state = _mix(_mix(image_key + seed * 0x9E3779B9)[:, None] + index)
    return top_indices(state, keep)


def _mix(x: Tensor) -> Tensor:
    """The 64-bit finaliser of SplitMix64 on int64 tensors, with logical shifts."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
