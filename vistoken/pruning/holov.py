"""HoloV: quotas over crops of the picture, so that context is kept as well as highlights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from vistoken.contract import ModelFacts, Selection, Signal, Stage, View
from vistoken.errors import MethodError
from vistoken.kernels import split_quota
from vistoken.method import option
from vistoken.pruning._pruner import Pruner

MODES = ("paper", "released", "paper-2d")


@dataclass(frozen=True, kw_only=True)
class HoloV(Pruner):
    """Holistic visual token pruning after the projector.

    Zou et al., "Don't Just Chase 'Highlighted Tokens' in MLLMs", NeurIPS 2025, arXiv 2510.02912.
    The tokens are split into crops; each crop gets a quota by its mean holistic score (CLS
    attention plus scaled diversity) and spends it on its best tokens.

    `paper` ranks inside a crop by the holistic score; crops are runs of the raster, as in the
    official code. `paper-2d` makes them square tiles of the grid, which the paper's "spatial
    crops" suggest. `released` is what the official code computes: there the scaling makes the
    quota, and the raw attention the ranking, so token features have no influence at all.

    Official defects that are not reproduced: crops whose quota exceeds their size lose the
    surplus and the result is filled with all-zero embeddings (here the surplus goes to crops with
    room, so exactly `keep` real tokens stay); picks are left in score order (here ascending);
    sixteen crops and 64 tokens are hard-coded; crops of one token skip a factor of 1000 in the
    score.
    """

    name: ClassVar[str] = "holov"
    paper: ClassVar[str] = "HoloV, NeurIPS 2025, arXiv 2510.02912"
    tag: ClassVar[str] = "training-free"
    signals: ClassVar[frozenset[Signal]] = frozenset({Signal.FEATURES, Signal.CLS_ATTENTION})

    mode: str = option("paper", "which reading of the method", choices=MODES)
    crops: int = option(16, "number of crops", minimum=1)

    def reads(self) -> frozenset[Signal]:
        """The released rule needs no features."""
        return self.signals - {Signal.FEATURES} if self.mode == "released" else self.signals

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        """As every pruner, after a check that the tiles fit the grid."""
        if self.mode == "paper-2d":
            tiles(facts.grid, self.crops)
        return super().stages(facts)

    def select(self, view: View, keep: int) -> Selection:
        """Choose by quota per crop, then by score inside each crop.

        A picture of several rasters is one run of tokens, as in the official code; `paper-2d`
        tiles each raster, with a share of the crops by its size.
        """
        grids = None
        if self.mode == "paper-2d":
            grids = tuple(part.grid for part in view.picture.parts)
            if view.tokens < view.picture.tokens:
                raise MethodError(
                    f"holov: paper-2d needs the whole grid of {view.picture.tokens} tokens, but an "
                    f"earlier method left {view.tokens}; use mode='paper' after it."
                )
        features = None if self.mode == "released" else view.features
        crops = crop_layout(view.tokens, self.crops, grids)
        return Selection(_select(features, view.cls_attention, keep, crops.to(view.device)))


def select(
    features: Tensor,
    cls_attention: Tensor,
    keep: int,
    *,
    mode: str = "paper",
    crops: int = 16,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Return the indices [B, keep] int64, ascending, of the tokens that HoloV keeps.

    features [B, N, C] projected tokens (any floating dtype; computed in fp32); cls_attention
    [B, N], non-negative; `grid` (rows, columns) is needed by `paper-2d` only. keep >= N returns
    all tokens. Never reads a value back to the CPU.
    """
    if mode not in MODES:
        raise MethodError(f"holov: mode must be one of {', '.join(MODES)}, got {mode!r}.")
    batch, tokens = cls_attention.shape
    if features.shape[:2] != (batch, tokens):
        raise MethodError(
            f"holov: features {list(features.shape)} and cls_attention "
            f"{list(cls_attention.shape)} must agree in images and tokens."
        )
    if keep < 1 or crops < 1:
        raise MethodError(f"holov: keep and crops must be at least 1, got {keep} and {crops}.")
    if mode == "paper-2d" and (grid is None or grid[0] * grid[1] != tokens):
        raise MethodError(f"holov: paper-2d needs a grid of {tokens} tokens, got {grid!r}.")
    if keep >= tokens:
        return torch.arange(tokens, device=cls_attention.device).repeat(batch, 1)
    grids = (grid,) if mode == "paper-2d" and grid is not None else None
    layout = crop_layout(tokens, crops, grids)
    used = None if mode == "released" else features
    return _select(used, cls_attention, keep, layout.to(cls_attention.device))


def tiles(grid: tuple[int, int], crops: int) -> tuple[int, int]:
    """Return how many tiles down and across make `crops` tiles closest to squares on `grid`."""
    rows, columns = grid
    shapes = _tilings(grid, crops)
    if not shapes:
        raise MethodError(f"holov: {crops} crops do not fit a grid of {rows} x {columns} tokens.")
    return min(shapes, key=lambda s: (abs(rows * s[1] - columns * s[0]), s))


def _tilings(grid: tuple[int, int], crops: int) -> list[tuple[int, int]]:
    return [
        (down, crops // down)
        for down in range(1, crops + 1)
        if crops % down == 0 and down <= grid[0] and crops // down <= grid[1]
    ]


@dataclass(frozen=True)
class CropLayout:
    """Which tokens form which crop.

    slots [K, M] int64: the tokens of each crop in raster order, in order of their position;
    empty slots, where `filled` [K, M] is False, repeat token 0. sizes [K] int64.
    in_order: whether the slots are the raster itself, so that nothing needs to be gathered.
    """

    slots: Tensor
    filled: Tensor
    sizes: Tensor
    in_order: bool

    def to(self, device: torch.device) -> CropLayout:
        """The same on a device."""
        return _on_device(self, device)

    def split(self, values: Tensor) -> Tensor:
        """Arrange [B, N, ...] by crop: [B, K, M, ...]."""
        return values.unflatten(1, self.slots.shape) if self.in_order else values[:, self.slots]


# Cached tensors must serve later calls that record gradients, hence not be inference tensors.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def crop_layout(
    tokens: int, crops: int, grids: tuple[tuple[int, int], ...] | None = None
) -> CropLayout:
    """Split `tokens` into `crops` runs, the first ones longer, or `grids` into square tiles."""
    index = torch.arange(tokens, device="cpu")
    if grids is None:
        small, larger = divmod(tokens, crops)
        sizes = torch.full((crops,), small, device="cpu")
        sizes[:larger] += 1  # as the official split does
        crop_of = torch.repeat_interleave(torch.arange(crops, device="cpu"), sizes)
    else:
        found, first = [], 0
        for grid, share in zip(grids, _shares(grids, crops), strict=True):
            found.append(first + _tile_of(grid, share, exact=len(grids) == 1))
            first += share
        crop_of = torch.cat(found)
        sizes = torch.bincount(crop_of, minlength=first)
    crops = len(sizes)
    order = crop_of.argsort(stable=True)
    place = index - (sizes.cumsum(0) - sizes)[crop_of[order]]
    slots = torch.zeros(crops, int(sizes.max()), dtype=torch.long, device="cpu")
    filled = torch.zeros_like(slots, dtype=torch.bool)
    slots[crop_of[order], place] = order
    filled[crop_of[order], place] = True
    return CropLayout(slots, filled, sizes, torch.equal(slots.flatten(), index))


def _shares(grids: tuple[tuple[int, int], ...], crops: int) -> list[int]:
    """How many of the crops each raster gets, by its size, at least one."""
    total = sum(rows * columns for rows, columns in grids)
    return [max(1, round(crops * rows * columns / total)) for rows, columns in grids]


def _tile_of(grid: tuple[int, int], crops: int, *, exact: bool) -> Tensor:
    """The tile of each token of a raster; unless `exact`, of the most tiles that fit."""
    rows, columns = grid
    while not exact and not _tilings(grid, crops):
        crops -= 1
    down, across = tiles(grid, crops)
    index = torch.arange(rows * columns, device="cpu")
    return index // columns * down // rows * across + index % columns * across // columns


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _on_device(layout: CropLayout, device: torch.device) -> CropLayout:
    return CropLayout(
        layout.slots.to(device, non_blocking=True),
        layout.filled.to(device, non_blocking=True),
        layout.sizes.to(device, non_blocking=True),
        layout.in_order,
    )


def _select(features: Tensor | None, cls_attention: Tensor, keep: int, crops: CropLayout) -> Tensor:
    # NaN cannot be refused without reading it back; as 0 it leaves the quotas whole
    attention = crops.split(cls_attention.float().nan_to_num(0.0, 0.0, 0.0)) * crops.filled
    score = attention
    if features is not None:
        score = attention + _scaled_diversity(crops.split(features.float()), attention, crops)
    # the mean of H is twice the mean of A in every crop, so A alone decides the quotas
    mean = attention.sum(-1) / crops.sizes.clamp(min=1)
    quota = split_quota(mean, crops.sizes, keep, spread_leftover=features is None)
    return _best_per_crop(score, crops, quota, keep)


def _scaled_diversity(features: Tensor, attention: Tensor, crops: CropLayout) -> Tensor:
    """gamma V [B, K, M], with V the variance of a token's similarities inside its crop.

    gamma scales V to the mean of A in the crop, so the crop's mean score is twice its mean
    attention; V decides among the tokens of one crop. Where V vanishes in a whole crop, gamma V is
    taken at its limit, the crop's mean attention.
    """
    unit = torch.nn.functional.normalize(features, dim=-1)
    filled = crops.filled.float()
    counts = filled[:, :, None] * filled[:, None, :]
    similar = unit @ unit.transpose(-1, -2) * counts
    similar.diagonal(dim1=-2, dim2=-1).zero_()
    others = (crops.sizes - 1).clamp(min=1)[:, None]
    mean = similar.sum(-1) / others
    spread = ((similar - mean[..., None]).square() * counts).sum(-1) / others
    total_v = spread.sum(-1, keepdim=True)
    total_a = attention.sum(-1, keepdim=True)
    gamma = total_a / total_v.clamp(min=torch.finfo(torch.float32).tiny)
    level = total_a / crops.sizes.clamp(min=1)[:, None] * filled
    return torch.where(total_v > 0, gamma * spread, level)


def _best_per_crop(score: Tensor, crops: CropLayout, quota: Tensor, keep: int) -> Tensor:
    """The `quota` best tokens of every crop, ascending; ties go to the earlier token."""
    ranked = score.masked_fill(~crops.filled, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(score.shape[-1], device=score.device)
    spent = (rank < quota[..., None]).expand_as(order)
    token = crops.slots.expand_as(order).gather(-1, order)
    # picks carry their token, the rest a number past every token: sorting leaves the picks first
    last = crops.slots.numel()
    return torch.where(spent, token, last).flatten(1).sort(dim=-1).values[:, :keep]
