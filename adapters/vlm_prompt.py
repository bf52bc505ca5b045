"""A call's prompt before and after its pictures were pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vistoken import prompt
from vistoken.pictures import Picture

if TYPE_CHECKING:
    from vistoken.adapters.vlm_language import LanguagePlan


@dataclass(frozen=True)
class LongPrompt:
    """A call's prompt and pictures, as the caller gave them.

    ids [B, L] or embeds [B, L, C]; mask [B, L] and positions may be None; vision: the arguments
    for the tower that are not None. kinds [B, L] on the CPU: 0 for text, else 1 + the number of
    the placeholder's kind. pictures in encoding order; layout: where they lie.
    """

    ids: Tensor | None
    embeds: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    vision: dict[str, Any]
    kinds: Tensor
    pictures: tuple[Picture, ...]
    layout: prompt.Layout


@dataclass(frozen=True)
class ShortPrompt:
    """What the LLM reads instead of the long prompt, and how the two map to each other."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    shortening: prompt.Shortening
    language: LanguagePlan
