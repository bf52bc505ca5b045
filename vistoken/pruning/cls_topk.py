"""Top-k by CLS attention: the plainest attention-based selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vistoken.contract import Selection, Signal, View
from vistoken.pruning._pruner import Pruner, top_indices


@dataclass(frozen=True, kw_only=True)
class ClsTopK(Pruner):
    """Keep the tokens that the vision tower's CLS token attends to most.

    The rule of FasterVLM, "[CLS] Attention is All You Need for Training-Free Visual Token
    Pruning", arXiv 2412.01818; the natural control for methods that refine it.
    """

    name: ClassVar[str] = "cls_topk"
    paper: ClassVar[str] = "FasterVLM, arXiv 2412.01818"
    tag: ClassVar[str] = "training-free"
    signals: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION})

    def select(self, view: View, keep: int) -> Selection:
        """Choose the `keep` largest entries of the CLS row."""
        return Selection(select(view.cls_attention, keep))


def select(cls_attention: Tensor, keep: int) -> Tensor:
    """Return the indices [B, keep], ascending, of the largest `cls_attention` [B, N]."""
    return top_indices(cls_attention, keep)
