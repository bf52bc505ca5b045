"""FlowCut: progressive pruning inside the vision tower, by what flows through the CLS token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vistoken.contract import ModelFacts, Place, Selection, Signal, Stage, View
from vistoken.errors import MethodError
from vistoken.kernels import attention_row, gather_tokens
from vistoken.method import option
from vistoken.pruning._pruner import Pruner, top_indices

MODES = ("released", "paper")
# Entropy ratio of the CLS row up to which share of the pruned depth: attention of CLIP towers is
# spread in the first half, and concentrates sharply behind it.
TYPICAL_ENTROPY = ((1 / 2, 0.97), (2 / 3, 0.9), (1.0, 0.8))
_HISTORY = "history"
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class FlowCut(Pruner):
    """Prune after every second vision layer by the information flow of the tokens.

    Tong et al., "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language
    Models", NeurIPS 2025, arXiv 2505.19536. After each of the S layers before the one whose output
    is projected, a token's flow is (share of the CLS attention + share of the likeness to the CLS
    value) x norm of its value, and its history becomes half the old history plus half the flow.
    After every second layer, counted from the last one, the tokens of least history go: of N
    tokens round((N - keep) / sqrt(layers left) * (1 - r^2)), with r the entropy of the CLS row
    over ln N; after the last one, all but `keep`.

    `released` takes as likeness the softmax, over all tokens, of the products of values (head
    mean), as the official code does; it is the default because the reported results are its.
    `paper` takes the cosine that the text names, of the values with heads side by side; how a
    negative cosine enters a share is not said there, and here it counts as 0.

    The entropy differs from picture to picture, so the official code takes the largest number of
    dropped tokens in the batch: lengths wait for the device, and what is kept of a picture depends
    on its neighbors in the batch. With `batch_invariant` (default) the schedule is fixed instead:
    r is typical of the depth (0.97 in the first half of the S layers, 0.9 up to two thirds, 0.8
    behind; or `entropy` everywhere), every length is known in advance, nothing waits, and a
    picture keeps the same tokens in any batch. The ranking is the official one in both cases; the
    schedule only moves work: most of the cut is made at the last stage either way, by a history of
    all layers. `batch_invariant=False` follows the official rule with the maximum over the batch,
    and reads one number back to the CPU at each pruning layer but the last.

    Pictures of several tiles pass half the budget per tile through the tower, tokens that will not
    reach the LLM last, and are cut to the budget after layer `llm_layer` of the LLM, by the query
    and the value of the prompt's last token among the visual tokens. A tower without a CLS token
    is read as in the official port to such a tower: the query is the mean of all queries, and the
    likeness of values is left out. Unlike in that port, pictures of one tile are then still cut to
    the budget in the tower, not to twice the budget and again in the LLM.

    Official defects that are not reproduced: an attention weight of zero makes the entropy NaN and
    the run fail; layers past the last pruning layer take the root of a negative number; the
    schedule of 22 layers is hard-coded; newline tokens of tiled pictures are dropped silently
    (here: `newlines`); the LLM stage reads odd rows of a batch with swapped axes and fails on
    padded batches; all vision towers of the process are changed.
    """

    name: ClassVar[str] = "flowcut"
    paper: ClassVar[str] = "FlowCut, NeurIPS 2025, arXiv 2505.19536"
    tag: ClassVar[str] = "training-free"
    places: ClassVar[frozenset[Place]] = frozenset({Place.VISION_LAYER, Place.LLM_LAYER})
    signals: ClassVar[frozenset[Signal]] = frozenset(
        {
            Signal.CLS_ATTENTION,
            Signal.VISION_QUERIES,
            Signal.VISION_KEYS,
            Signal.VISION_VALUES,
            Signal.LLM_ATTENTION,
        }
    )

    mode: str = option("released", "likeness of values: softmax or cosine", choices=MODES)
    batch_invariant: bool = option(True, "drop as many tokens of a picture in any batch")
    entropy: float | None = option(
        None, "entropy ratio that the fixed schedule assumes; None: typical", minimum=0, maximum=1
    )
    llm_layer: int = option(1, "LLM layer after which tiled pictures are cut", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.entropy is not None and not self.batch_invariant:
            raise MethodError(
                f"flowcut: entropy={self.entropy!r} belongs to the fixed schedule, but "
                "batch_invariant=False measures the entropy; give one of the two."
            )

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        """Every vision layer before the projected one; for tiled pictures, one LLM layer, too."""
        if facts.feature_layer < 1:
            raise MethodError(
                "flowcut: the model projects the output of its first vision layer, so there is no "
                "layer to prune after; use a method that acts after the projector."
            )
        read = {Signal.CLS_ATTENTION, Signal.VISION_VALUES}
        if facts.prefix_tokens == 0:
            read = {Signal.VISION_QUERIES, Signal.VISION_KEYS, Signal.VISION_VALUES}
        tower = tuple(
            Stage(Place.VISION_LAYER, layer, frozenset(read))
            for layer in range(facts.feature_layer)
        )
        if not facts.tiled:
            return tower
        if not facts.first_text_stage <= self.llm_layer < facts.text_layers - 1:
            raise MethodError(
                f"flowcut: llm_layer must be at least {facts.first_text_stage} and leave a layer "
                f"behind it among the LLM's {facts.text_layers}, got {self.llm_layer}."
            )
        last = Stage(Place.LLM_LAYER, self.llm_layer, frozenset({Signal.LLM_ATTENTION}))
        return (*tower, last)

    def tower_budget(self, keep: int, tiles: int, needed: int) -> int:
        """Half the budget for each of several tiles, as the LLM stage cuts once more."""
        return needed if tiles == 1 else max(needed, keep // 2)

    @torch.no_grad()
    def select(self, view: View, keep: int) -> Selection | None:
        """Choose by the history in the tower, or by the last text token in the LLM."""
        if view.stage.place is Place.LLM_LAYER:
            return Selection(top_indices(_language_flow(view, self.mode), keep))
        attention, flow = _tower_flow(view, self.mode)
        history = view.memory.get(_HISTORY)
        if history is not None:
            if history.shape != flow.shape:
                raise MethodError(
                    f"flowcut: {history.shape[1]} tokens were left at the vision layer before, "
                    f"now there are {flow.shape[1]}: another method drops tokens inside the "
                    "vision tower; attach one of the two."
                )
            flow = torch.lerp(history, flow, 0.5)
        view.memory[_HISTORY] = flow
        left = self._length_after(view, attention, keep)
        if left == view.tokens:
            return None
        indices = _best(flow, left, keep, view.visible)
        view.memory[_HISTORY] = gather_tokens(flow, indices)
        return Selection(indices)

    def _length_after(self, view: View, attention: Tensor, keep: int) -> int:
        """How many tokens of each picture this stage of the tower leaves."""
        assert view.stage.layer is not None  # a stage in the tower has one
        depth = view.facts.feature_layer
        remaining = depth - view.stage.layer - 1
        if remaining % 2:
            return view.tokens
        if remaining == 0:
            return keep
        if self.batch_invariant:
            ratio = self.entropy
            if ratio is None:
                ratio = typical_entropy(view.stage.layer, depth)
        else:  # the largest drop of the batch is that of the least entropy
            ratio = float(entropy_ratio(attention).nan_to_num(1.0).min())
        return view.tokens - drop_count(view.tokens, keep, remaining, ratio)


def flow_score(
    cls_attention: Tensor, cls_value_similarity: Tensor | None, value_norm: Tensor
) -> Tensor:
    """Return the information flow (a / sum a + u / sum u) * w of every token, [..., N] fp32.

    cls_attention a [..., N], cls_value_similarity u [..., N] and value_norm w [..., N] are
    non-negative, of any floating dtype; without a similarity (None) the flow is a / sum a * w.
    A row that sums to zero counts as zero. Raises `MethodError` when the shapes differ.
    """
    given = [cls_attention, value_norm]
    if cls_value_similarity is not None:
        given.insert(1, cls_value_similarity)
    if len({tuple(values.shape) for values in given}) > 1 or value_norm.dim() < 1:
        shapes = ", ".join(str(list(values.shape)) for values in given)
        raise MethodError(
            f"flowcut: attention, similarity and norm must have one shape [..., N], got {shapes}."
        )
    read = _shares(cls_attention)
    if cls_value_similarity is not None:
        read = read + _shares(cls_value_similarity)
    return read * value_norm.float()


def entropy_ratio(attention: Tensor) -> Tensor:
    """Return the entropy of `attention` [..., N], scaled to sum to 1, over ln N: [...] fp32.

    1 where all tokens are equal, 0 where one has everything; zeros are allowed.
    """
    share = _shares(attention)
    return -torch.xlogy(share, share).sum(-1) / math.log(max(attention.shape[-1], 2))


def drop_count(tokens: int, keep: int, remaining: int, entropy: float) -> int:
    """Return how many of `tokens` go when `remaining` layers follow before the last stage.

    round((tokens - keep) / sqrt(remaining) * (1 - entropy^2)), halves to even, and never so many
    that fewer than `keep` are left. `entropy` is the ratio to that of equal attention.
    """
    wanted = round((tokens - keep) / math.sqrt(remaining) * (1 - entropy * entropy))
    return min(max(wanted, 0), tokens - keep)


def typical_entropy(layer: int, depth: int) -> float:
    """Return the entropy ratio that the fixed schedule assumes after `layer` of `depth`."""
    return next(ratio for end, ratio in TYPICAL_ENTROPY if layer + 1 <= end * depth)


def value_similarity(value: Tensor, values: Tensor, scale: float, mode: str) -> Tensor:
    """Return how alike `values` [I, H, N, D] are to `value` [I, H, D]: [I, N] fp32, at least 0.

    `released`: softmax over N of the products times `scale`, head mean. `paper`: cosine over
    heads and width together, negative ones as 0.
    """
    # products are promoted to fp32 as they are formed: no copy, no dependence on matmul settings
    value = value.float()[:, :, None]
    products = (values * value).sum(-1)
    if mode == "released":
        return (products * scale).softmax(-1).mean(1)
    norms = torch.linalg.vector_norm(values, dim=(1, 3), dtype=torch.float32)
    norms = norms * torch.linalg.vector_norm(value, dim=(1, 3))
    return (products.sum(1) / norms.clamp(min=_TINY)).clamp(min=0)


def value_norm(values: Tensor) -> Tensor:
    """Return the L1 norm [I, N] fp32 of the head mean of `values` [I, H, N, D]."""
    return torch.linalg.vector_norm(values.mean(1, dtype=torch.float32), ord=1, dim=-1)


def mean_query_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the attention [I, N] fp32, head mean, of the mean of all queries [I, H, N, D]."""
    query = queries.mean(2, keepdim=True, dtype=torch.float32)
    return attention_row(query, keys, keys.shape[-1] ** -0.5)[:, :, 0].mean(1)


def _shares(values: Tensor) -> Tensor:
    values = values.float()
    return values / values.sum(-1, keepdim=True).clamp(min=_TINY)


def _tower_flow(view: View, mode: str) -> tuple[Tensor, Tensor]:
    """Attention and flow [I, N] of the tokens after one layer of the tower."""
    values: Tensor = view.read(Signal.VISION_VALUES)
    norm = value_norm(values[:, :, view.prefix :])
    if view.facts.prefix_tokens == 0:
        queries, keys = view.read(Signal.VISION_QUERIES), view.read(Signal.VISION_KEYS)
        attention = mean_query_attention(queries, keys)
        return attention, flow_score(attention, None, norm)
    # the softmax runs over the CLS token itself, too
    similar = value_similarity(values[:, :, 0], values, 1.0, mode)[:, view.prefix :]
    return view.cls_attention, flow_score(view.cls_attention, similar, norm)


def _language_flow(view: View, mode: str) -> Tensor:
    """Flow [I, N] of visual tokens to the prompt's last token in one layer of the LLM."""
    rows = view.language
    scale = rows.keys.shape[-1] ** -0.5
    attention = attention_row(rows.last_query[:, :, None], rows.keys, scale)[:, :, 0].mean(1)
    similar = value_similarity(rows.last_value, rows.values, scale, mode)
    return flow_score(attention, similar, value_norm(rows.values))


def _best(history: Tensor, left: int, keep: int, visible: Tensor | None) -> Tensor:
    """The `left` tokens of the largest history, ascending; ties go to the lower index.

    Where some tokens are not visible, the `keep` best visible ones always stay: a picture never
    loses what fills its budget to tokens that will not reach the LLM.
    """
    if visible is None:
        return top_indices(history, left)
    order = history.argsort(dim=-1, descending=True, stable=True)
    shown = visible.gather(1, order)
    secured = shown & (shown.cumsum(1) <= keep)
    first = secured.int().argsort(dim=-1, descending=True, stable=True)[:, :left]
    return order.gather(1, first).sort(dim=-1).values
