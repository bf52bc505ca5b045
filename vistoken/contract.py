"""The contract between methods and hosts: signals a method may read, places where it may act.

A *method* is mathematics on tensors and knows no model. A *host* knows one model family and no
method. They meet here: a method lists `Stage`s (a place, and the signals it wants there), the host
says which signals and places it offers, and at run time it calls the method at each stage with a
`View` of the signals. `attach` refuses a method whose signals or places the host lacks, by name,
before anything is edited.

A view never is ragged: pictures of different sizes in one call are grouped by their `Picture`, and
the method is called once for each group.

Shapes: I pictures of one group (inside the tower: tiles), N tokens that each of them still has
and the method may choose from, C text width, D vision width, H heads, T text tokens, P prefix
tokens of the tower (the CLS token, registers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from vistoken.cost import TransformerShape
from vistoken.language import LanguageRows, Text
from vistoken.pictures import Picture


class Signal(str, Enum):
    """What a method may ask a host to read for it."""

    FEATURES = "projected features"  # [I, N, C] after the projector, in the model's dtype
    ENCODED = "encoder features"  # [I, N, E] what the projector reads for each token
    PROJECTOR = "projector"  # the projector as a module, [..., E] -> [..., C]
    CLS_ATTENTION = "CLS attention row"  # [I, N] fp32, head mean; without CLS: attention received
    VISION_QUERIES = "vision queries"  # [I, H, P + N, D / H]; P is View.prefix
    VISION_KEYS = "vision keys"  # [I, H, P + N, D / H]
    VISION_VALUES = "vision values"  # [I, H, P + N, D / H]
    HIDDEN = "hidden states"  # [I, N, width] what the stage drops or merges
    SIZES = "token sizes"  # [I, N] fp32, how many original tokens each one stands for
    IMAGE_KEY = "image key"  # [I] int64, a digest of the picture's content
    TEXT_EMBEDDINGS = "text embeddings"  # Text: embeddings of the prompt after the row's images
    LLM_ATTENTION = "LLM attention rows"  # LanguageRows of the stage's LLM layer


class Place(str, Enum):
    """Where a method may act."""

    VISION_BLOCK = "inside a vision layer"  # merge tokens between attention and MLP of layer l
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
    """One moment at which a method is called: a place, its layer, the signals wanted there.

    At `PROJECTED`, `layer` is the vision layer whose attention signals are meant; None is the
    layer whose output is projected.
    """

    place: Place
    layer: int | None = None
    signals: frozenset[Signal] = frozenset()

    def __str__(self) -> str:
        return self.place.value if self.layer is None else f"{self.place.value} {self.layer}"


@dataclass(frozen=True)
class Selection:
    """Which tokens stay: `indices` [I, K] int64 ascending into the N tokens of the view.

    A method that merges also gives `tokens` [I, K, width], which replace the picked ones (width
    C after the projector, otherwise that of the hidden states there); `indices` then name, for
    each merged token, the one whose position it takes. `sizes` [I, K] fp32 says how many original
    tokens each one stands for: later layers of the tower weigh it by that in their attention.
    `hidden` [I, T, K] bool, at an LLM layer only: pairs of a text token of the prompt (as in
    `LanguageRows`) and a visual token that stays which all later layers must not see.
    """

    indices: Tensor
    tokens: Tensor | None = None
    sizes: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What a host tells a method about the model, before and while it runs.

    `feature_layer` is the vision layer whose output is projected; `grid` is (rows, columns) of
    the visual tokens of a picture of the usual size (of one tile, where a picture is `tiled`);
    `vision` and `text` describe the two transformers for the cost model. `position_axes` is 3
    where the LLM numbers pictures in time, height and width. `first_text_stage` is the first LLM
    layer after which tokens may be dropped.
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
    tiled: bool = False
    position_axes: int = 1
    first_text_stage: int = 0

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one picture (or tile) of the usual size."""
        return self.grid[0] * self.grid[1]


@dataclass
class View:
    """What a method sees at one stage: lazily read signals, and memory that lives for one call.

    `origin` [I, N] holds the index, among the picture's own tokens in reading order, of each
    token that is still there, so that a method can know where it lay. `visible` [I, N] bool marks
    tokens that will reach the LLM, where some will not (padding of a tiled picture); None: all
    will. `prefix` counts the entries before the tokens in vision queries, keys and values.
    `memory` is the method's own, for one group of pictures, and is dropped with the call.
    """

    stage: Stage
    facts: ModelFacts
    picture: Picture
    origin: Tensor
    memory: dict[str, Any]
    reader: Callable[[Signal], Any]
    visible: Tensor | None = None
    prefix: int = 0
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
        """CLS attention row [I, N] in fp32: head mean, CLS column dropped, not renormalised.

        Of a tower without a CLS token: the mean attention that each token receives.
        """
        return self.read(Signal.CLS_ATTENTION)

    @property
    def hidden(self) -> Tensor:
        """Hidden states [I, N, width] that this stage acts on."""
        return self.read(Signal.HIDDEN)

    @property
    def image_key(self) -> Tensor:
        """Content digest [I] int64: equal pictures have equal keys in any batch."""
        return self.read(Signal.IMAGE_KEY)

    @property
    def text(self) -> Text:
        """Embeddings of the text tokens behind the row's images."""
        return self.read(Signal.TEXT_EMBEDDINGS)

    @property
    def language(self) -> LanguageRows:
        """Attention of the stage's LLM layer, for the rows of text tokens."""
        return self.read(Signal.LLM_ATTENTION)

    @property
    def images(self) -> int:
        """Number of pictures (inside the tower: tiles) I."""
        return self.origin.shape[0]

    @property
    def tokens(self) -> int:
        """Number of tokens N that each picture still has."""
        return self.origin.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the signals live."""
        return self.origin.device
