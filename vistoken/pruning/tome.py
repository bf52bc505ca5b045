"""ToMe: similar tokens merge inside the vision tower, a few in every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch

from vistoken.contract import ModelFacts, Place, Selection, Signal, Stage, View
from vistoken.errors import MethodError
from vistoken.kernels.merge import match, merge, released_order
from vistoken.method import option
from vistoken.pruning._pruner import Pruner, top_indices

SCHEDULES = ("constant", "decreasing")
ORDERS = ("raster", "released")


@dataclass(frozen=True, kw_only=True)
class ToMe(Pruner):
    """Merge tokens between attention and MLP of the vision layers up to the one that is projected.

    Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461. In each layer
    the tokens alternate between two sets; every token of the first links to the token of the second
    whose key (mean over heads, by cosine) is most like its own, and the strongest links merge into
    size-weighted means. Later layers add log(size) to their attention logits, so that a merged
    token weighs as much as those it stands for. CLS and register tokens are never merged.

    Alternation is by position in the tower's sequence, prefix included: behind one CLS token,
    raster index 0 is position 1 and belongs to the second set. A merged token takes the place of
    its member of the second set, and tokens always lie in raster order, which the LLM expects; to
    the tower's other computations their order is all the same. The official code instead leaves
    first the rest of the first set and then the second, so that from the second merge on other
    tokens alternate: `order="released"` follows that sequence when it forms the sets.

    The number of merges follows from the budget: `schedule` spreads them evenly over the layers
    (`constant`) or falls linearly from twice the mean to none (`decreasing`), see `merges`. How
    the published LLaVA rows spread them and in which layer they stop is not documented, hence the
    option `last_layer` (by default the last one before the layer whose output is projected).

    Padding of tiled pictures, which the LLM never sees, merges before and only with padding (see
    `vistoken.kernels.merge.match`), so that each tile keeps as many visible tokens as its budget
    allows. What the tiles keep beyond the picture's budget is cut after the projector: the tokens
    that stand for the fewest go, the later one of equals.
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "ToMe, ICLR 2023, arXiv 2210.09461"
    tag: ClassVar[str] = "training-free"
    places: ClassVar[frozenset[Place]] = frozenset({Place.VISION_BLOCK, Place.PROJECTED})
    signals: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.VISION_KEYS, Signal.HIDDEN, Signal.SIZES}
    )

    schedule: str = option("constant", "how merges spread over the layers", choices=SCHEDULES)
    order: str = option("raster", "sequence in which tokens alternate", choices=ORDERS)
    last_layer: int | None = option(None, "last vision layer that merges", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_layer is not None and not isinstance(self.last_layer, int):
            raise MethodError(f"tome: last_layer must be a whole number, got {self.last_layer!r}.")

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        """Every vision layer that merges; in models with tiled pictures also the projector."""
        last = self._last(facts)
        if not facts.tiled:
            merges(facts.visual_tokens, 0, last, self.budget(facts.visual_tokens), self.schedule)
        inside = tuple(Stage(Place.VISION_BLOCK, layer, self.signals) for layer in range(last + 1))
        if not facts.tiled:
            return inside
        return (*inside, Stage(Place.PROJECTED, None, frozenset({Signal.SIZES})))

    def _last(self, facts: ModelFacts) -> int:
        if facts.feature_layer < 1:
            raise MethodError(
                "tome merges in the vision layers before the one whose output is projected, but "
                f"in this model that is layer {facts.feature_layer}; choose another method."
            )
        last = facts.feature_layer - 1
        if self.last_layer is None:
            return last
        if self.last_layer > last:
            raise MethodError(
                f"tome: last_layer must be at most {last}, the last vision layer before the one "
                f"that is projected, got {self.last_layer}."
            )
        return self.last_layer

    def select(self, view: View, keep: int) -> Selection | None:
        """Merge in a layer of the tower as many tokens as the schedule says; cut behind it."""
        if view.stage.place is Place.PROJECTED:
            return Selection(top_indices(view.read(Signal.SIZES), keep))
        assert view.stage.layer is not None  # stages inside the tower name their layer
        layer, last = view.stage.layer, self._last(view.facts)
        count = merges(view.tokens, layer, last, keep, self.schedule)
        if count == 0:
            return None
        keys, hidden = view.read(Signal.VISION_KEYS), view.hidden
        plan = match(
            keys.mean(1, dtype=torch.float32),
            count,
            protected=view.prefix,
            order=view.memory.get("order"),
            visible=view.visible,
            release=view.tokens - count == keep,
        )
        if self.order == "released":
            view.memory["order"] = released_order(plan, view.memory.get("order"))
        tokens, sizes = merge(hidden, view.read(Signal.SIZES), replace(plan, protected=0))
        return Selection(plan.kept, tokens, sizes)


@lru_cache(maxsize=4096)
def merges(tokens: int, layer: int, last: int, keep: int, schedule: str) -> int:
    """Return how many of `tokens` merge in `layer` so that `keep` are left after layer `last`.

    At most half of the tokens merge in a layer. `constant` takes the least number per layer with
    which that limit still lets every later layer do the same or less and reach `keep`; where the
    limit binds only near the end, the earlier layers take over what it forbids. `decreasing` falls
    linearly to none after `last`, or faster where the limit would leave too many. The answer
    depends on nothing else, so the layers of one call agree without knowing of each other.

    Raises `MethodError`, naming the smallest budget that works, when `keep` is out of reach.
    """
    if schedule not in SCHEDULES:
        raise MethodError(
            f"tome: schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}."
        )
    rest, layers = tokens - keep, last - layer + 1
    if rest <= 0 or layers < 1:
        return 0
    least = -(-tokens // 2**layers)
    if keep < least:
        raise MethodError(
            f"tome: {tokens} visual tokens cannot shrink to {keep} in {layers} vision layers, as "
            f"each merges at most half of its tokens; the smallest budget is {least}."
        )
    if schedule == "decreasing":
        wanted = max(-(-2 * rest // layers), tokens - keep * 2 ** (layers - 1))
    else:
        wanted = -(-rest // layers)
        while not _reaches(tokens, layers, keep, wanted):
            wanted += 1
    return min(wanted, rest, tokens // 2)


def _reaches(tokens: int, layers: int, keep: int, each: int) -> bool:
    """Whether `layers` merges of `each` tokens, or half of those left, go down to `keep`."""
    for _ in range(layers):
        tokens -= min(each, tokens // 2)
    return tokens <= keep
