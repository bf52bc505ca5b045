"""The contract between methods and hosts: signals a method may read, places where it may act.

A *method* is mathematics on tensors and knows no model. A *host* knows one model family and no
method. They meet here: a method lists `Stage`s (a place, and the signals it wants there), the host
says which signals and places it offers, and at run time it calls the method at each stage with a
`View` of the signals. `attach` refuses a method whose signals or places the host lacks, by name,
before anything is edited.

Shapes: I images of one call, N visual tokens that each of them still has, C text width,
D vision width, H vision heads, P prefix tokens of the tower (the CLS token, registers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from vistoken.cost import TransformerShape


class Signal(str, Enum):
    """What a method may ask a host to read for it."""

    FEATURES = "projected features"  # [I, N, C] after the projector, in the model's dtype
    ENCODED = "encoder features"  # [I, N, D] what the projector reads
    PROJECTOR = "projector"  # the projector as a module, [..., D] -> [..., C]
    CLS_ATTENTION = "CLS attention row"  # [I, N] fp32, head mean, CLS column dropped
    VISION_QUERIES = "vision queries"  # [I, H, P + N, D / H] of the stage's vision layer
    VISION_KEYS = "vision keys"  # [I, H, P + N, D / H]
    VISION_VALUES = "vision values"  # [I, H, P + N, D / H]
    IMAGE_KEY = "image key"  # [I] int64, a digest of the picture's content
    TEXT_EMBEDDINGS = "text embeddings"  # embeddings of the prompt's text tokens
    LLM_ATTENTION = "LLM attention rows"  # queries, keys, values of chosen rows at an LLM layer


class Place(str, Enum):
    """Where a method may act."""

    VISION_LAYER = "vision layer"  # drop or merge tokens after layer l of the vision tower
    PROJECTED = "after the projector"  # drop or merge tokens before they enter the LLM
    LLM_LAYER = "LLM layer"  # drop or merge visual tokens after layer l of the LLM
    ATTENTION_LOGITS = "attention logits"
    ATTENTION_WEIGHTS = "attention weights"
    HEAD_OUTPUTS = "head outputs"
    OUTPUT_LOGITS = "output logits"
    ATTENTION_CALL = "attention call"


@dataclass(frozen=True)
class Stage:
    """One moment at which a method is called: a place, its layer, the signals wanted there."""

    place: Place
    layer: int | None = None
    signals: frozenset[Signal] = frozenset()

    def __str__(self) -> str:
        return self.place.value if self.layer is None else f"{self.place.value} {self.layer}"


@dataclass(frozen=True)
class Selection:
    """Which tokens stay: `indices` [I, K] int64 ascending into the N tokens of the view.

    A method that merges also gives `tokens` [I, K, C], which replace the picked ones; `indices`
    then name, for each merged token, the one whose position it takes.
    """

    indices: Tensor
    tokens: Tensor | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What a host tells a method about the model, before and while it runs.

    `feature_layer` is the vision layer whose output is projected; `grid` is (rows, columns) of
    one image's visual tokens; `vision` and `text` describe the two transformers for the cost model.
    """

    host: str
    grid: tuple[int, int]
    prefix_tokens: int
    vision_layers: int
    feature_layer: int
    text_layers: int
    vision: TransformerShape
    text: TransformerShape
    patch_embedding_macs: int
    projector_macs: int

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one image, N."""
        return self.grid[0] * self.grid[1]


@dataclass
class View:
    """What a method sees at one stage: lazily read signals, and memory that lives for one call.

    `origin` [I, N] holds the raster index of each token that is still there, so that a method can
    know where on the grid it lay. `memory` is the method's own and is dropped with the call.
    """

    stage: Stage
    facts: ModelFacts
    origin: Tensor
    memory: dict[str, Any]
    reader: Callable[[Signal], Any]
    _cache: dict[Signal, Any] = field(default_factory=dict)

    def read(self, signal: Signal) -> Any:
        """Return a signal that the stage asked for, computed on first use."""
        if signal not in self.stage.signals:
            raise KeyError(f"the stage at {self.stage} did not ask for {signal.value}")
        if signal not in self._cache:
            self._cache[signal] = self.reader(signal)
        return self._cache[signal]

    @property
    def features(self) -> Tensor:
        """Projected features [I, N, C]."""
        return self.read(Signal.FEATURES)

    @property
    def cls_attention(self) -> Tensor:
        """CLS attention row [I, N] in fp32: head mean, CLS column dropped, not renormalised."""
        return self.read(Signal.CLS_ATTENTION)

    @property
    def image_key(self) -> Tensor:
        """Content digest [I] int64: equal pictures have equal keys in any batch."""
        return self.read(Signal.IMAGE_KEY)

    @property
    def images(self) -> int:
        """Number of images I."""
        return self.origin.shape[0]

    @property
    def tokens(self) -> int:
        """Number of tokens N that each image still has."""
        return self.origin.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the signals live."""
        return self.origin.device
