"""What every visual-token pruning method shares: the budget, and acting before the LLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Split `total` in proportion to `weights`, by largest remainder; ties go to the first.

    With total <= sum(weights) no part exceeds its weight.
    """
    whole = max(sum(weights), 1)
    parts = [total * weight // whole for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: -(total * weights[i] % whole))
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts


@dataclass(frozen=True, kw_only=True)
class Pruner(Method):
    """A method that keeps some of a picture's visual tokens: the budget and the positions.

    Give exactly one of `ratio` (share removed, 0 <= ratio < 1) and `keep` (tokens that stay, per
    picture). The budget counts all tokens of the picture in the prompt, newline tokens included;
    with `keep` at least their number the model runs untouched. `positions` says which positions
    the shortened prompt has: `renumber` closes the gaps, `original` leaves every surviving token
    at the position it had, `auto` does what the method's paper does, and always `original` in a
    model that numbers pictures in three axes. `newlines` says whether the newline tokens of tiled
    pictures stay (and count in the budget) or are dropped.
    """

    family: ClassVar[str] = "pruning"
    places: ClassVar[frozenset[Place]] = frozenset({Place.PROJECTED})
    numbering: ClassVar[str] = "renumber"  # what `auto` means where positions have one axis

    ratio: float | None = option(None, "share of the visual tokens removed", minimum=0, below=1)
    keep: int | None = option(None, "visual tokens that stay, per picture", minimum=1)
    positions: str = option(
        "auto", "positions of the shortened prompt", choices=("auto", "renumber", "original")
    )
    newlines: str = option("keep", "newline tokens of tiled pictures", choices=("keep", "drop"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) == (self.keep is None):
            raise MethodError(
                f"{self.name}: give exactly one of ratio and keep, got "
                f"ratio={self.ratio!r} and keep={self.keep!r}."
            )
        if self.keep is not None and not isinstance(self.keep, int):
            raise MethodError(f"{self.name}: keep must be a whole number, got {self.keep!r}.")

    @property
    def always(self) -> bool:
        """Whether stages inside the LLM run although the budget is met already."""
        return False

    @property
    def follows_text(self) -> bool:
        """Whether what stays depends on the prompt's text, or is decided inside the LLM.

        Then a picture must be read again for every question about it.
        """
        text = {Signal.TEXT_EMBEDDINGS, Signal.LLM_ATTENTION}
        return Place.LLM_LAYER in self.places or bool(text & self.reads())

    def budget(self, tokens: int) -> int:
        """Return how many of `tokens` visual tokens of one picture stay."""
        if self.keep is not None:
            return min(self.keep, tokens)
        assert self.ratio is not None  # by __post_init__; for the type checker
        return tokens_to_keep(tokens, self.ratio)

    def keeps_positions(self, facts: ModelFacts) -> bool:
        """Whether surviving tokens keep their positions in a model with these facts."""
        if facts.position_axes == 1:
            wanted = self.numbering if self.positions == "auto" else self.positions
            return wanted == "original"
        if self.positions == "renumber":
            raise MethodError(
                f"{self.name}: positions='renumber' has no meaning in this model, which numbers "
                "pictures in three axes; use 'auto' or 'original'."
            )
        return True

    def tower_budget(self, keep: int, tiles: int, needed: int) -> int:
        """Return how many tokens of each tile pass the vision tower, for a stage inside it.

        keep: the budget of the picture with most tiles, `tiles` of them; needed: the least that
        fills every budget of the call. What exceeds the budget must be cut by a later stage.
        """
        return needed

    def survivors(self, tokens: int, keep: int, facts: ModelFacts) -> int:
        """Return how many of `tokens` are left after the last stage, for a budget of `keep`.

        For most methods `keep` itself; a method whose budget is an average over layers says here
        how many it ends with.
        """
        return keep

    def reads(self) -> frozenset[Signal]:
        """Signals that this instance reads (a subset of the class's)."""
        return self.signals

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        """One stage, after the projector; a method that prunes elsewhere overrides this."""
        return (Stage(Place.PROJECTED, None, self.reads()),)

    def select(self, view: View, keep: int) -> Selection | None:
        """Choose among the view's tokens at one stage, or return None to leave them all.

        Called for every stage in order, for each group of equal pictures, never when the budget
        keeps every token nor when no more than `survivors` are left. `keep` is the budget without
        newline tokens; a method with one stage returns exactly `keep`. Must not read values back
        to the CPU unless its docstring says so. Computation under the caller's grad mode.
        """
        raise NotImplementedError
