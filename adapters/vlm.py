"""What every transformers vision-language host shares: the visual pipeline of one prefill.

Data flow of a pruned prefill: pixels -> vision tower (probes note what the methods asked for,
in-tower stages drop tokens) -> projector -> `select` -> gather -> shorter prompt -> LLM.

Two edits lead every call through it. A class mixin gives `generate` the short prompt as
`inputs_embeds` while it keeps the caller's long `input_ids` for its own bookkeeping, so returned
sequences, streamers, length limits and logits processors see what they would have seen. A hook
before `forward` does the same for a direct call and remembers on the KV cache how the prompt was
shortened, so that a decode loop written against the long prompt goes on working.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vistoken import prompt
from vistoken.adapters.vlm_tower import (
    ATTENTION_SIGNALS,
    DropAfterLayer,
    Entry,
    NoteAttentionInput,
    NoteEncoded,
    TowerCall,
    current_call,
)
from vistoken.contract import Place, Signal, Stage
from vistoken.edits import Edits
from vistoken.errors import AttachError, DataError
from vistoken.host import Host
from vistoken.kernels import gather_tokens
from vistoken.method import Method
from vistoken.pruning import Pruner
from vistoken.report import CallRecord, Ledger

PIPELINE = "_vistoken_pipeline"


class VisionLanguageHost(Host):
    """Base of hosts whose model is a transformers VLM with image placeholders in the prompt.

    A subclass says where the parts are; the pipeline, the prompt and the lifecycle are here.
    """

    signals: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.FEATURES, Signal.ENCODED, Signal.PROJECTOR, Signal.IMAGE_KEY, *ATTENTION_SIGNALS}
    )
    places: ClassVar[frozenset[Place]] = frozenset({Place.VISION_LAYER, Place.PROJECTED})
    forward_names: ClassVar[tuple[str, ...]]  # leading parameters of forward, in order
    vision_arguments: ClassVar[tuple[str, ...]]  # arguments that only the tower reads

    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """The token id of an image placeholder."""

    @abstractmethod
    def vision_layers(self) -> Sequence[nn.Module]:
        """The layers of the vision tower."""

    @abstractmethod
    def vision_attention(self, layer: int) -> nn.Module:
        """The self-attention module of a vision layer."""

    @abstractmethod
    def vision_heads(self, layer: int, hidden: Tensor, signal: Signal) -> Tensor:
        """Queries, keys or values [I, H, S, D / H] of `hidden` [I, S, D] at a vision layer."""

    @abstractmethod
    def vision_scale(self, layer: int) -> float:
        """The factor on the attention logits of a vision layer."""

    @abstractmethod
    def projector(self) -> nn.Module:
        """The module from tower features to LLM embeddings."""

    @abstractmethod
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Projected features [I, N, C] of pictures, through the model's own code."""

    @abstractmethod
    def image_count(self, pixel_values: Tensor) -> int:
        """Number of images in `pixel_values`; raises `DataError` when the shape is wrong."""

    @abstractmethod
    def check_vision_arguments(self, given: dict[str, Any]) -> None:
        """Raise `AttachError` when a call's vision arguments differ from the config's."""

    def install(
        self, method: Method, stages: tuple[Stage, ...], edits: Edits, ledger: Ledger
    ) -> None:
        """Install a pruning method: probes, in-tower stages, and the shortened prompt."""
        if not isinstance(method, Pruner):
            raise AttachError(f"{method.name} is not a pruning method; {self.title} cannot run it.")
        self._install_probes(stages, edits)
        old: Pipeline | None = self.model.__dict__.get(PIPELINE)
        entries = (*(old.entries if old else ()), Entry(method, stages, ledger))
        host = old.host if old else self
        edits.set_attribute(self.model, PIPELINE, Pipeline(host, entries))
        if old is None:
            self._install_calls(edits)

    def _install_calls(self, edits: Edits) -> None:
        from vistoken.adapters.vlm_calls import PrunedGeneration, RememberOnCache, ShortenForward

        edits.mix_in(self.model, PrunedGeneration)
        edits.hook_before(self.model, ShortenForward())
        edits.hook_after(self.model, RememberOnCache())

    def _install_probes(self, stages: tuple[Stage, ...], edits: Edits) -> None:
        host = self.model.__dict__[PIPELINE].host if PIPELINE in self.model.__dict__ else self
        layers = self.vision_layers()
        for stage in stages:
            layer = self.facts.feature_layer if stage.layer is None else stage.layer
            if stage.signals & ATTENTION_SIGNALS:
                probe = NoteAttentionInput(host, layer)
                edits.hook_before(self.vision_attention(layer), probe)
            if stage.place is Place.VISION_LAYER:
                if not 0 <= layer < self.facts.feature_layer:
                    raise AttachError(
                        f"A stage after vision layer {layer} is outside this model: features are "
                        f"taken after layer {self.facts.feature_layer}, so layers 0 to "
                        f"{self.facts.feature_layer - 1} can be followed by pruning."
                    )
                edits.hook_before(layers[layer + 1], DropAfterLayer(host, layer))
            if Signal.ENCODED in stage.signals:
                edits.hook_before(self.projector(), NoteEncoded(host))


@dataclass(frozen=True)
class ShortPrompt:
    """What the LLM reads instead of the long prompt, and how the two map to each other."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    shortening: prompt.Shortening


@dataclass(frozen=True)
class Pipeline:
    """The pruning methods on one model, in the order they act."""

    host: VisionLanguageHost
    entries: tuple[Entry, ...]

    @property
    def positions(self) -> str:
        """`original` if any method asks for it, else `renumber`."""
        asked = {entry.method.positions for entry in self.entries}
        return "original" if "original" in asked else "renumber"

    def is_neutral(self) -> bool:
        """Whether every budget keeps every token, so that the model must run untouched."""
        total = self.host.facts.visual_tokens
        return all(entry.method.budget(total) >= total for entry in self.entries)

    def note(self, images: int, rows: int, length: int) -> None:
        """Note a call that runs dense: neutral, or without images."""
        tower = (self._dense_length,) * self.host.facts.vision_layers
        total = self.host.facts.visual_tokens
        record = CallRecord(images, rows, length, length, None, tower, total, self._itemsize)
        self._write(record)

    def shorten(
        self,
        *,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        pixel_values: Tensor,
    ) -> ShortPrompt:
        """Encode and prune the images, and build the short prompt with their features in place.

        Shapes as transformers has them: input_ids [B, L] or inputs_embeds [B, L, C], a 2-D
        attention_mask [B, L] and position_ids [B or 1, L], pixel_values of all images in order.
        """
        host = self.host
        images = host.image_count(pixel_values)
        placeholders = self._placeholders(input_ids, inputs_embeds)
        seen = None if attention_mask is None else attention_mask.cpu()
        layout = prompt.read_layout(placeholders, images, host.facts.visual_tokens, seen)
        features, call = self._encode(pixel_values)
        device = features.device  # the caller may have left the prompt on the CPU
        plan = prompt.shorten(layout, call.origin)
        if inputs_embeds is None:
            ids = plan.take(_on(device, input_ids), host.image_token_id)
            embeds = _on(device, host.model.get_input_embeddings()(ids))
        else:
            embeds = gather_tokens(_on(device, inputs_embeds), plan.index)
        visual = (plan.visual_rows, plan.visual_columns)
        embeds = embeds.index_put(visual, features.to(embeds.dtype))
        mask = _on(device, attention_mask)
        if mask is None:
            mask = torch.ones(layout.rows, layout.length, dtype=torch.long, device=device)
        positions = self._positions(plan, _on(device, position_ids))
        self._note_short(call, layout, plan)
        return ShortPrompt(embeds, plan.take(mask, 0), positions, plan)

    def _placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if input_ids is not None:
            return input_ids.cpu() == self.host.image_token_id
        if inputs_embeds is None:
            raise DataError("The call has pixel_values but neither input_ids nor inputs_embeds.")
        embedding = self.host.model.get_input_embeddings()
        token = torch.tensor(self.host.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == embedding(token)).all(-1).cpu()

    def _encode(self, pixel_values: Tensor) -> tuple[Tensor, TowerCall]:
        host = self.host
        total = host.facts.visual_tokens
        grid = torch.arange(total, device=pixel_values.device)
        origin = grid.expand(host.image_count(pixel_values), total)
        call = TowerCall(host, self.entries, pixel_values, origin)
        with current_call(call):
            call.features = host.encode(pixel_values)
            call.origin = call.origin.to(call.features.device)
            call.projected = call.features.shape[1]
            for entry in self.entries:
                for stage in entry.stages:
                    if stage.place is Place.PROJECTED:
                        self._select_projected(call, entry, stage)
        return call.features, call

    @staticmethod
    def _select_projected(call: TowerCall, entry: Entry, stage: Stage) -> None:
        assert call.features is not None
        chosen = call.run_stage(entry, stage)
        if chosen is not None:
            kept = chosen.tokens
            call.features = gather_tokens(call.features, chosen.indices) if kept is None else kept

    def _positions(self, plan: prompt.Shortening, given: Tensor | None) -> Tensor | None:
        """Positions of the short prompt; None lets the model number its columns, as it would."""
        original = self.positions == "original"
        if given is None and not original:
            return None
        layout = plan.layout
        if given is None:
            given = torch.arange(layout.length, device=plan.index.device)
        given = given.expand(layout.rows, layout.length)
        return plan.take(given, 0) if original else plan.renumber(given)

    @property
    def _dense_length(self) -> int:
        facts = self.host.facts
        return facts.visual_tokens + facts.prefix_tokens

    @property
    def _itemsize(self) -> int:
        return self.host.model.get_input_embeddings().weight.dtype.itemsize

    def _note_short(self, call: TowerCall, layout: prompt.Layout, plan: prompt.Shortening) -> None:
        lengths, current = [], self._dense_length
        for layer in range(self.host.facts.vision_layers):
            current = call.lengths.get(layer, current)
            lengths.append(current)
        record = CallRecord(
            len(layout.image_rows),
            layout.rows,
            layout.length,
            plan.length,
            call.origin,
            tuple(lengths),
            call.projected,
            self._itemsize,
        )
        self._write(record)

    def _write(self, record: CallRecord) -> None:
        for entry in self.entries:
            entry.ledger.write(record)


def _on(device: torch.device, tensor: Any) -> Any:
    """The tensor, or None, on `device`, without waiting for it."""
    return None if tensor is None else tensor.to(device, non_blocking=True)
