"""Uniform selection: evenly spaced tokens of the raster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vistoken.contract import Selection, View
from vistoken.pruning._pruner import Pruner


@dataclass(frozen=True, kw_only=True)
class Uniform(Pruner):
    """Keep every (N / keep)-th token of the raster; reads nothing of the picture."""

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "control"
    tag: ClassVar[str] = "control"

    def select(self, view: View, keep: int) -> Selection:
        """Choose the same positions in every image."""
        return Selection(select(view.tokens, keep, device=view.device).expand(view.images, keep))


def select(tokens: int, keep: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Return the indices [keep] floor((i + 1/2) tokens / keep), int64."""
    step = torch.arange(keep, device=device)
    return (2 * step + 1) * tokens // (2 * keep)
