"""VFlowOpt: one importance map from the vision tower steers pruning before and inside the LLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from vistoken.contract import ModelFacts, Place, Selection, Signal, Stage, View
from vistoken.errors import MethodError
from vistoken.kernels import gather_tokens
from vistoken.method import option
from vistoken.pictures import Picture
from vistoken.pruning._pruner import Pruner, top_indices

# budget: threshold t, cell side m, share r_v that leaves the projector, share r_1 of the first cut
PRESETS = {
    0.1: (39.26, 17.39, 0.1166, 1.0),
    0.25: (34.76, 15.58, 0.2651, 0.9833),
    0.5: (28.68, 11.76, 0.7233, 0.7487),
}
LAYERS, DEPTH = (9, 18), 28  # LLM layers before which the paper cuts, in its LLM of 28 layers
_QUERIES = 128  # rows of attention at a time; fixed, so that sums do not depend on the batch
_ELEMENTS = 2**24  # attention weights held at a time


@dataclass(frozen=True, kw_only=True)
class VFlowOpt(Pruner):
    """Prune after the projector with recycling, then twice inside the LLM, by one vision map.

    Yang et al., "VFlowOpt", ICCV 2025, arXiv 2508.05211. A token's importance is the attention it
    gets from the *global* tokens of its tile: those that receive more than `threshold` times the
    mean attention (see `importance`). After the projector the least important tokens are merged
    by grid cell (`recycle`); before LLM layers 9 and 18 of 28 (scaled to other depths) tokens
    are dropped by the same map, without a look at the LLM's attention.

    The budget is the **mean over the LLM's layers**: more than `keep` tokens enter the LLM and
    fewer leave it. The share of the last cut is solved from that, as in the paper. `None` options
    take the paper's tuned values for budgets of 10, 25 and 50 % and a line between them; below
    10 % the share that enters shrinks with the budget, above 50 % it grows to all.

    Deviations: positions have one policy, and by default tokens keep those of the full prompt,
    where the paper closes the gaps after the projector. Newline tokens are the host's, not
    candidates of importance 1. The entropy of pixels is left out: its weight is 0 in all presets.
    Towers with a CLS token show their map without it, renormalised over the tokens that remain.

    Official defects that are not reproduced: no token above the threshold makes the map NaN (here
    all tokens then count as global); about, not exactly, the intended number of tokens enters the
    LLM (here exactly); the map goes to the LLM through an environment variable; the start of
    the image is fixed at position 14; several pictures are not recycled.
    """

    name: ClassVar[str] = "vflowopt"
    paper: ClassVar[str] = "VFlowOpt, ICCV 2025, arXiv 2508.05211"
    tag: ClassVar[str] = "training-free"
    numbering: ClassVar[str] = "original"
    places: ClassVar[frozenset[Place]] = frozenset({Place.PROJECTED, Place.LLM_LAYER})
    signals: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.FEATURES, Signal.VISION_QUERIES, Signal.VISION_KEYS}
    )

    threshold: float | None = option(
        None, "attention received by global tokens, in means", minimum=0
    )
    cell: float | None = option(None, "side of the cells that are merged, in tokens", minimum=1)
    recycle: bool = option(True, "merge what leaves after the projector instead of dropping it")
    projected_share: float | None = option(
        None, "share of the tokens that enters the LLM", minimum=0, maximum=1
    )
    first_share: float | None = option(
        None, "share of them that passes the first cut in the LLM", minimum=0, maximum=1
    )
    first_layer: int = option(
        0, "LLM layer before which the first cut is; 0: the paper's, scaled", minimum=0
    )
    second_layer: int = option(0, "the same for the second cut", minimum=0)

    def reads(self) -> frozenset[Signal]:
        """Without recycling no features are needed."""
        return self.signals if self.recycle else self.signals - {Signal.FEATURES}

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        """After the projector, and after the LLM layer before each cut, where nothing is read."""
        budget = self.budget(facts.visual_tokens)
        if budget < facts.visual_tokens:
            self._counts(facts.visual_tokens, budget, facts)
        first = Stage(Place.PROJECTED, None, self.reads())
        return (first, *(Stage(Place.LLM_LAYER, layer - 1) for layer in self.cuts(facts)))

    def cuts(self, facts: ModelFacts) -> tuple[int, ...]:
        """LLM layers before which tokens are dropped: two; by default fewer in a shallow LLM."""
        depth, least = facts.text_layers, facts.first_text_stage + 1
        for name in ("first_layer", "second_layer"):
            given = getattr(self, name)
            if given and not least <= given < depth:
                raise MethodError(
                    f"vflowopt: {name} must be from {least} to {depth - 1} in this model of "
                    f"{depth} LLM layers, or 0 for the paper's, got {given}."
                )
        first, second = (math.floor(layer * depth / DEPTH + 0.5) for layer in LAYERS)
        if self.second_layer:
            first = min(first, self.second_layer - 1)
        first = self.first_layer or max(first, least)
        second = self.second_layer or max(second, first + 1)
        if second <= first:
            raise MethodError(
                f"vflowopt: second_layer must come after first_layer, got {second} and {first}."
            )
        return tuple(layer for layer in (first, second) if layer < depth)

    def survivors(self, tokens: int, keep: int, facts: ModelFacts) -> int:
        """Tokens after the last cut; `keep` is what the LLM's layers see on average."""
        return self._counts(tokens, keep, facts)[-1] if keep < tokens else tokens

    def _counts(self, tokens: int, keep: int, facts: ModelFacts) -> tuple[int, ...]:
        """Tokens after each stage; shares that were given and cannot be met are refused."""
        edges = (0, *self.cuts(facts), facts.text_layers)
        lengths = [after - before for before, after in zip(edges, edges[1:], strict=False)]
        given = {"projected_share": self.projected_share, "first_share": self.first_share}
        tuned = zip(given.values(), preset(keep / tokens)[2:], strict=True)
        shares = [tune if own is None else own for own, tune in tuned]
        counts = stage_counts(tokens, keep, lengths, shares[: len(lengths) - 1])
        for i, (name, own) in enumerate(given.items()):
            solved = i >= len(lengths) - 1
            if own is not None and (solved or counts[i] != _share((tokens, *counts)[i], own)):
                raise MethodError(
                    f"vflowopt: {name}={own!r} does not fit: an average of {keep} of {tokens} "
                    f"tokens over {facts.text_layers} LLM layers, with cuts before {edges[1:-1]}, "
                    f"is met by {counts} tokens; change it, or leave it out."
                )
        return counts

    def select(self, view: View, keep: int) -> Selection | None:
        """Merge or drop by the map, which is made at the first stage and kept in the memory."""
        memory, step = view.memory, 0
        if view.stage.place is Place.PROJECTED:
            memory["counts"] = self._counts(view.picture.tokens, keep, view.facts)
            memory["importance"] = self._importance(view, keep)
        else:
            assert view.stage.layer is not None  # an LLM stage; for the type checker
            step = 1 + self.cuts(view.facts).index(view.stage.layer + 1)
        count = memory["counts"][step]
        if count >= view.tokens:
            return None
        scores = memory["importance"].gather(1, view.origin)
        if step or not self.recycle:
            return Selection(top_indices(scores, count))
        side = preset(keep / view.picture.tokens)[1] if self.cell is None else self.cell
        cell, number = cell_numbers(view.picture, float(side), view.device)
        return Selection(*recycle(view.features, scores, count, cell[view.origin], number))

    def _importance(self, view: View, keep: int) -> Tensor:
        """The map [I, tokens] over all tokens of the picture; zero for those that have left."""
        scale, total = view.facts.vision.head_dim**-0.5, view.picture.tokens
        threshold = preset(keep / total)[0] if self.threshold is None else self.threshold
        queries, keys = view.read(Signal.VISION_QUERIES), view.read(Signal.VISION_KEYS)
        tiles: Picture | None = view.picture
        if view.tokens < total:
            if int(view.picture.tile_of()[-1]) > 0:
                raise MethodError(
                    f"vflowopt: needs all {total} tokens of a tiled picture, but an earlier "
                    f"method left {view.tokens}; use it alone."
                )
            tiles = None  # one tile: attention among the tokens that are left
        found = importance(queries, keys, threshold, scale, tiles=tiles, prefix=view.prefix)
        return found.new_zeros(view.images, total).scatter(1, view.origin, found)


def preset(budget: float) -> tuple[float, float, float, float]:
    """Return threshold, cell side and the shares r_v and r_1 for a budget, 0 < budget <= 1.

    The paper's at 0.1, 0.25 and 0.5, linear between; threshold and cell stay constant outside;
    r_v is proportional to the budget below 0.1; both shares reach 1 at 1.
    """
    if not 0 < budget <= 1:
        raise MethodError(f"vflowopt: a budget must be above 0 and at most 1, got {budget!r}.")
    least, most = PRESETS[min(PRESETS)], PRESETS[max(PRESETS)]
    known = {0.0: (*least[:2], 0.0, 1.0), **PRESETS, 1.0: (*most[:2], 1.0, 1.0)}
    above = min(b for b in known if b >= budget)
    below = max(b for b in known if b < budget)
    part = (budget - below) / (above - below)
    t, m, r_v, r_1 = (
        a * (1 - part) + b * part for a, b in zip(known[below], known[above], strict=True)
    )
    return t, m, r_v, r_1


def stage_counts(
    tokens: int, keep: int, lengths: Sequence[int], shares: Sequence[float]
) -> tuple[int, ...]:
    """Return how many tokens run through each block of layers so that a layer sees `keep`.

    lengths: layers of each block; shares: of the tokens before, what enters each block but the
    last, which takes what the budget leaves. Counts never rise and are at least 1; their mean
    over the layers is at most `keep`, by less than one token. A share that the budget cannot meet
    is moved to the nearest that it can.
    """
    if not 1 <= keep <= tokens or len(shares) != len(lengths) - 1 or min(lengths) < 1:
        raise MethodError(
            f"vflowopt: needs 1 <= keep <= tokens, blocks of layers and a share for each but the "
            f"last; got keep={keep}, tokens={tokens}, lengths={lengths!r}, shares={shares!r}."
        )
    left, rest, before = keep * sum(lengths), sum(lengths), tokens
    counts = []
    for length, share in zip(lengths, (*shares, 0.0), strict=True):
        least = -(-left // rest)  # later blocks have no more, so less would waste budget
        rest -= length
        most = (left - rest) // length  # later blocks have at least one each
        before = max(1, min(max(_share(before, share), least), most, before))
        left -= length * before
        counts.append(before)
    return tuple(counts)


def _share(tokens: int, share: float) -> int:
    return math.floor(tokens * share + 0.5)


@torch.no_grad()
def importance(
    queries: Tensor,
    keys: Tensor,
    threshold: float,
    scale: float,
    *,
    tiles: Picture | None = None,
    prefix: int = 0,
) -> Tensor:
    """Return the importance map [I, N] fp32 of the tokens of each picture.

    queries, keys [I, H, prefix + N, D] of one vision layer. With A the head-mean attention inside
    a tile, a token receives r = the mean of its column; tokens with r > threshold * mean(r) are
    global, or all if none is; importance is the mean of A's rows over the global tokens: it sums
    to 1 in every tile, less what the prefix, which every tile reads, takes. `tiles` says which
    tokens form a tile (None: all). A is never held: it is summed over blocks of queries, twice;
    the map carries no gradient.
    """
    total = queries.shape[2] - prefix
    if keys.shape != queries.shape or total != (total if tiles is None else tiles.tokens):
        raise MethodError(
            f"vflowopt: queries {list(queries.shape)} and keys {list(keys.shape)} must agree and "
            f"hold a prefix of {prefix} and every token of {tiles or 'the picture'}."
        )
    slots, filled, place = tile_slots(tiles, total, queries.device)

    def split(x: Tensor) -> Tensor:
        own = x[:, :, prefix:]
        return own if len(slots) == 1 else own[:, :, slots].transpose(1, 2).flatten(0, 1)

    weights = filled.repeat(len(queries), 1).float()
    shared = keys[:, :, :prefix].repeat_interleave(len(slots), 0)
    tensors = split(queries), split(keys), shared, weights
    received = _mean_rows(*tensors, weights, scale) * weights
    mean = received.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    chosen = (received > threshold * mean).float() * weights
    chosen = torch.where(chosen.any(-1, keepdim=True), chosen, weights)
    found = _mean_rows(*tensors, chosen, scale).nan_to_num(0.0, 0.0, 0.0)  # NaN has no rank
    return found.view(len(queries), slots.numel())[:, place]


def _mean_rows(
    queries: Tensor, keys: Tensor, prefix: Tensor, shown: Tensor, chosen: Tensor, scale: float
) -> Tensor:
    """The mean [R, M] fp32 of the chosen rows of head-mean attention, in R tiles.

    queries, keys [R, H, M, D]; prefix [R, H, P, D] keys whose columns are left out; shown, chosen
    [R, M] are 1 for keys that exist and for rows that count, else 0.
    """
    _, heads, width, _ = queries.shape
    step = max(1, _ELEMENTS // (heads * min(_QUERIES, width) * width))
    found = []
    with torch.autocast(queries.device.type, enabled=False):
        bias = torch.where(shown > 0, 0.0, torch.finfo(torch.float32).min)
        bias = torch.nn.functional.pad(bias, (prefix.shape[2], 0))[:, None, None]
        chosen = chosen / chosen.sum(-1, keepdim=True)
        for i in range(0, len(queries), step):
            every = torch.cat((prefix[i : i + step], keys[i : i + step]), 2).float().mT
            total = torch.zeros_like(chosen[i : i + step])
            for first in range(0, width, _QUERIES):
                block = slice(i, i + step), slice(None), slice(first, first + _QUERIES)
                logits = (queries[block].float() * scale) @ every
                shares = logits.add_(bias[i : i + step]).softmax(-1)[..., prefix.shape[2] :]
                weight = chosen[i : i + step, None, None, first : first + _QUERIES]
                total = total + (weight @ shares)[:, :, 0].mean(1)
            found.append(total)
    return torch.cat(found)


def recycle(
    tokens: Tensor, importance: Tensor, keep: int, cell: Tensor, cells: int
) -> tuple[Tensor, Tensor]:
    """Return indices [B, keep], ascending, and the tokens [B, keep, C] that stand there.

    tokens [B, N, C]; importance [B, N] non-negative; cell [B, N] or [N] int64 below `cells`. The
    most important tokens stay as they are; the rest is grouped by cell, and the
    importance-weighted mean of a group (computed in fp32) takes the place of its most important
    member. Ties in importance go to the lower index.

    The paper groups the R + M least important tokens, with R = N - keep and M a guess of how many
    groups there will be, so that about `keep` remain. Here M is the number of groups itself:
    dropping one more token makes at most one more group, so there is always an M for which
    exactly `keep` remain, and where there are two the result is the same. With fewer than `cells`
    tokens to keep, the most important ones stay and nothing is merged.
    """
    batch, total = importance.shape
    if tokens.shape[:2] != importance.shape or cell.shape[-1] != total or not 1 <= keep <= total:
        raise MethodError(
            f"vflowopt: tokens {list(tokens.shape)}, importance {list(importance.shape)} and cell "
            f"{list(cell.shape)} must agree, and keep be from 1 to {total}, got {keep}."
        )
    if keep < cells:
        picks = top_indices(importance, keep)
        return picks, gather_tokens(tokens, picks)
    rank = importance.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    member = cell.expand(batch, total)[:, None] == torch.arange(cells, device=cell.device)[:, None]
    worst = torch.where(member, rank[:, None], -1).amax(-1)  # [B, cells]; -1 of an empty cell
    groups = (worst[:, None] >= torch.arange(total, device=rank.device)[:, None]).sum(-1)
    # with the u best untouched, u + groups[u] tokens stay: a count that rises by 0 or 1 with u
    staying = torch.arange(total, device=rank.device) + groups
    untouched = (staying < keep).sum(-1, keepdim=True)
    grouped = member & (rank >= untouched)[:, None]  # [B, cells, N]
    leader = torch.where(grouped, rank[:, None], total).amin(-1)
    leads = (grouped & (rank[:, None] == leader[..., None])).any(1)
    picks = top_indices((leads | (rank < untouched)).to(torch.uint8), keep)
    weight = torch.where(grouped, importance.float()[:, None], 0.0)
    weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, grouped.float())
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    home = cell.expand(batch, total).gather(1, picks)
    merged = gather_tokens(_weigh(weight, tokens), home)
    return picks, torch.where(
        leads.gather(1, picks)[..., None], merged, gather_tokens(tokens, picks)
    )


def _weigh(weight: Tensor, tokens: Tensor) -> Tensor:
    """weight [B, K, N] @ tokens [B, N, C] in fp32, some columns at a time, in the tokens' dtype."""
    step = max(1, _ELEMENTS // (tokens.shape[0] * tokens.shape[1]))
    with torch.autocast(tokens.device.type, enabled=False):
        parts = [(weight @ part.float()).to(tokens.dtype) for part in tokens.split(step, -1)]
    return torch.cat(parts, -1)


# Cached tensors must serve later calls that record gradients, hence not be inference tensors.
@lru_cache(maxsize=256)
@torch.inference_mode(False)
def cell_numbers(picture: Picture, side: float, device: torch.device) -> tuple[Tensor, int]:
    """Return for each token the number of its cell, [N] int64, and how many cells there are.

    Cells are floor(row / side), floor(column / side) in each raster of the picture.
    """
    found, first = [], 0
    for part in picture.parts:
        row, column = (
            torch.tensor([int(i // side) for i in range(length)], dtype=torch.long, device="cpu")
            for length in part.grid
        )
        if not part.tokens:  # all of it padding
            continue
        across = int(column[-1]) + 1
        found.append((first + row[:, None] * across + column).flatten())
        first += (int(row[-1]) + 1) * across
    return torch.cat(found).to(device, non_blocking=True), first


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def tile_slots(
    picture: Picture | None, total: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return slots [T, M] (the tokens of each tile), whether each is filled, and [N] its inverse.

    Empty slots repeat token 0; a token's place counts through the flattened slots.
    """
    index = torch.arange(total, device="cpu")
    tile = torch.zeros_like(index) if picture is None else picture.tile_of()
    _, tile, sizes = tile.unique(return_inverse=True, return_counts=True)
    order = tile.argsort(stable=True)
    within = index - (sizes.cumsum(0) - sizes)[tile[order]]
    slots = torch.zeros(len(sizes), int(sizes.max()), dtype=torch.long, device="cpu")
    filled = torch.zeros_like(slots, dtype=torch.bool)
    slots[tile[order], within] = order
    filled[tile[order], within] = True
    place = torch.empty_like(index)
    place[order] = tile[order] * slots.shape[1] + within
    slots, filled, place = (x.to(device, non_blocking=True) for x in (slots, filled, place))
    return slots, filled, place
