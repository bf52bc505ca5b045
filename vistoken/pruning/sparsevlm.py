"""SparseVLM: stages inside the LLM that keep the tokens which the relevant words attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vistoken.contract import ModelFacts, Place, Selection, Signal, Stage, View
from vistoken.errors import MethodError
from vistoken.kernels import gather_tokens
from vistoken.method import option
from vistoken.pruning._pruner import Pruner, top_indices
from vistoken.pruning._sparsevlm import recycled, schedule, stage_layers

MODES = ("v1.5", "v2", "rank")
OWN_OPTIONS = {"heads": "v2", "scale": "rank", "bias": "rank"}
GRAVITY_FLOOR = 0.1  # of the gravity at distance 0
SLACK = 1e-6  # relevances this close to the mean, relatively, are equal to it but for rounding


@dataclass(frozen=True, kw_only=True)
class SparseVLM(Pruner):
    """Text-guided pruning in stages inside the LLM, with recycling of what is pruned.

    Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
    Inference", ICML 2025, arXiv 2410.04417. Text tokens whose embeddings match the picture better
    than the average ("raters") are found once; after LLM layers 2, 6 and 15 of 32 the visual
    tokens stay that the raters attend to most.

    `v1.5`, the default, is the code of the ICML results: fixed counts per stage, attention
    averaged over the heads, and recycling: the best 30 % of the pruned tokens are clustered by
    density peaks and a tenth as many cluster means stay. It is the default because its accuracy
    is published and was repeated by others, because recycling helps most where budgets are small
    (POPE 72.8 to 77.5 at 64 tokens), and because for `v2` no accuracy was published. `v2`
    (SparseVLM+): attention divided by the recency bias of the rotary positions ("gravity"), only
    the `heads` heads that look at the picture most, no recycling, positions kept. `rank` is the
    first release, some 2 points of GQA and POPE behind v1.5 at 192 tokens: after layers 2, 6, 15
    and 19 int(rank * `scale` + `bias`) tokens stay, the rank being that of the raters' attention
    to the picture; with recycling.

    Budget: in `v1.5` and `v2`, `keep` is the average number of visual tokens per LLM layer as the
    official code counts, which credits the layer of a stage with the tokens that leave it; the
    report shows what enters each layer (206.5 for 192, 82.3 for 64), and the last stage leaves
    fewer than `keep`. The official tables hold for 576 tokens and 32 layers; other budgets, token
    counts and depths are an extension, see `schedule`. In a deep model no average can be had that
    is far below the smallest of the tables, as the layers up to the first stage see every token:
    there the counts of the stages shrink in proportion, and the average is larger than `keep` (52
    for 32).
    In `rank` the ranks set the counts and no average can be promised: the budget caps what the
    last stage leaves (but for one token by score and the recycled ones). The presets of the
    official README are scale 13.5, bias 0 ("192", MME), 9 and 6 ("128", POPE), 0.8 and 0 ("64",
    TextVQA); they depend on the length of the prompts. This mode reads the rank back to the CPU
    once per stage, and pictures that are chosen from together all keep as many tokens as the one
    of largest rank, so there the picks of a picture may depend on the others in the batch.

    Deviations. A merged token takes the place of its cluster's centre in reading order; officially
    merged tokens follow all others. (Positions are renumbered, so only the order differs.)
    Positions `auto` mean renumbered in `v1.5` and `rank`, original in `v2`. Every picture is
    scored by itself, with the raters among the text behind the row's last picture, also where a
    row has several (the official code prunes the first only). Gravity is clamped to a tenth of
    its value at distance 0: from distance 1,707 on it is negative for a base of 10,000, which
    the 2,880 tokens of a tiled picture reach. Heads are chosen per picture, not from the first of
    the batch; 14, half the heads of a 28-head model, is the official number for every model, and
    half the model's heads the natural alternative. Equal scores go to the earlier token.
    Where the paper differs from the code (merging by sum; the k nearest neighbours of the density)
    this follows the code.

    Official defects that are not reproduced: a text without raters (one token, or all alike) gives
    NaN (here all text tokens rate); softmax and scores in half precision (here fp32); noise
    from the global generator against ties in density (here the earlier token is the denser); one
    token is pruned even when the budget keeps all; batches, padding, second pictures and sampling
    fail; full attention maps are materialised.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "SparseVLM, ICML 2025, arXiv 2410.04417"
    tag: ClassVar[str] = "training-free"
    places: ClassVar[frozenset[Place]] = frozenset({Place.PROJECTED, Place.LLM_LAYER})
    signals: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.FEATURES, Signal.TEXT_EMBEDDINGS, Signal.HIDDEN, Signal.LLM_ATTENTION}
    )

    mode: str = option("v1.5", "which version of the method", choices=MODES)
    heads: int = option(14, "mode v2: attention heads that score", minimum=1)
    scale: float = option(13.5, "mode rank: tokens kept per rank", minimum=0)
    bias: float = option(0.0, "mode rank: tokens kept on top")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, mode in OWN_OPTIONS.items():
            if mode != self.mode and getattr(self, name) != self.options()[name].default:
                raise MethodError(
                    f"sparsevlm: {name} is an option of mode {mode!r}, got "
                    f"{name}={getattr(self, name)!r} with mode {self.mode!r}; leave it out."
                )

    def keeps_positions(self, facts: ModelFacts) -> bool:
        """As every pruner; `auto` is `original` in v2."""
        if self.mode == "v2" and self.positions == "auto":
            return True
        return super().keeps_positions(facts)

    def reads(self) -> frozenset[Signal]:
        """v2 merges nothing, so it needs no hidden states."""
        return self.signals - {Signal.HIDDEN} if self.mode == "v2" else self.signals

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        """After the projector, where the raters are found, then after each LLM layer of a stage."""
        early = frozenset({Signal.FEATURES, Signal.TEXT_EMBEDDINGS})
        layers = stage_layers(self.mode, facts.text_layers, facts.first_text_stage)
        late = self.reads() - early
        return (
            Stage(Place.PROJECTED, None, early),
            *(Stage(Place.LLM_LAYER, layer, late) for layer in layers),
        )

    def survivors(self, tokens: int, keep: int, facts: ModelFacts) -> int:
        """What the last stage leaves, merged tokens included; in mode `rank`, the least it may."""
        if self.mode == "rank":
            return min(tokens, 2)
        plan = schedule(self.mode, tokens, keep, facts.text_layers, facts.first_text_stage)
        return plan[-1].left

    def select(self, view: View, keep: int) -> Selection | None:
        """Find the raters first; then keep what they attend to. Syncs in mode `rank` only."""
        if view.stage.place is Place.PROJECTED:
            text = view.text
            view.memory["raters"] = _raters(view.features, text.embeddings, text.mask)
            return None
        raters = view.memory["raters"]
        attention = view.language.text_attention
        gravity = view.language.gravity if self.mode == "v2" else None
        top = self._top(view, keep, attention, raters)
        candidates, clusters = recycled(view.tokens - top) if self.mode != "v2" else (0, 0)
        if top + clusters >= view.tokens:
            return None
        scores = rate(attention, raters, gravity, self.heads, view.facts.text.head_dim)
        if not clusters:
            return Selection(top_indices(scores, top))
        return _keep_and_recycle(view.hidden, scores, top, candidates, clusters)

    def _top(self, view: View, keep: int, attention: Tensor, raters: Tensor) -> int:
        """How many tokens this stage keeps by their score."""
        depth, first = view.facts.text_layers, view.facts.first_text_stage
        if self.mode != "rank":
            plan = schedule(self.mode, view.picture.tokens, keep, depth, first)
            return next(stage.top for stage in plan if stage.layer == view.stage.layer)
        rank = int(attention_rank(attention, raters).max())
        top = max(1, min(int(rank * self.scale + self.bias), view.tokens))
        if view.stage.layer == max(stage_layers("rank", depth, first)):
            while top > 1 and top + recycled(view.tokens - top)[1] > keep:
                top -= 1
        return top


def text_raters(visual: Tensor, text: Tensor) -> Tensor:
    """Return which text tokens match the picture better than the average: [T] bool.

    visual [N, C] projected visual tokens and text [T, C] text embeddings, in any floating dtype;
    computed in fp32. The relevance of a text token is the mean over the visual tokens of the
    softmax of visual · text over the text. When no token is above the mean, all are raters.
    """
    if visual.dim() != 2 or text.dim() != 2 or visual.shape[1] != text.shape[1]:
        raise MethodError(
            "sparsevlm: text_raters takes visual [N, C] and text [T, C] of one width, got "
            f"{list(visual.shape)} and {list(text.shape)}."
        )
    if not len(visual) or not len(text):
        raise MethodError("sparsevlm: text_raters needs at least one visual and one text token.")
    mask = torch.ones(1, len(text), dtype=torch.bool, device=text.device)
    return _raters(visual[None], text[None], mask)[0]


def recycle(tokens: Tensor, scores: Tensor) -> Tensor:
    """Return the cluster means [M, C] that stand for the pruned `tokens` [R, C].

    scores [R]: the int(0.3 R) + 1 best tokens take part (ties: the earlier), in a tenth as many
    clusters, M = int(n / 10) + 1, by `density_peaks`. The means are ordered by descending density
    times separation of their centres; computed in fp32, returned in the dtype of `tokens`.
    """
    if tokens.dim() != 2 or scores.shape != tokens.shape[:1] or not len(tokens):
        raise MethodError(
            "sparsevlm: recycle takes tokens [R, C] and scores [R] of at least one token, got "
            f"{list(tokens.shape)} and {list(scores.shape)}."
        )
    candidates, clusters = recycled(len(tokens))
    chosen = gather_tokens(tokens[None], top_indices(scores[None], candidates))
    return _merge(chosen, clusters)[0][0].to(tokens.dtype)


def rate(
    attention: Tensor,
    raters: Tensor,
    gravity: Tensor | None = None,
    heads: int = 14,
    head_dim: int = 128,
) -> Tensor:
    """Return the score [I, N] of each visual token: mean attention over heads and raters.

    attention [I, H, T, N] fp32 probabilities; raters [I, T] bool. With `gravity` [I, T, N], the
    product of all-ones queries and keys of `head_dim` after rotation, times head_dim ** -0.5,
    attention is divided by it, clamped to at least a tenth of its value at distance 0; and only
    those `heads` heads count whose sum over raters and visual tokens is largest.
    """
    count = raters.sum(-1).clamp(min=1)[:, None]
    off = ~raters[..., None]
    if gravity is None:
        return attention.mean(1).masked_fill(off, 0).sum(1) / count
    weight = 1 / gravity.clamp(min=GRAVITY_FLOOR * head_dim**0.5)
    per_head = (attention * weight.masked_fill(off, 0)[:, None]).sum(2)
    best = top_indices(per_head.sum(-1), min(heads, attention.shape[1]))
    return gather_tokens(per_head, best).mean(1) / count


def attention_rank(attention: Tensor, raters: Tensor) -> Tensor:
    """Return the rank [I] of the raters' head-mean attention to the picture, in fp32.

    attention [I, H, T, N], raters [I, T]; singular values count above the usual tolerance: the
    larger side of the block of raters, times the machine epsilon, times the largest value.
    """
    block = attention.mean(1).masked_fill(~raters[..., None], 0)
    side = raters.sum(-1).clamp(min=attention.shape[-1])
    return torch.linalg.matrix_rank(block, rtol=side * torch.finfo(torch.float32).eps)


def density_peaks(points: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster points [B, n, C]: centres [B, m] (indices) and the cluster of each point [B, n].

    DPC-KNN (Rodriguez and Laio 2014; Du et al. 2016): density exp(-mean of the m smallest
    d² / C), the point itself included; separation the smallest d / sqrt(C) to a denser point, for
    the densest point the largest distance of all; centres are the m largest products of the two,
    in that order, and each point joins the nearest of them. Ties go to the earlier point. Works on
    fp32 and on logarithms, so that no density underflows; memory is [B, n, n].
    """
    with torch.autocast(points.device.type, enabled=False):
        centred = points.float()
        centred = centred - centred.mean(1, keepdim=True)  # distances lose fewer digits
        product = centred @ centred.mT
    norm = product.diagonal(dim1=1, dim2=2)
    # symmetric to the last bit: two points that are each other's nearest must tie in density
    square = norm[:, :, None] + norm[:, None] - (product + product.mT)
    square = square.clamp(min=0) / points.shape[-1]
    square.diagonal(dim1=1, dim2=2).zero_()
    density = -square.topk(clusters, dim=-1, largest=False).values.mean(-1)
    index = torch.arange(points.shape[1], device=points.device)
    other, own = density[:, None], density[:, :, None]
    denser = (other > own) | ((other == own) & (index < index[:, None]))
    # no separation can exceed the densest point's distances, so it always comes first
    separation = square.masked_fill(~denser, torch.inf).amin(-1)
    peak = density + separation.log() / 2
    centres = peak.sort(dim=-1, descending=True, stable=True).indices[:, :clusters]
    member = square.gather(2, centres[:, None].expand(-1, len(index), -1)).argmin(-1)
    return centres, member.scatter(1, centres, index[:clusters].expand_as(centres))


def _raters(visual: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Raters [I, T] bool for visual [I, N, C], text [I, T, C] and its mask [I, T]."""
    with torch.autocast(visual.device.type, enabled=False):
        match = visual.float() @ text.float().mT
    # a finite filler: a row without any text gives no NaN
    shares = match.masked_fill(~mask[:, None], torch.finfo(torch.float32).min).softmax(-1)
    mean = 1 / mask.sum(-1, keepdim=True).clamp(min=1)
    above = shares.mean(1) > mean * (1 + SLACK)
    return torch.where(above.any(-1, keepdim=True), above, mask)


def _keep_and_recycle(
    hidden: Tensor, scores: Tensor, top: int, candidates: int, clusters: int
) -> Selection:
    """The `top` best tokens, and the next best `candidates` merged at their clusters' centres."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    best, rest = order[:, :top], order[:, top : top + candidates].sort(dim=-1).values
    merged, centres = _merge(gather_tokens(hidden, rest), clusters)
    indices, places = torch.cat([best, rest.gather(1, centres)], dim=1).sort(dim=1)
    tokens = torch.cat([gather_tokens(hidden, best), merged.to(hidden.dtype)], dim=1)
    return Selection(indices, gather_tokens(tokens, places))


def _merge(points: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster means [B, m, C] in fp32 of points [B, n, C], and the indices [B, m] of centres."""
    centres, member = density_peaks(points.detach(), clusters)
    of_cluster = member[:, None] == torch.arange(clusters, device=points.device)[:, None]
    share = of_cluster.float() / of_cluster.sum(-1, keepdim=True)
    with torch.autocast(points.device.type, enabled=False):
        return share @ points.float(), centres
