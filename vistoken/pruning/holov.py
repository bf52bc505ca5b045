"""HoloV: quotas over crops of the picture, so that context is kept as well as highlights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vistoken.contract import Selection, Signal, View
from vistoken.errors import MethodError
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

    def select(self, view: View, keep: int) -> Selection:
        """Choose by quota per crop, then by score inside each crop."""
        features = None if self.mode == "released" else view.features
        crop_of = _crop_of(view.origin, view.facts.grid, self.crops, self.mode)
        return Selection(_select(features, view.cls_attention, keep, crop_of, self.crops))


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
    raster = torch.arange(tokens, device=cls_attention.device).expand(batch, tokens)
    if keep >= tokens:
        return raster.clone()
    crop_of = _crop_of(raster, grid or (1, tokens), crops, mode)
    used = None if mode == "released" else features
    return _select(used, cls_attention, keep, crop_of, crops)


def tiles(grid: tuple[int, int], crops: int) -> tuple[int, int]:
    """Return how many tiles down and across make `crops` tiles closest to squares on `grid`."""
    rows, columns = grid
    shapes = [
        (down, crops // down)
        for down in range(1, crops + 1)
        if crops % down == 0 and down <= rows and crops // down <= columns
    ]
    if not shapes:
        raise MethodError(f"holov: {crops} crops do not fit a grid of {rows} x {columns} tokens.")
    return min(shapes, key=lambda s: (abs(rows * s[1] - columns * s[0]), s))


def _crop_of(origin: Tensor, grid: tuple[int, int], crops: int, mode: str) -> Tensor:
    """The crop [B, N] of each token: a run of the current order, or a tile of the grid."""
    tokens = origin.shape[1]
    if mode == "paper-2d":
        down, across = tiles(grid, crops)
        rows, columns = grid
        tile_row = origin // columns * down // rows
        return tile_row * across + origin % columns * across // columns
    small, larger = divmod(tokens, crops)
    sizes = torch.full((crops,), small, device=origin.device)
    sizes[:larger] += 1  # the first crops take one token more, as the official split does
    ends = sizes.cumsum(0)
    position = torch.arange(tokens, device=origin.device)
    return torch.searchsorted(ends, position, right=True).expand_as(origin)


def _select(
    features: Tensor | None, cls_attention: Tensor, keep: int, crop_of: Tensor, crops: int
) -> Tensor:
    attention = cls_attention.float()
    member = crop_of[:, None] == torch.arange(crops, device=crop_of.device)[:, None]
    sizes = member.sum(-1)
    score = attention if features is None else _holistic(features.float(), attention, member)
    mean = (score[:, None] * member).sum(-1) / sizes.clamp(min=1)
    mode = "released" if features is None else "paper"
    quota = _quotas(mean, sizes, keep, mode)
    return _best_per_crop(score, crop_of, quota, keep)


def _holistic(features: Tensor, attention: Tensor, member: Tensor) -> Tensor:
    """H = gamma V + A [B, N] with V the variance of a token's similarities inside its crop.

    gamma scales V to the mean of A in the crop, so the crop's mean score is twice its mean
    attention; V decides among the tokens of one crop.
    """
    unit = torch.nn.functional.normalize(features, dim=-1)
    same = member.float().transpose(1, 2) @ member.float()  # [B, N, N]: one when in one crop
    similar = unit @ unit.transpose(1, 2) * same
    similar.diagonal(dim1=1, dim2=2).zero_()
    others = (same.sum(-1) - 1).clamp(min=1)
    mean = similar.sum(-1) / others
    spread = ((similar - mean[:, :, None]) ** 2 * same).sum(-1) / others
    belongs = member.float()
    total_v = (spread[:, None] * belongs).sum(-1)
    total_a = (attention.abs()[:, None] * belongs).sum(-1)
    gamma = (total_a / total_v.clamp(min=torch.finfo(torch.float32).tiny))[:, :, None] * belongs
    # where V vanishes in a whole crop, gamma V is taken at its limit, the crop's mean attention
    level = (total_a / belongs.sum(-1).clamp(min=1))[:, :, None] * belongs
    scaled = torch.where((total_v > 0)[:, :, None], gamma * spread[:, None], level).sum(1)
    return scaled + attention


def _quotas(weight: Tensor, sizes: Tensor, keep: int, mode: str) -> Tensor:
    """Split `keep` over crops [B, K] by `weight` into whole quotas of at most `sizes`, exactly.

    Every crop gets floor(share). What the floors leave over goes to the heaviest crop (paper) or
    one each to the heaviest crops (released). A crop that overflows gives its surplus to crops
    with room.
    """
    tiny = torch.finfo(torch.float32).tiny
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=tiny)
    weight = weight.clamp(min=tiny)
    heaviest = weight.argsort(dim=-1, descending=True, stable=True)
    quota = (weight * keep).floor().long()
    if mode == "released":
        missing = keep - quota.sum(-1, keepdim=True)
        place = heaviest.argsort(dim=-1)
        quota = quota + (place < missing)
    return _fill_up(_donate(weight, quota, sizes), sizes, keep, heaviest)


def _donate(weight: Tensor, quota: Tensor, sizes: Tensor) -> Tensor:
    """Cap quotas at `sizes`; give the surplus away in proportion to weight × room, repeatedly.

    Each round fills a crop or hands out all but less than one token per crop, so as many rounds
    as there are crops leave nothing that a further round could place.
    """
    surplus = (quota - sizes).clamp(min=0).sum(-1, keepdim=True)
    quota = quota.minimum(sizes)
    for _ in range(sizes.shape[-1]):
        pull = weight * (sizes - quota)
        part = pull / pull.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        larger = (quota + (surplus * part).floor().long()).minimum(sizes)
        surplus = surplus - (larger - quota).sum(-1, keepdim=True)
        quota = larger
    return quota


def _fill_up(quota: Tensor, sizes: Tensor, keep: int, heaviest: Tensor) -> Tensor:
    """Give what is missing from `keep` to the heaviest crop, and past its size to the next."""
    room = (sizes - quota).gather(1, heaviest)
    missing = keep - quota.sum(-1, keepdim=True)
    given = (missing - (room.cumsum(-1) - room)).clamp(min=0).minimum(room)
    return quota.scatter_add(1, heaviest, given)


def _best_per_crop(score: Tensor, crop_of: Tensor, quota: Tensor, keep: int) -> Tensor:
    """The tokens whose rank by score inside their crop is below the crop's quota, ascending."""
    by_score = score.argsort(dim=-1, descending=True, stable=True)
    by_crop = crop_of.gather(1, by_score).argsort(dim=-1, stable=True)
    order = by_score.gather(1, by_crop)  # crop by crop, best first
    crop = crop_of.gather(1, order)
    position = torch.arange(score.shape[1], device=score.device)
    counts = torch.zeros_like(quota).scatter_add(1, crop_of, torch.ones_like(crop_of))
    rank = position - (counts.cumsum(-1) - counts).gather(1, crop)
    chosen = torch.zeros_like(crop_of, dtype=torch.bool)
    chosen = chosen.scatter(1, order, rank < quota.gather(1, crop))
    # exactly `keep` are chosen: a stable sort brings them to the front in ascending order
    return chosen.long().argsort(dim=-1, descending=True, stable=True)[:, :keep]
