"""One pass through the vision tower of a VLM: what probes note, and stages inside the tower.

The hooks are on the model for as long as a method is attached, and do nothing unless a call of
the same host is current in this thread, so other uses of the tower run untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vistoken.contract import Place, Selection, Signal, Stage, View
from vistoken.errors import AttachError
from vistoken.kernels import attention_row, gather_tokens
from vistoken.pruning import Pruner
from vistoken.report import Ledger

if TYPE_CHECKING:
    from vistoken.adapters.vlm import VisionLanguageHost

ATTENTION_SIGNALS = frozenset(
    {Signal.CLS_ATTENTION, Signal.VISION_QUERIES, Signal.VISION_KEYS, Signal.VISION_VALUES}
)


@dataclass(frozen=True)
class Entry:
    """One attached pruning method, its stages and where its calls are noted."""

    method: Pruner
    stages: tuple[Stage, ...]
    ledger: Ledger


@dataclass
class TowerCall:
    """The state of one pass through the vision tower; it dies with the call.

    attention_inputs: the normed hidden states that entered self-attention, by layer, as probes
    noted them. origin [I, N]: raster index of every token still there. lengths: the sequence
    length from a vision layer on, for the layers before which tokens were dropped. projected: how
    many tokens of each image went through the projector.
    """

    host: VisionLanguageHost
    entries: tuple[Entry, ...]
    pixel_values: Tensor
    origin: Tensor
    features: Tensor | None = None
    encoded: Tensor | None = None
    attention_inputs: dict[int, Tensor] = field(default_factory=dict)
    projected: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    memories: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run_stage(self, entry: Entry, stage: Stage) -> Selection | None:
        """Ask the method to choose at `stage`, and follow what it chose in `origin`.

        A method whose budget is met already is not asked.
        """
        keep = entry.method.budget(self.host.facts.visual_tokens)
        if keep >= self.origin.shape[1]:
            return None
        memory = self.memories.setdefault(entry.method.name, {})
        view = View(
            stage, self.host.facts, self.origin, memory, lambda signal: self.read(stage, signal)
        )
        chosen = entry.method.select(view, keep)
        if chosen is not None:
            self.origin = self.origin.gather(1, chosen.indices)
        return chosen

    def read(self, stage: Stage, signal: Signal) -> Any:
        """Compute one signal for a stage."""
        host = self.host
        if signal is Signal.FEATURES:
            return self.features
        if signal is Signal.ENCODED:
            return self.encoded
        if signal is Signal.PROJECTOR:
            return host.projector()
        if signal is Signal.IMAGE_KEY:
            return image_keys(self.pixel_values)
        layer = host.facts.feature_layer if stage.layer is None else stage.layer
        hidden = self.attention_inputs[layer]
        if signal is not Signal.CLS_ATTENTION:
            return host.vision_heads(layer, hidden, signal)
        with torch.no_grad():
            query = host.vision_heads(layer, hidden[:, :1], Signal.VISION_QUERIES)
            keys = host.vision_heads(layer, hidden, Signal.VISION_KEYS)
            row = attention_row(query, keys, host.vision_scale(layer))
        return row.mean(dim=1)[:, 0, host.facts.prefix_tokens :]


_TOWER: ContextVar[TowerCall | None] = ContextVar("vistoken_tower_call", default=None)


@contextmanager
def current_call(call: TowerCall) -> Iterator[None]:
    """Make `call` the one that probes of this thread write to."""
    token = _TOWER.set(call)
    try:
        yield
    finally:
        _TOWER.reset(token)


def image_keys(pixel_values: Tensor) -> Tensor:
    """Digest the pictures [I, ...] into [I] int64 keys, the same in every batch and on any device.

    A wrapping sum of the pixels' bit patterns times odd weights, so the order of summation does
    not matter.
    """
    bits = pixel_values.float().flatten(1).contiguous().view(torch.int32).long()
    weights = torch.arange(bits.shape[1], device=bits.device) * 0x9E3779B97F4A7C15 % (1 << 61)
    return (bits * (2 * weights + 1)).sum(1)


@dataclass(frozen=True)
class NoteAttentionInput:
    """Hook before a vision layer's self-attention: notes the normed hidden states."""

    host: VisionLanguageHost
    layer: int

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = _TOWER.get()
        if call is not None and call.host is self.host:
            hidden = args[0] if args else kwargs["hidden_states"]
            call.attention_inputs[self.layer] = hidden


@dataclass(frozen=True)
class DropAfterLayer:
    """Hook before vision layer l + 1: drops the tokens that a stage after layer l gave up."""

    host: VisionLanguageHost
    layer: int

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = _TOWER.get()
        if call is None or call.host is not self.host:
            return None
        if torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False):
            raise AttachError(
                "Pruning inside the vision tower does not work with gradient checkpointing, which "
                "runs the layers again outside the call; switch checkpointing off for the tower."
            )
        for entry in call.entries:
            for stage in entry.stages:
                if stage.place is Place.VISION_LAYER and stage.layer == self.layer:
                    args = (self._drop(call, entry, stage, args[0]), *args[1:])
        return args, kwargs

    def _drop(self, call: TowerCall, entry: Entry, stage: Stage, hidden: Tensor) -> Tensor:
        chosen = call.run_stage(entry, stage)
        if chosen is None:
            return hidden
        prefix = self.host.facts.prefix_tokens
        patches = chosen.tokens
        if patches is None:
            patches = gather_tokens(hidden[:, prefix:], chosen.indices)
        call.lengths[self.layer + 1] = prefix + patches.shape[1]
        return torch.cat([hidden[:, :prefix], patches.to(hidden.dtype)], dim=1)


@dataclass(frozen=True)
class NoteEncoded:
    """Hook before the projector: notes what it reads."""

    host: VisionLanguageHost

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = _TOWER.get()
        if call is not None and call.host is self.host:
            call.encoded = args[0]
