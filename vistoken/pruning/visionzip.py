"""VisionZip: the tokens that CLS attention highlights, and merged ones that stand for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vistoken.contract import ModelFacts, Selection, Signal, Stage, View
from vistoken.errors import MethodError
from vistoken.kernels import gather_tokens
from vistoken.method import option
from vistoken.pictures import Picture, plain
from vistoken.pruning._pruner import Pruner, apportion

MODES = ("mean", "released")


@dataclass(frozen=True, kw_only=True)
class VisionZip(Pruner):
    """Keep dominant tokens and merge the others into a few contextual ones, before the projector.

    Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR
    2025, arXiv 2412.04467. Dominant are the tokens of most CLS attention. Of the others, evenly
    strided ones are anchors, and each of the rest joins the anchor whose key (head mean, layer of
    the projected features) is closest in cosine; a contextual token is what the projector makes of
    the merged features. `contextual` is their share of the budget, rounded half up (10 of 64, 20
    of 128, 30 of 192, as in the paper), or as a whole number their count.

    `mean`, the default, merges an anchor and those that joined it into their average, which has
    the scale of the features that the projector was trained on. `released` is the official code:
    anchor plus the average of those that joined, with about twice the norm. An anchor that none
    joined stays what it is in both. Features are merged in fp32 and rounded once, to the dtype
    that the projector reads.

    Pictures of several tiles: each tile has its own dominant and contextual tokens, as the
    official code has it, with budgets in proportion to its tokens (largest remainder).

    Different from the official code: it counts the CLS token as one of the dominant tokens and
    gives it to the LLM, but these models drop it and never saw it in training, so here all
    dominant tokens are of the picture. It appends the contextual tokens at the end, here each
    takes the place of its anchor, so that the picture is still read in raster order; anchors are
    what the report lists. Its defects are not reproduced: newline tokens of tiled pictures are
    dropped silently (here: `newlines`), their padding is not removed before the choice, and all
    vision towers of the process are changed.
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "VisionZip, CVPR 2025, arXiv 2412.04467"
    tag: ClassVar[str] = "training-free"
    signals: ClassVar[frozenset[Signal]] = frozenset(
        {
            Signal.FEATURES,
            Signal.CLS_ATTENTION,
            Signal.VISION_KEYS,
            Signal.ENCODED,
            Signal.PROJECTOR,
        }
    )

    mode: str = option("mean", "how merged features are formed", choices=MODES)
    contextual: float = option(
        10 / 64, "contextual tokens: share of the budget (below 1), or their number", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.contextual, float) and self.contextual >= 1:
            raise MethodError(
                f"visionzip: contextual must be a share below 1 or a whole number of tokens, got "
                f"{self.contextual!r}."
            )

    def reads(self) -> frozenset[Signal]:
        """Without contextual tokens the CLS row is enough."""
        return self.signals if self.contextual else frozenset({Signal.CLS_ATTENTION})

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        """As every pruner, after a check that the contextual tokens fit the budget."""
        if self.keep is not None or not facts.tiled:  # else the budget depends on the picture
            split(self.keep or self.budget(facts.visual_tokens), self.contextual)
        return super().stages(facts)

    def select(self, view: View, keep: int) -> Selection:
        """Choose dominant tokens and anchors, merge the rest, project what was merged."""
        layout = tile_layout(_picture(view), keep, self.contextual).to(view.device)
        roles = choose(view.cls_attention, layout)
        picked = torch.where(roles.dominant | roles.anchor, layout.slots, view.tokens)
        indices = picked.flatten(1).sort(dim=-1).values[:, :keep]
        if not layout.most_anchors:
            return Selection(indices)
        keys = view.read(Signal.VISION_KEYS)[:, :, view.prefix :]
        group = assign(keys, roles, layout)
        merged = merge(view.read(Signal.ENCODED), roles, group, layout, self.mode)
        projected = view.read(Signal.PROJECTOR)(merged.flatten(1, 2))
        slot = layout.place[indices]
        row = layout.tile[:, None] * layout.most_anchors + group
        tokens = torch.where(
            roles.anchor.flatten(1).gather(1, slot)[..., None],
            gather_tokens(projected, row.flatten(1).gather(1, slot)),
            gather_tokens(view.features, indices),
        )
        return Selection(indices, tokens)


def split(keep: int, contextual: float) -> tuple[int, int]:
    """Return how many dominant and contextual tokens share a budget of `keep`.

    `contextual` is a share of `keep`, rounded half up, when it is a float, or the count itself.
    """
    merged = contextual
    if isinstance(contextual, float):
        merged = math.floor(contextual * keep + 0.5)
    if merged > keep:
        raise MethodError(
            f"visionzip: {merged} contextual tokens do not fit a budget of {keep}; give a smaller "
            "number, or a share of the budget."
        )
    return keep - int(merged), int(merged)


@dataclass(frozen=True, eq=False)  # a key of the cache below: equal is identical
class TileLayout:
    """Which tokens form which tile, and what each tile may keep.

    slots [T, M] int64: the tokens of each tile in raster order; empty slots, where `filled`
    [T, M] is False, repeat token 0. place [N] int64: the slot of each token, counted through all
    tiles. tile, dominant, anchors, stride [T] int64: the number of the tile, its dominant tokens,
    its anchors, and the distance of these among the tokens that are not dominant. in_order:
    whether the slots are the raster itself, so that nothing needs to be gathered.
    """

    slots: Tensor
    filled: Tensor
    place: Tensor
    tile: Tensor
    dominant: Tensor
    anchors: Tensor
    stride: Tensor
    most_anchors: int
    in_order: bool

    def to(self, device: torch.device) -> TileLayout:
        """The same on a device."""
        return _on_device(self, device)

    def arrange(self, values: Tensor) -> Tensor:
        """Arrange [I, N, ...] by tile: [I, T, M, ...]."""
        return values[:, None] if self.in_order else values[:, self.slots]


# Cached tensors must serve later calls that record gradients, hence not be inference tensors.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def tile_layout(picture: Picture, keep: int, contextual: float) -> TileLayout:
    """Share a budget of `keep` tokens among the tiles of a picture, in proportion to their size."""
    tile_of = picture.tile_of()
    sizes = tile_of.bincount()
    order = tile_of.argsort(stable=True)
    column = torch.arange(len(order), device="cpu") - (sizes.cumsum(0) - sizes)[tile_of[order]]
    slots = torch.zeros(len(sizes), int(sizes.max()), dtype=torch.long, device="cpu")
    filled = torch.zeros_like(slots, dtype=torch.bool)
    slots[tile_of[order], column] = order
    filled[tile_of[order], column] = True
    place = torch.zeros_like(order)
    place[order] = tile_of[order] * slots.shape[1] + column

    budgets = apportion(keep, sizes.tolist())
    merged = apportion(split(keep, contextual)[1], budgets)
    anchors = torch.tensor(merged, device="cpu")
    dominant = torch.tensor(budgets, device="cpu") - anchors
    stride = (sizes - dominant) // anchors.clamp(min=1)
    return TileLayout(
        slots,
        filled,
        place,
        torch.arange(len(sizes), device="cpu"),
        dominant,
        anchors,
        stride.clamp(min=1),
        max(merged),
        len(sizes) == 1,
    )


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _on_device(layout: TileLayout, device: torch.device) -> TileLayout:
    def move(values: Tensor) -> Tensor:
        return values.to(device, non_blocking=True)

    return TileLayout(
        move(layout.slots),
        move(layout.filled),
        move(layout.place),
        move(layout.tile),
        move(layout.dominant),
        move(layout.anchors),
        move(layout.stride),
        layout.most_anchors,
        layout.in_order,
    )


@dataclass(frozen=True)
class Roles:
    """What becomes of each token, by tile [I, T, M]: dominant, anchor, or else merged.

    number int64: of an anchor, which one of its tile it is. slots [I, T, A] int64: the column of
    each anchor in its tile; those past the tile's anchors are any.
    """

    dominant: Tensor
    anchor: Tensor
    number: Tensor
    slots: Tensor


def choose(cls_attention: Tensor, layout: TileLayout) -> Roles:
    """Take the largest `cls_attention` [I, N] of each tile, and anchors among the others."""
    # NaN cannot be refused without reading it back
    score = layout.arrange(cls_attention.float().nan_to_num(0.0, 0.0, 0.0))
    score = score.masked_fill(~layout.filled, -torch.inf)
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    dominant = rank < layout.dominant[:, None]
    rest = layout.filled & ~dominant
    position = rest.cumsum(-1) - 1
    number = position.div(layout.stride[:, None], rounding_mode="floor")
    anchor = rest & (number * layout.stride[:, None] == position)
    anchor = anchor & (number < layout.anchors[:, None])
    column = torch.arange(score.shape[-1], device=score.device)
    slots = torch.where(anchor, column, score.shape[-1] - 1).sort(dim=-1).values
    return Roles(dominant, anchor, number, slots[..., : layout.most_anchors])


def assign(keys: Tensor, roles: Roles, layout: TileLayout) -> Tensor:
    """Return for each token the anchor [I, T, M] int64 of its tile with the closest key.

    keys [I, H, N, D] in any floating dtype are averaged over heads and compared by cosine in
    fp32; ties go to the earlier anchor. An anchor belongs to itself.
    """
    with torch.autocast(keys.device.type, enabled=False):
        unit = layout.arrange(F.normalize(keys.mean(1, dtype=torch.float32), dim=-1))
        ends = unit.gather(2, roles.slots[..., None].expand(*roles.slots.shape, unit.shape[-1]))
        alike = unit @ ends.transpose(-1, -2)
    exists = torch.arange(layout.most_anchors, device=keys.device) < layout.anchors[:, None]
    closest = alike.masked_fill(~exists[:, None], -torch.inf).argmax(-1)
    return torch.where(roles.anchor, roles.number, closest)


def merge(encoded: Tensor, roles: Roles, group: Tensor, layout: TileLayout, mode: str) -> Tensor:
    """Return the features [I, T, A, E] of the contextual tokens, in the dtype of `encoded`.

    encoded [I, N, E]; `group` [I, T, M] as `assign` returns it. `mean`: average of an anchor and
    those that joined it; `released`: anchor plus average of those that joined. Merged in fp32.
    """
    joins = layout.filled & ~roles.dominant & ~roles.anchor
    numbers = torch.arange(layout.most_anchors, device=encoded.device)
    weight = ((group[..., None] == numbers) & joins[..., None]).float()
    with torch.autocast(encoded.device.type, enabled=False):
        features = layout.arrange(encoded.float())
        total = weight.transpose(-1, -2) @ features
    count = weight.sum(2)[..., None]
    own = features.gather(2, roles.slots[..., None].expand_as(total))
    if mode == "mean":
        return ((own + total) / (1 + count)).to(encoded.dtype)
    return (own + total / count.clamp(min=1)).to(encoded.dtype)


def _picture(view: View) -> Picture:
    """The picture as far as it is left; what lay in which tile must be known without its data."""
    if view.tokens == view.picture.tokens:
        return view.picture
    tiles = int(view.picture.tile_of()[-1]) + 1
    if tiles > 1:
        raise MethodError(
            f"visionzip gives each of a picture's {tiles} tiles its own budget, but an earlier "
            f"method left {view.tokens} of {view.picture.tokens} tokens; attach it alone."
        )
    return plain(1, view.tokens)
