"""Pyramid token pruning: a budget for every tile by its saliency, the best tokens within it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from vistoken.contract import ModelFacts, Place, Selection, Signal, Stage, View
from vistoken.errors import MethodError
from vistoken.kernels import split_quota
from vistoken.method import option
from vistoken.pictures import Picture
from vistoken.pruning._pruner import Pruner

SALIENCIES = ("overview", "received")
RANGES = ("picture", "tile")
THUMBNAILS = ("auto", "first", "last", "none")
LAYER = 2  # the LLM layer whose attention guides the selection


@dataclass(frozen=True, kw_only=True)
class Pyramid(Pruner):
    """Share the budget among tiles by saliency; in each, keep what the tower and the text look at.

    Pyramid Token Pruning (PTP), Liang et al., arXiv 2509.15704. Three levels: a tile gets tokens
    in proportion to its saliency; its tokens are ranked by CLS attention b; after LLM layer 2, by
    (1 - alpha) b + alpha c with c the largest head-mean attention from a text token, b and c
    scaled to [0, 1]. With alpha = 0 everything happens before the LLM, which then needs no pass.

    There is no official code, and of the paper no complete description was at hand. Its open
    choices are options. `saliency`: of a tile, the CLS attention of the overview inside the
    tile's footprint (`overview`), or the attention of the tile's own CLS token that stays on its
    patches (`received`, also where a picture has no overview with one raster of tiles behind it);
    the latter is nearly the same for all tiles. The overview itself, the first raster of a picture
    with several, weighs as much as an average tile and is never emptied. `tile_minimum` tokens
    stay in every tile as far as the budget goes around. `scaled_over`: whether b and c are
    scaled over the picture or within each tile. The frames of a video are its tiles; a picture
    without tiles is one tile. Tokens keep their positions.
    """

    name: ClassVar[str] = "pyramid"
    paper: ClassVar[str] = "Pyramid Token Pruning, arXiv 2509.15704"
    tag: ClassVar[str] = "experimental"
    numbering: ClassVar[str] = "original"
    places: ClassVar[frozenset[Place]] = frozenset({Place.PROJECTED, Place.LLM_LAYER})
    signals: ClassVar[frozenset[Signal]] = frozenset({Signal.CLS_ATTENTION, Signal.LLM_ATTENTION})

    alpha: float = option(0.5, "weight of the text's attention", minimum=0, maximum=1)
    saliency: str = option("overview", "what makes a tile salient", choices=SALIENCIES)
    thumbnail: str = option("auto", "which raster shows the whole picture", choices=THUMBNAILS)
    tile_minimum: int = option(0, "tokens that stay in every tile", minimum=0)
    scaled_over: str = option("picture", "where attention is scaled to [0, 1]", choices=RANGES)
    layer: int | None = option(
        None, "LLM layer whose attention guides; None: 2, earlier in a shallow LLM", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None and not isinstance(self.layer, int):
            raise MethodError(f"pyramid: layer must be a whole number, got {self.layer!r}.")

    def reads(self) -> frozenset[Signal]:
        """Without guidance by the text the LLM is not looked at."""
        return self.signals if self.alpha > 0 else frozenset({Signal.CLS_ATTENTION})

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        """After the projector, where alpha > 0 only notes the attention, then in the LLM."""
        first = Stage(Place.PROJECTED, None, frozenset({Signal.CLS_ATTENTION}))
        if self.alpha == 0:
            return (first,)
        layer = self.guiding_layer(facts)
        return (first, Stage(Place.LLM_LAYER, layer, frozenset({Signal.LLM_ATTENTION})))

    def guiding_layer(self, facts: ModelFacts) -> int:
        """The LLM layer after which tokens are dropped."""
        first, last = facts.first_text_stage, facts.text_layers - 2
        layer = min(max(LAYER, first), last) if self.layer is None else self.layer
        if not first <= layer <= last:
            raise MethodError(
                f"pyramid: layer must be from {first} to {last} in this model of "
                f"{facts.text_layers} LLM layers, got {layer}; alpha=0 needs none."
            )
        return layer

    def select(self, view: View, keep: int) -> Selection | None:
        """Choose before the LLM, or note the CLS attention there and choose inside it."""
        memory = view.memory
        if view.stage.place is Place.PROJECTED:
            attention = view.cls_attention.float()
            total = attention.new_zeros(view.images, view.picture.tokens)
            memory["attention"] = total.scatter(1, view.origin, attention.nan_to_num(0.0, 0.0, 0.0))
            if self.alpha > 0:
                return None
        attention = memory["attention"]
        tiles = tile_layout(view.picture, view.device, self.thumbnail)
        if view.tokens < view.picture.tokens:
            if len(tiles.sizes) > 1:
                raise MethodError(
                    f"pyramid: needs all {view.picture.tokens} tokens of a tiled picture, but an "
                    f"earlier method left {view.tokens}; use it alone."
                )
            attention = attention.gather(1, view.origin)
            tiles = single_tile(view.tokens, view.device)
        scores = attention
        if self.alpha > 0:
            guide = text_guidance(view.language.text_attention, view.language.text_mask)
            over = tiles if self.scaled_over == "tile" else single_tile(view.tokens, view.device)
            scores = fuse(attention, guide, self.alpha, over)
        quota = tile_quotas(
            attention, tiles, keep, saliency=self.saliency, minimum=self.tile_minimum
        )
        return Selection(best_per_group(scores, tiles.group, tiles.sizes, quota, keep))


@dataclass(frozen=True, eq=False)
class TileLayout:
    """Which token lies in which tile, and where the tiles lie on the overview.

    group [N] int64 tile of each token; members [G, N] fp64, 1 for a tile's tokens; sizes [G]
    int64 and counts, the same as numbers; overview: the tile that shows the whole picture, if any;
    footprint [G, N] fp64: the share of each token of the overview that each tile covers, or None
    where that is not known.
    """

    group: Tensor
    members: Tensor
    sizes: Tensor
    counts: tuple[int, ...]
    overview: int | None
    footprint: Tensor | None


# Cached tensors must serve later calls that record gradients, hence not be inference tensors.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def tile_layout(picture: Picture, device: torch.device, thumbnail: str = "auto") -> TileLayout:
    """The tiles of a picture on a device; tiles that are all padding count, and hold no token."""
    if thumbnail not in THUMBNAILS:
        raise MethodError(f"pyramid: thumbnail must be one of {THUMBNAILS}, got {thumbnail!r}.")
    tiles = [len(part.row_bands) * len(part.column_strips) for part in picture.parts]
    group, total = picture.tile_of(), sum(tiles)
    if thumbnail == "auto":
        thumbnail = "first" if len(tiles) == 2 else "last"
    place = -1 if thumbnail == "last" else 0
    shows_all = picture.parts[place]
    several = picture.kind == "image" and len(tiles) > 1 and thumbnail != "none"
    if not several or tiles[place] != 1 or not shows_all.tokens:
        return _layout(group, total, None, None, device)
    footprint = None
    others = picture.parts[1 + place]  # all of them, if there are two
    if len(tiles) == 2 and others.tokens:
        rows, columns = shows_all.grid
        down = _overlap(others.row_bands, rows)[:, None, :, None]
        across = _overlap(others.column_strips, columns)[None, :, None, :]
        first = others.tokens if place else 0
        footprint = torch.zeros(total, picture.tokens, dtype=torch.float64, device="cpu")
        its_tiles = footprint[:-1] if place else footprint[1:]
        its_tiles[:, first : first + shows_all.tokens] = (down * across).flatten(0, 1).flatten(1)
    overview = total - 1 if place else 0
    return _layout(group, total, overview, footprint, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def single_tile(tokens: int, device: torch.device) -> TileLayout:
    """All tokens in one tile."""
    return _layout(torch.zeros(tokens, dtype=torch.long, device="cpu"), 1, None, None, device)


def _layout(
    group: Tensor, tiles: int, overview: int | None, footprint: Tensor | None, device: torch.device
) -> TileLayout:
    members = (group == torch.arange(tiles, device="cpu")[:, None]).double()
    sizes = group.bincount(minlength=tiles)
    counts = tuple(int(size) for size in sizes)
    if footprint is not None:
        footprint = footprint.to(device, non_blocking=True)
    group, members, sizes = (x.to(device, non_blocking=True) for x in (group, members, sizes))
    return TileLayout(group, members, sizes, counts, overview, footprint)


def _overlap(lengths: tuple[int, ...], cells: int) -> Tensor:
    """[len(lengths), cells] fp64: the share of each of `cells` equal cells that a stretch covers.

    The stretches have these lengths and together are as long as all cells.
    """
    ends = torch.tensor(lengths, dtype=torch.float64, device="cpu").cumsum(0) / sum(lengths) * cells
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    edge = torch.arange(cells, dtype=torch.float64, device="cpu")
    inside = torch.minimum(ends[:, None], edge + 1) - torch.maximum(starts[:, None], edge)
    return inside.clamp(min=0)


def tile_quotas(
    attention: Tensor, tiles: TileLayout, keep: int, *, saliency: str = "overview", minimum: int = 0
) -> Tensor:
    """Return how many tokens each tile keeps, [I, G] int64; rows sum to `keep`.

    attention [I, N] CLS attention, non-negative. Every tile keeps `minimum` tokens (or all it
    has, or an equal part of `keep` if that is less), an overview at least one; the rest of `keep`
    is split in proportion to saliency by `vistoken.kernels.split_quota`, within tile sizes.
    """
    if saliency not in SALIENCIES or attention.shape[-1] != sum(tiles.counts):
        raise MethodError(
            f"pyramid: saliency must be one of {SALIENCIES} and attention hold "
            f"{sum(tiles.counts)} tokens, got {saliency!r} and {list(attention.shape)}."
        )
    if not 1 <= keep <= sum(tiles.counts) or minimum < 0:
        raise MethodError(
            f"pyramid: keep must be from 1 to {sum(tiles.counts)} and minimum at least 0, got "
            f"{keep} and {minimum}."
        )
    each = min(minimum, keep // len(tiles.counts))
    least = [min(each, size) for size in tiles.counts]
    if tiles.overview is not None:
        least[tiles.overview] = max(least[tiles.overview], 1)
    weights = tile_saliency(attention, tiles, saliency)
    reserved, room = _rooms(tuple(least), tiles.counts, attention.device)
    return reserved + split_quota(weights, room, keep - sum(least))


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _rooms(
    least: tuple[int, ...], counts: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    reserved, sizes = (torch.tensor(x, dtype=torch.long, device="cpu") for x in (least, counts))
    return reserved.to(device, non_blocking=True), (sizes - reserved).to(device, non_blocking=True)


def tile_saliency(attention: Tensor, tiles: TileLayout, saliency: str = "overview") -> Tensor:
    """Return the weight [I, G] fp32 of every tile; an overview weighs the mean of the others."""
    # fp64, so that a picture's weights do not depend on how its batch is summed
    attention = attention.double()
    footprint = tiles.footprint if saliency == "overview" else None
    weights = attention @ (tiles.members if footprint is None else footprint).T
    if tiles.overview is not None:
        mine = torch.arange(len(tiles.counts), device=attention.device) == tiles.overview
        filled = sum(size > 0 for size in tiles.counts) - 1
        mean = weights.masked_fill(mine, 0).sum(-1, keepdim=True) / max(1, filled)
        weights = torch.where(mine, mean, weights)
    return weights.float()


def text_guidance(text_attention: Tensor, text_mask: Tensor) -> Tensor:
    """Return c_j = max over text tokens of the head-mean attention to visual token j, [I, N].

    text_attention [I, H, T, N] probabilities over all keys; text_mask [I, T] bool, False where
    padded.
    """
    if text_mask.shape != (text_attention.shape[0], text_attention.shape[2]):
        raise MethodError(
            f"pyramid: text_attention {list(text_attention.shape)} and text_mask "
            f"{list(text_mask.shape)} must agree in pictures and text tokens."
        )
    mean = text_attention.float().mean(1).nan_to_num(0.0, 0.0, 0.0)
    return mean.masked_fill(~text_mask[..., None], 0.0).amax(1)


def fuse(attention: Tensor, guidance: Tensor, alpha: float, over: TileLayout) -> Tensor:
    """Return (1 - alpha) b + alpha c [I, N] with attention and guidance scaled to [0, 1].

    The least value in each tile of `over` becomes 0 and the largest 1; equal values become 0.
    """
    if attention.shape != guidance.shape or not 0 <= alpha <= 1:
        raise MethodError(
            f"pyramid: attention {list(attention.shape)} and guidance {list(guidance.shape)} must "
            f"agree and alpha be from 0 to 1, got {alpha!r}."
        )
    return (1 - alpha) * _scaled(attention, over) + alpha * _scaled(guidance, over)


def _scaled(values: Tensor, over: TileLayout) -> Tensor:
    values = values.float()
    inside = over.members[None] > 0
    low = torch.where(inside, values[:, None], torch.inf).amin(-1)[:, over.group]
    high = torch.where(inside, values[:, None], -torch.inf).amax(-1)[:, over.group]
    return (values - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)


def best_per_group(
    scores: Tensor, group: Tensor, sizes: Tensor, quota: Tensor, keep: int
) -> Tensor:
    """Return the indices [I, keep], ascending, of the `quota` best tokens of every group.

    scores [I, N]; group [N] int64 below G; sizes [G] tokens of each group; quota [I, G], rows of
    which sum to `keep`, at most `sizes`. Ties go to the lower index. Never waits for the device.
    """
    tokens = scores.shape[-1]
    if group.shape != (tokens,) or quota.shape[-1:] != sizes.shape or not 1 <= keep <= tokens:
        raise MethodError(
            f"pyramid: scores {list(scores.shape)} and group {list(group.shape)} must agree, so "
            f"must quota {list(quota.shape)} and sizes {list(sizes.shape)}, and keep be from 1 to "
            f"{tokens}, got {keep}."
        )
    best = scores.argsort(dim=-1, descending=True, stable=True)
    order = best.gather(-1, group[best].argsort(dim=-1, stable=True))  # by group, then by score
    groups = group.sort(stable=True).values
    rank = torch.arange(tokens, device=scores.device) - (sizes.cumsum(0) - sizes)[groups]
    # picks carry their index, the rest a number past every token: sorting leaves the picks first
    picked = torch.where(rank < quota[:, groups], order, tokens)
    return picked.sort(dim=-1).values[:, :keep]
