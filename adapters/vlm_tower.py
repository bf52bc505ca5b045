"""One pass through the vision tower of a VLM: what probes note, and stages inside the tower.

The hooks are on the model for as long as a method is attached, and do nothing unless a call of
the same host is current in this thread, so other uses of the tower run untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vistoken.contract import Place, Selection, Signal, Stage, View
from vistoken.errors import AttachError
from vistoken.kernels import gather_tokens
from vistoken.pictures import Picture, plain
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

    def at(self, place: Place, layer: int | None = None) -> Iterator[Stage]:
        """The stages at a place, and at a layer where one is given."""
        for stage in self.stages:
            if stage.place is place and layer in (None, stage.layer):
                yield stage


@dataclass
class TowerCall:
    """The state of one pass through the vision tower; it dies with the call.

    vision: the call's arguments for the tower. budgets: for each entry the tokens of a tile that
    stay (None: all). origin [tiles, N]: raster index in its tile of every token still there, once
    the tower began to drop; None before. visible [tiles, all] bool: tokens that reach the LLM,
    None if all do. sizes [tiles, N]: how many tokens each stands for, None if one. packed_origin:
    what is left of each picture, where tiles were put together. projected: tokens that went
    through the projector, None for all. noted: what probes noted, by kind and layer. merged: what
    a layer's merging left, by layer. lengths: the sequence length from a vision layer on, for the
    layers before which tokens were dropped. extra: what a host adds for itself.
    """

    host: VisionLanguageHost
    entries: tuple[Entry, ...]
    pictures: tuple[Picture, ...]
    vision: dict[str, Any]
    budgets: tuple[int | None, ...] = ()
    origin: Tensor | None = None
    visible: Tensor | None = None
    sizes: Tensor | None = None
    packed_origin: Sequence[Tensor] | Tensor | None = None
    projected: int | None = None
    encoded: Tensor | None = None
    noted: dict[tuple[str, int], Any] = field(default_factory=dict)
    merged: dict[int, Tensor] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    memories: dict[int, dict[str, Any]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def run_stage(self, number: int, stage: Stage, hidden: Tensor) -> Selection | None:
        """Ask entry `number` to choose at `stage`, and follow its choice in `origin` and `sizes`.

        hidden [tiles, N, D]: the tokens without prefix. A method whose budget is met is not asked.
        """
        facts, keep = self.host.facts, self.budgets[number]
        rows, tokens = hidden.shape[:2]
        if keep is None or tokens <= keep:
            return None
        if self.origin is None:
            self.origin = torch.arange(tokens, device=hidden.device).expand(rows, tokens)
        visible = None if self.visible is None else self.visible.gather(1, self.origin)
        view = View(
            stage,
            facts,
            plain(*facts.grid),
            self.origin,
            self.memories.setdefault(number, {}),
            self._reader(stage, hidden),
            visible,
            facts.prefix_tokens,
        )
        chosen = self.entries[number].method.select(view, keep)
        if chosen is not None:
            self.origin = self.origin.gather(1, chosen.indices)
            if chosen.sizes is not None:
                self.sizes = chosen.sizes
            elif self.sizes is not None:
                self.sizes = self.sizes.gather(1, chosen.indices)
        return chosen

    def _reader(self, stage: Stage, hidden: Tensor) -> Callable[[Signal], Any]:
        def read(signal: Signal) -> Any:
            if signal is Signal.HIDDEN:
                return hidden
            if signal is Signal.SIZES:
                ones = torch.ones(hidden.shape[:2], device=hidden.device)
                return ones if self.sizes is None else self.sizes
            if signal is Signal.IMAGE_KEY:
                return self.host.tile_keys(self.vision)
            assert stage.layer is not None  # stages inside the tower name their layer
            return self.host.tile_signal(self, signal, stage.layer)

        return read

    def sizes_bias(self) -> Tensor | None:
        """log(size) [tiles, 1, 1, P + N] for the attention logits; None while nothing merged."""
        if self.sizes is None:
            return None
        prefix = self.sizes.new_zeros(len(self.sizes), self.host.facts.prefix_tokens)
        return torch.cat([prefix, self.sizes.log()], dim=1)[:, None, None]


_TOWER: ContextVar[TowerCall | None] = ContextVar("vistoken_tower_call", default=None)


@contextmanager
def current_call(call: TowerCall) -> Iterator[None]:
    """Make `call` the one that probes of this thread write to."""
    token = _TOWER.set(call)
    try:
        yield
    finally:
        _TOWER.reset(token)


def image_keys(pixels: Tensor) -> Tensor:
    """Digest pictures [I, ...] into [I] int64 keys, the same in every batch and on any device.

    A wrapping sum of the pixels' bit patterns times odd weights, so the order of summation does
    not matter.
    """
    bits = pixels.float().flatten(1).contiguous().view(torch.int32).long()
    weights = torch.arange(bits.shape[1], device=bits.device) * 0x9E3779B97F4A7C15 % (1 << 61)
    return (bits * (2 * weights + 1)).sum(1)


@dataclass(frozen=True)
class _TowerHook:
    host: VisionLanguageHost
    layer: int

    def _call(self) -> TowerCall | None:
        call = _TOWER.get()
        return call if call is not None and call.host is self.host else None


class NoteAttentionInput(_TowerHook):
    """Hook before a vision layer's self-attention: notes what enters it."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = self._call()
        if call is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            call.noted["attention", self.layer] = hidden
            call.noted["arguments", self.layer] = kwargs


class WeighAttention(_TowerHook):
    """Hook before a vision layer's self-attention: adds log(size) to the logits of tokens."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = self._call()
        bias = None if call is None else call.sizes_bias()
        if bias is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        given = dict(kwargs)
        if len(args) > 1:
            args = (args[0], bias.to(hidden.dtype), *args[2:])
        else:
            given["attention_mask"] = bias.to(hidden.dtype)
        return args, given


class MergeInBlock(_TowerHook):
    """Hook before the norm that leads to a layer's MLP: merges tokens between attention and MLP.

    What the MLP then reads is shorter than what the layer adds its output to; `FinishBlock` and
    `DropAfterLayer` put that right.
    """

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = self._call()
        if call is None:
            return None
        hidden, prefix = args[0], self.host.facts.prefix_tokens
        before = hidden
        for number, entry in enumerate(call.entries):
            for stage in entry.at(Place.VISION_BLOCK, self.layer):
                hidden = _replace(call, number, stage, hidden, prefix)
        if hidden is before:
            return None
        call.merged[self.layer] = hidden
        call.lengths[self.layer + 1] = hidden.shape[1]
        call.extra["block_length"] = before.shape[1]
        return (hidden, *args[1:]), kwargs


class FinishBlock(_TowerHook):
    """Hook after a layer's MLP: notes the merged tokens' sum, gives the layer a blank to add."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._call()
        merged = None if call is None else call.merged.get(self.layer)
        if call is None or merged is None:
            return None
        scale = self.host.vision_mlp_scale(self.layer)
        call.merged[self.layer] = merged + (output if scale is None else scale * output)
        blank = output.new_zeros(1, 1, output.shape[-1])
        return blank.expand(len(output), call.extra["block_length"], -1)


class DropAfterLayer(_TowerHook):
    """Hook before vision layer l + 1: drops the tokens that a stage at layer l gave up."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = self._call()
        if call is None:
            return None
        if torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False):
            raise AttachError(
                "Pruning inside the vision tower does not work with gradient checkpointing, which "
                "runs the layers again outside the call; switch checkpointing off for the tower."
            )
        hidden = call.merged.pop(self.layer, args[0])
        for number, entry in enumerate(call.entries):
            for stage in entry.at(Place.VISION_LAYER, self.layer):
                hidden = _replace(call, number, stage, hidden, self.host.facts.prefix_tokens)
                call.lengths[self.layer + 1] = hidden.shape[1]
        return (hidden, *args[1:]), kwargs


def _replace(call: TowerCall, number: int, stage: Stage, hidden: Tensor, prefix: int) -> Tensor:
    """The hidden states [tiles, P + K, D] after a stage's choice."""
    chosen = call.run_stage(number, stage, hidden[:, prefix:])
    if chosen is None:
        return hidden
    tokens = chosen.tokens
    if tokens is None:
        tokens = gather_tokens(hidden[:, prefix:], chosen.indices)
    return torch.cat([hidden[:, :prefix], tokens.to(hidden.dtype)], dim=1)


@dataclass(frozen=True)
class NoteEncoded:
    """Hook before the projector: notes what it reads."""

    host: VisionLanguageHost

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = _TOWER.get()
        if call is not None and call.host is self.host:
            seen = args[0] if args else next(iter(kwargs.values()))
            call.encoded = seen if call.encoded is None else torch.cat([call.encoded, seen])


def stack(found: Sequence[Tensor] | Tensor, members: tuple[int, ...]) -> Tensor:
    """The tensors of some pictures [G, ...]; all of them in order are not copied."""
    if isinstance(found, Tensor) and members == tuple(range(len(found))):
        return found
    return torch.stack([found[member] for member in members])
