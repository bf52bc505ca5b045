"""FastV: one cut early in the LLM, by what the last token of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vistoken.contract import ModelFacts, Place, Selection, Signal, Stage, View
from vistoken.errors import MethodError
from vistoken.method import option
from vistoken.pruning._pruner import Pruner, top_indices


@dataclass(frozen=True, kw_only=True)
class FastV(Pruner):
    """Keep the visual tokens that the prompt's last token attends to most in an early LLM layer.

    Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764. LLM
    layers 0 to K - 1, with K = `layer`, run on every token; by the attention of layer K - 1,
    averaged over the heads, the budget stays for the layers from K on, at original positions.

    The budget counts the tokens *after* the cut, as the paper's R does. Other papers mean the
    average over the layers: for that of a tokens per layer, of N tokens and L layers, give
    keep = (L a - K N) / (L - K); the report shows what enters each layer either way.

    The official variants disagree: one masks instead of dropping and chooses anew at every decode
    step, others choose once (as here); they round the count down or to the nearest (here:
    `ratio`'s rule); prefixes of 36, 35 and 5 tokens are hard-coded, so that the image's columns
    can be off by one (here they are the image's). K = 0 is a random choice there and is not
    offered. Every picture has the whole budget and is ranked by itself.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "FastV, ECCV 2024, arXiv 2403.06764"
    tag: ClassVar[str] = "training-free"
    places: ClassVar[frozenset[Place]] = frozenset({Place.LLM_LAYER})
    signals: ClassVar[frozenset[Signal]] = frozenset({Signal.LLM_ATTENTION})
    numbering: ClassVar[str] = "original"

    layer: int = option(2, "K: LLM layers that see every token", minimum=1)

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        """One stage, after LLM layer K - 1; another layer must follow."""
        first, last = facts.first_text_stage + 1, facts.text_layers - 1
        if first > last:
            raise MethodError(
                f"fastv needs a later LLM layer than the {facts.text_layers} of this model, which "
                f"must see every token in the first {first}; choose a method that prunes before "
                "the LLM."
            )
        if not first <= self.layer <= last:
            raise MethodError(
                f"fastv: layer must be from {first} to {last} in this model of "
                f"{facts.text_layers} LLM layers, got {self.layer}; the first that works is "
                f"layer={first}."
            )
        return (Stage(Place.LLM_LAYER, self.layer - 1, self.reads()),)

    def select(self, view: View, keep: int) -> Selection:
        """Choose the `keep` tokens with the largest attention from the prompt's last token."""
        return Selection(select(view.language.last_attention, keep))


def select(last_attention: Tensor, keep: int) -> Tensor:
    """Return the indices [B, keep] int64, ascending, of the tokens that FastV keeps.

    last_attention [B, H, N]: what the prompt's last token attends to; ties go to the lower index.
    """
    return top_indices(last_attention.float().mean(1), keep)
