"""What every visual-token pruning method shares: the budget, and acting before the LLM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vistoken.contract import ModelFacts, Place, Selection, Signal, Stage, View
from vistoken.errors import MethodError
from vistoken.method import Method, option


def tokens_to_keep(tokens: int, ratio: float) -> int:
    """Return how many of `tokens` stay when the share `ratio` is removed, at least 1."""
    return max(1, tokens - math.floor(ratio * tokens + 0.5))


def top_indices(scores: Tensor, keep: int) -> Tensor:
    """Return the positions [..., keep] of the largest `scores` [..., N], ascending.

    Ties go to the lower index, on every device.
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(dim=-1).values


@dataclass(frozen=True, kw_only=True)
class Pruner(Method):
    """A method that keeps some of an image's N visual tokens: the budget and the positions.

    Give exactly one of `ratio` (share removed, 0 <= ratio < 1) and `keep` (tokens that stay,
    per image). With `keep >= N` the model runs untouched. `positions` says which positions the
    shortened prompt has: `renumber` closes the gaps (what the papers that prune before the LLM
    do), `original` leaves every surviving token at the position it had.
    """

    family: ClassVar[str] = "pruning"
    places: ClassVar[frozenset[Place]] = frozenset({Place.PROJECTED})

    ratio: float | None = option(None, "share of the visual tokens removed", minimum=0, below=1)
    keep: int | None = option(None, "visual tokens that stay, per image", minimum=1)
    positions: str = option(
        "renumber", "positions of the shortened prompt", choices=("renumber", "original")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) == (self.keep is None):
            raise MethodError(
                f"{self.name}: give exactly one of ratio and keep, got "
                f"ratio={self.ratio!r} and keep={self.keep!r}."
            )
        if self.keep is not None and not isinstance(self.keep, int):
            raise MethodError(f"{self.name}: keep must be a whole number, got {self.keep!r}.")

    def budget(self, tokens: int) -> int:
        """Return how many of `tokens` visual tokens of one image stay."""
        if self.keep is not None:
            return min(self.keep, tokens)
        assert self.ratio is not None  # by __post_init__; for the type checker
        return tokens_to_keep(tokens, self.ratio)

    def reads(self) -> frozenset[Signal]:
        """Signals that this instance reads (a subset of the class's)."""
        return self.signals

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        """One stage, after the projector; a method that prunes elsewhere overrides this."""
        return (Stage(Place.PROJECTED, None, self.reads()),)

    def select(self, view: View, keep: int) -> Selection | None:
        """Choose `keep` of the view's tokens at one stage, or return None to leave them all.

        Called for every stage in order, under no_grad semantics of the caller, never when the
        budget keeps every token. Must not read values back to the CPU.
        """
        raise NotImplementedError
