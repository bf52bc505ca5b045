"""VMTC: attended tokens stay, the others become cluster means; CMAI hides what text ignores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vistoken.contract import ModelFacts, Place, Selection, Signal, Stage, View
from vistoken.errors import MethodError
from vistoken.kernels import gather_tokens
from vistoken.method import option
from vistoken.pruning._kmeans import DISTANCES, INITS, kmeans
from vistoken.pruning._pruner import Pruner, top_indices

HEADS = ("mean", "separate")
RULES = ("quantile", "relative", "absolute")


@dataclass(frozen=True, kw_only=True)
class VMTC(Pruner):
    """Keep the tokens that CLS attends to most, and merge the rest into the means of clusters.

    Yang et al., "Enhancing Instruction-Following ... by Reducing Image Redundancy", arXiv
    2411.15453. The clusters are found by k-means among the projected features of the tokens that
    are not attended to; a merged token takes the place of the member closest to the center.

    With `cmai` the method also acts inside the LLM, after `cmai_layer`: attention from text to
    picture, aggregated through attention from text to text, says how much each text token focuses
    on each visual token (see `focus`); pairs of low focus (see `hidden_pairs`) are hidden from all
    later layers. A text token still sees itself, so no row of attention is ever empty. Tokens
    generated later see the whole picture.

    The public description names neither the shares nor the layers and thresholds, hence the
    options and their defaults, which are ours: share of clusters, k-means settings, the layer
    (None: a quarter of the depth), how heads are combined, whether rows of attention are scaled to
    sum to 1, the rule that calls a focus low and its threshold.
    """

    name: ClassVar[str] = "vmtc"
    paper: ClassVar[str] = "VMTC + CMAI, arXiv 2411.15453"
    tag: ClassVar[str] = "experimental"
    places: ClassVar[frozenset[Place]] = frozenset({Place.PROJECTED, Place.LLM_LAYER})
    signals: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.FEATURES, Signal.CLS_ATTENTION, Signal.LLM_ATTENTION}
    )

    clusters: float = option(0.25, "share of the budget that clusters get", minimum=0, maximum=1)
    iterations: int = option(10, "iterations of k-means", minimum=0)
    init: str = option("strided", "where k-means starts", choices=INITS)
    distance: str = option("euclidean", "what k-means compares", choices=DISTANCES)
    cmai: bool = option(False, "hide pairs of low text-image focus in the LLM")
    cmai_layer: int | None = option(None, "LLM layer after which pairs are hidden", minimum=0)
    heads: str = option(
        "mean", "average heads before the product of the maps, or after", choices=HEADS
    )
    normalize: bool = option(True, "scale rows of both attention blocks to sum to 1")
    rule: str = option("quantile", "what the threshold is compared with", choices=RULES)
    threshold: float = option(0.25, "focus below which a pair is hidden")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cmai_layer is not None and not isinstance(self.cmai_layer, int):
            raise MethodError(f"vmtc: cmai_layer must be a whole number, got {self.cmai_layer!r}.")
        _check_threshold(self.rule, self.threshold)

    @property
    def always(self) -> bool:
        """Whether stages inside the LLM run although the budget is met."""
        return self.cmai

    def reads(self) -> frozenset[Signal]:
        """Without clusters no features are needed, with clusters only no attention."""
        found = self.signals if self.cmai else self.signals - {Signal.LLM_ATTENTION}
        if self.clusters == 0:
            found -= {Signal.FEATURES}
        return found - {Signal.CLS_ATTENTION} if self.clusters == 1 else found

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        """After the projector, and with `cmai` after one layer of the LLM."""
        first = Stage(Place.PROJECTED, None, self.reads() - {Signal.LLM_ATTENTION})
        if not self.cmai:
            return (first,)
        least, most = facts.first_text_stage, facts.text_layers - 2
        layer = self.cmai_layer
        if layer is None:
            layer = max(least, min(facts.text_layers // 4, most))
        if not least <= layer <= most:
            raise MethodError(
                f"vmtc: cmai needs a layer of the LLM with another one behind it, from {least} to "
                f"{most} in this model of {facts.text_layers} layers, got {layer}."
            )
        return (first, Stage(Place.LLM_LAYER, layer, frozenset({Signal.LLM_ATTENTION})))

    def select(self, view: View, keep: int) -> Selection | None:
        """Cut and merge after the projector; inside the LLM, hide pairs and keep every token."""
        if view.stage.place is Place.LLM_LAYER:
            return self._hide(view)
        if keep >= view.tokens:
            return None
        merged = math.floor(self.clusters * keep + 0.5)
        if merged == 0:
            return Selection(top_indices(view.cls_attention, keep))
        kept = None if merged == keep else top_indices(view.cls_attention, keep - merged)
        indices, tokens = cluster_rest(
            view.features,
            kept,
            merged,
            iterations=self.iterations,
            init=self.init,
            distance=self.distance,
        )
        return Selection(indices, tokens)

    def _hide(self, view: View) -> Selection:
        rows = view.language
        score = focus(
            rows.text_attention, rows.text_to_text, heads=self.heads, normalize=self.normalize
        )
        pairs = hidden_pairs(score, self.threshold, rule=self.rule) & rows.text_mask[..., None]
        everything = torch.arange(view.tokens, device=view.device)
        return Selection(everything.expand(view.images, view.tokens), hidden=pairs)


def cluster_rest(
    features: Tensor,
    kept: Tensor | None,
    clusters: int,
    *,
    iterations: int = 10,
    init: str = "strided",
    distance: str = "euclidean",
) -> tuple[Tensor, Tensor]:
    """Merge the tokens that are not `kept` into the means of `clusters` clusters.

    features [B, N, C]; kept [B, P] int64, ascending, or None for no token; P + clusters <= N.
    Returns (indices [B, P + clusters] ascending, tokens [B, P + clusters, C] in the features'
    dtype): the kept tokens unchanged and the means, computed in fp32, at the places of their
    representatives. Differentiable in the features; never waits for the device.
    """
    batch, count, _ = features.shape
    if kept is None:
        kept = torch.zeros(batch, 0, dtype=torch.long, device=features.device)
    if kept.shape[1] + clusters > count or clusters < 1:
        raise MethodError(
            f"vmtc: {kept.shape[1]} tokens and {clusters} clusters cannot come from {count} "
            "tokens; there must be at least one cluster and a token for each."
        )
    taken = torch.zeros(batch, count, dtype=torch.uint8, device=features.device)
    taken.scatter_(1, kept, 1)
    rest = taken.sort(dim=1, stable=True).indices[:, : count - kept.shape[1]]
    points = gather_tokens(features, rest)
    member, center = kmeans(
        points.detach(), clusters, iterations=iterations, init=init, distance=distance
    )
    with torch.autocast(features.device.type, enabled=False):
        share = member / member.sum(-1, keepdim=True)
        means = (share @ points.float()).to(features.dtype)
    places, order = torch.cat([kept, rest.gather(1, center)], 1).sort(dim=1)
    return places, gather_tokens(torch.cat([gather_tokens(features, kept), means], 1), order)


def focus(
    text_attention: Tensor, text_to_text: Tensor, *, heads: str = "mean", normalize: bool = True
) -> Tensor:
    """Return the focus F = A_tt A_ti [B, T, N] in fp32 of text tokens on visual tokens.

    text_attention A_ti [B, H, T, N] and text_to_text A_tt [B, H, T, T]: attention probabilities of
    text rows. `heads`: `mean` multiplies the head means, `separate` averages the products of each
    head. `normalize` first scales the rows of both blocks to sum to 1, so the rows of F are
    distributions over the picture. Rows of zeros (padding) stay zero.
    """
    if heads not in HEADS:
        raise MethodError(f"vmtc: heads must be one of {', '.join(HEADS)}, got {heads!r}.")
    with torch.autocast(text_attention.device.type, enabled=False):
        to_image, to_text = text_attention.float(), text_to_text.float()
        if heads == "mean":
            to_image, to_text = to_image.mean(1, keepdim=True), to_text.mean(1, keepdim=True)
        if normalize:
            to_image, to_text = _rows_to_one(to_image), _rows_to_one(to_text)
        return (to_text @ to_image).mean(1)


def _rows_to_one(attention: Tensor) -> Tensor:
    total = attention.sum(-1, keepdim=True)
    return attention / total.clamp(min=torch.finfo(torch.float32).tiny)


def hidden_pairs(score: Tensor, threshold: float, *, rule: str = "quantile") -> Tensor:
    """Return which pairs [B, T, N] bool have a focus `score` [B, T, N] below the threshold.

    `quantile`: below the floor(threshold * N)-th smallest of the row, counted from 0, so at most
    that share of each row; 0 hides nothing. `relative`: below threshold times the row's mean.
    `absolute`: below threshold itself. Equal is not below: with a threshold of 0 or less nothing
    is hidden, whatever the rule (`quantile` takes 0 <= threshold < 1).
    """
    _check_threshold(rule, threshold)
    if rule == "absolute":
        return score < threshold
    if rule == "relative":
        return score < threshold * score.mean(-1, keepdim=True)
    place = math.floor(threshold * score.shape[-1])
    return score < score.sort(dim=-1).values[..., place : place + 1]


def _check_threshold(rule: str, threshold: float) -> None:
    if rule not in RULES:
        raise MethodError(f"vmtc: rule must be one of {', '.join(RULES)}, got {rule!r}.")
    if rule == "quantile" and not 0 <= threshold < 1:
        raise MethodError(
            "vmtc: threshold must be at least 0 and below 1 with rule='quantile', "
            f"got {threshold!r}; use rule='absolute' for focus values."
        )
