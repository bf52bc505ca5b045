"""AdaptInfer: prune in stages inside the LLM, by the text tokens that the text attends to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vistoken.contract import ModelFacts, Place, Selection, Signal, Stage, View
from vistoken.errors import MethodError
from vistoken.method import option
from vistoken.pruning._pruner import Pruner, top_indices

PRIORS = ("received", "given")
SCHEDULES = ("geometric", "linear")
LAYERS, DEPTH = (1, 10, 20), 32  # LLM layers after which tokens are dropped, in an LLM of 32


@dataclass(frozen=True, kw_only=True)
class AdaptInfer(Pruner):
    """Drop visual tokens after several LLM layers, each time by fresh text-to-vision attention.

    Zhang et al., "AdaptInfer", arXiv 2508.06084. At each stage the attention among the text
    tokens makes a soft prior over them, and a visual token scores the prior-weighted attention
    that it gets from the text. Kept tokens keep their positions.

    The budget counts the tokens **after the last stage**; the layers before it see more. There is
    no official code, and of the paper no complete description was at hand. Its open choices are
    options: `prior` (attention that a text token receives, or gives to other text tokens, whose
    sums a causal softmax makes nearly equal), `schedule` (how many stay after each stage: falling
    by a constant factor or a constant number), `layers`. A stage's scores come from the layer
    after which it drops tokens.
    """

    name: ClassVar[str] = "adaptinfer"
    paper: ClassVar[str] = "AdaptInfer, arXiv 2508.06084"
    tag: ClassVar[str] = "experimental"
    numbering: ClassVar[str] = "original"
    places: ClassVar[frozenset[Place]] = frozenset({Place.LLM_LAYER})
    signals: ClassVar[frozenset[Signal]] = frozenset({Signal.LLM_ATTENTION})

    prior: str = option("received", "what makes a text token count", choices=PRIORS)
    schedule: str = option("geometric", "how counts fall from stage to stage", choices=SCHEDULES)
    layers: str = option(
        "auto", "LLM layers after which to drop, such as '1,10,20'; auto: these of 32, scaled"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers == "auto":
            return
        numbers = self._numbers()
        if not numbers or sorted(set(numbers)) != numbers:
            raise MethodError(
                "adaptinfer: layers must be 'auto' or rising whole numbers with commas, such as "
                f"'1,10,20', got {self.layers!r}."
            )

    def _numbers(self) -> list[int]:
        words = [word.strip() for word in self.layers.split(",")]
        return [int(word) for word in words] if all(w.isdecimal() for w in words) else []

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        """After each of the layers, reading the attention of that layer."""
        return tuple(
            Stage(Place.LLM_LAYER, layer, self.signals) for layer in self.stage_layers(facts)
        )

    def stage_layers(self, facts: ModelFacts) -> tuple[int, ...]:
        """The layers: as given, or the default ones scaled to the LLM's depth, without doubles.

        Default layers that come too early for the model move to the first that is allowed.
        """
        first, last = facts.first_text_stage, facts.text_layers - 2
        if first > last:
            raise MethodError(
                f"adaptinfer: needs an LLM layer from {first} on with another one behind it, but "
                f"this model has {facts.text_layers} LLM layers; use a method that prunes before "
                "the LLM."
            )
        if self.layers == "auto":
            scaled = (math.floor(layer * facts.text_layers / DEPTH + 0.5) for layer in LAYERS)
            return tuple(sorted({min(max(layer, first), last) for layer in scaled}))
        for layer in self._numbers():
            if not first <= layer <= last:
                raise MethodError(
                    f"adaptinfer: layers must be from {first} to {last} in this model of "
                    f"{facts.text_layers} LLM layers, got {self.layers!r}."
                )
        return tuple(self._numbers())

    def select(self, view: View, keep: int) -> Selection | None:
        """Keep the best-scored tokens, as many as the schedule has for this stage."""
        layers = self.stage_layers(view.facts)
        tokens = view.memory.setdefault("tokens", view.tokens)
        counts = stage_counts(tokens, min(keep, tokens), len(layers), schedule=self.schedule)
        assert view.stage.layer is not None  # an LLM stage; for the type checker
        count = counts[layers.index(view.stage.layer)]
        if count >= view.tokens:
            return None
        language = view.language
        prior = text_prior(language.text_to_text, language.text_mask, prior=self.prior)
        return Selection(top_indices(visual_scores(language.text_attention, prior), count))


def stage_counts(
    tokens: int, keep: int, stages: int, *, schedule: str = "geometric"
) -> tuple[int, ...]:
    """Return how many of `tokens` stay after each stage; after the last, `keep`.

    After stage i of S: tokens * (keep / tokens) ** (i / S) in the `geometric` schedule,
    tokens - (tokens - keep) * i / S in the `linear` one, rounded half up.
    """
    if schedule not in SCHEDULES or not 1 <= keep <= tokens or stages < 1:
        raise MethodError(
            f"adaptinfer: needs 1 <= keep <= tokens, a stage, and a schedule of {SCHEDULES}; got "
            f"keep={keep}, tokens={tokens}, stages={stages}, schedule={schedule!r}."
        )
    counts = []
    for stage in range(1, stages):
        if schedule == "geometric":
            exact = tokens * (keep / tokens) ** (stage / stages)
        else:
            exact = tokens - (tokens - keep) * stage / stages
        counts.append(math.floor(exact + 0.5))
    return (*counts, keep)


def text_prior(text_to_text: Tensor, text_mask: Tensor, *, prior: str = "received") -> Tensor:
    """Return weights [I, T] fp32 over the text tokens; they sum to 1, padding weighs 0.

    text_to_text [I, H, T, T] attention probabilities; text_mask [I, T] bool, True for text. The
    weight is the head-mean attention that a token receives from the text (column sum), or gives
    to it (row sum). Where nothing is attended to, all text weighs the same.
    """
    images, _, rows, columns = text_to_text.shape
    if prior not in PRIORS or text_mask.shape != (images, rows) or rows != columns:
        raise MethodError(
            f"adaptinfer: needs a prior of {PRIORS}, text_to_text [I, H, T, T] and text_mask "
            f"[I, T]; got {prior!r}, {list(text_to_text.shape)} and {list(text_mask.shape)}."
        )
    mask = text_mask.to(torch.float32)
    attention = text_to_text.float().mean(1) * (mask[:, :, None] * mask[:, None, :])
    weight = attention.sum(1 if prior == "received" else 2)
    weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, mask)
    return weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def visual_scores(text_attention: Tensor, prior: Tensor) -> Tensor:
    """Return s_j = sum_i prior_i * mean over heads of A[text_i, visual_j], [I, N] fp32.

    text_attention [I, H, T, N] attention probabilities; prior [I, T].
    """
    images, _, rows, _ = text_attention.shape
    if prior.shape != (images, rows):
        raise MethodError(
            f"adaptinfer: text_attention {list(text_attention.shape)} and prior "
            f"{list(prior.shape)} must agree in pictures and text tokens."
        )
    with torch.autocast(text_attention.device.type, enabled=False):
        weighted = prior.float()[:, None, None] @ text_attention.float()
    return weighted[:, :, 0].mean(1)
