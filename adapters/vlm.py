"""What every transformers vision-language host shares: where the parts are, and what is installed.

Data flow of a pruned prefill: pixels -> vision tower (probes note what the methods asked for,
in-tower stages drop tokens) -> projector -> `select` -> gather -> shorter prompt -> LLM, whose
layers run on fewer tokens still where a stage lies inside it.

Two edits lead every call through it. A class mixin gives `generate` the short prompt as
`inputs_embeds` while it keeps the caller's long `input_ids` for its own bookkeeping, so returned
sequences, streamers, length limits and logits processors see what they would have seen. A hook
before `forward` does the same for a direct call and remembers on the KV cache how the prompt was
shortened, so that a decode loop written against the long prompt goes on working.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vistoken.adapters.vlm_tower import (
    ATTENTION_SIGNALS,
    DropAfterLayer,
    Entry,
    FinishBlock,
    MergeInBlock,
    NoteAttentionInput,
    NoteEncoded,
    TowerCall,
    WeighAttention,
)
from vistoken.contract import Place, Signal, Stage
from vistoken.dominance import Masses
from vistoken.edits import Edits
from vistoken.errors import AttachError
from vistoken.host import Host
from vistoken.method import Method
from vistoken.pictures import Picture, plain
from vistoken.pruning import Pruner
from vistoken.report import CallRecord, Ledger

PIPELINE = "_vistoken_pipeline"
LANGUAGE_SIGNALS = frozenset({Signal.TEXT_EMBEDDINGS, Signal.LLM_ATTENTION})
_PROJECTIONS = {
    Signal.VISION_QUERIES: ("q_proj", "q_norm"),
    Signal.VISION_KEYS: ("k_proj", "k_norm"),
    Signal.VISION_VALUES: ("v_proj", None),
}


class VisionLanguageHost(Host):
    """Base of hosts whose model is a transformers VLM with image placeholders in the prompt.

    A subclass says where the parts are and how pictures become tokens; the pipeline, the prompt,
    the LLM and the lifecycle are here. Pictures are always listed in encoding order: all images
    as the model is given them, then all videos.
    """

    signals: ClassVar[frozenset[Signal]] = frozenset(
        {
            Signal.FEATURES,
            Signal.ENCODED,
            Signal.PROJECTOR,
            Signal.IMAGE_KEY,
            Signal.SIZES,
            Signal.HIDDEN,
            *ATTENTION_SIGNALS,
            *LANGUAGE_SIGNALS,
        }
    )
    places: ClassVar[frozenset[Place]] = frozenset({Place.PROJECTED, Place.LLM_LAYER})
    forward_names: ClassVar[tuple[str, ...]]  # leading parameters of forward, in order
    pixel_arguments: ClassVar[tuple[str, ...]] = ("pixel_values",)  # each brings pictures
    vision_arguments: ClassVar[tuple[str, ...]]  # other arguments that only the tower reads
    text_arguments: ClassVar[tuple[str, ...]] = ()  # others that fit the long prompt only
    injects: ClassVar[bool] = False  # whether the LLM reads more of the pictures than embeddings
    fallbacks: ClassVar[dict[Signal, str]] = {}  # what stands in for a signal the tower lacks

    # --- pictures and the vision tower --------------------------------------------------------

    @abstractmethod
    def placeholders(self) -> dict[str, int]:
        """The token id of the placeholder of each kind of picture: image, video."""

    @abstractmethod
    def pictures(self, vision: dict[str, Any], kinds: Tensor) -> list[Picture]:
        """The geometry of the pictures of a call, in encoding order.

        vision: the call's vision arguments that are not None. kinds [B, L] on the CPU: 0 for
        text, else 1 + the number of the placeholder's kind. Raises `DataError` when an argument
        has a wrong shape. Must not run the model.
        """

    @abstractmethod
    def encode(self, call: TowerCall) -> Sequence[Tensor] | Tensor:
        """Projected features of each picture [n, C], without separators.

        Runs the model's own tower and projector on `call.vision`; stages inside the tower have
        dropped tokens by then (`call.origin`). Equal pictures may come as one tensor [I, n, C].
        """

    @abstractmethod
    def tower_signal(
        self, call: TowerCall, signal: Signal, layer: int
    ) -> Sequence[Tensor] | Tensor:
        """A signal after the projector, for each picture, for the tokens that `encode` gave.

        ENCODED [n, E], CLS_ATTENTION [n], VISION_QUERIES / KEYS / VALUES [H, n, D / H] of vision
        layer `layer`, SIZES [n].
        """

    @abstractmethod
    def image_keys(self, vision: dict[str, Any]) -> Tensor:
        """A digest of each picture's content [I] int64, the same in any batch."""

    @abstractmethod
    def tower_flops(
        self, pictures: Sequence[Picture], lengths: dict[int, int], projected: int | None
    ) -> int:
        """FLOPs of vision tower and projector on these pictures.

        lengths: sequence length of a tile from a vision layer on, where tokens were dropped;
        projected: tokens that went through the projector, None for all.
        """

    @abstractmethod
    def projector(self) -> nn.Module:
        """The module from tower features to LLM embeddings."""

    @abstractmethod
    def vision_attention(self, layer: int) -> nn.Module:
        """The self-attention module of a vision layer."""

    @abstractmethod
    def check_vision_arguments(self, given: dict[str, Any]) -> None:
        """Raise `AttachError` when a call's vision arguments differ from the config's."""

    def separator(self) -> Tensor:
        """The embedding [C] of a newline token, for hosts whose pictures have separators."""
        raise NotImplementedError

    def long_positions(
        self, ids: Tensor | None, kinds: Tensor, mask: Tensor, vision: dict[str, Any]
    ) -> Tensor:
        """Positions [3, B, L] of the long prompt, for hosts with three position axes."""
        raise NotImplementedError

    def injected(self, found: dict[str, Any], copies: int) -> dict[str, Any]:
        """Arguments of the language model for a prefill, from what `inject` prepared."""
        raise NotImplementedError

    def inject(self, call: TowerCall, plan: Any, kept: list[Tensor]) -> dict[str, Any]:
        """What the LLM reads of the pictures beside their embeddings; nothing in most models.

        plan: the `Shortening`; kept: for each picture the indices of its tokens that stay.
        """
        return {}

    # --- stages inside the tower; only hosts that offer those places need them ----------------

    def vision_layers(self) -> Sequence[nn.Module]:
        """The layers of the vision tower."""
        raise NotImplementedError

    def vision_mlp(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """The norm that leads to a vision layer's MLP, and the MLP."""
        raise NotImplementedError

    def vision_mlp_scale(self, layer: int) -> Tensor | None:
        """The factor (LayerScale) on a vision layer's MLP output, if it has one."""
        return None

    def tile_signal(self, call: TowerCall, signal: Signal, layer: int) -> Tensor:
        """A signal inside the tower, for its rows (tiles): [tiles, N], [tiles, H, P + N, D / H]."""
        raise NotImplementedError

    def tile_keys(self, vision: dict[str, Any]) -> Tensor:
        """A digest of each tile's content [tiles]."""
        return self.image_keys(vision)

    def tiles(self, pictures: Sequence[Picture]) -> list[list[int]]:
        """For each picture the visible tokens of each of its tiles."""
        return [[picture.tokens] for picture in pictures]

    def visible(self, call: TowerCall) -> Tensor | None:
        """Which tokens of each tile [tiles, N] reach the LLM; None if all do."""
        return None

    # --- the LLM ------------------------------------------------------------------------------

    def language_model(self) -> Any:
        """The decoder, whose `layers` are hooked and whose `rotary_emb` turns positions."""
        return self.model.model.language_model

    def language_attention(self, layer: int) -> Any:
        """The self-attention module of an LLM layer."""
        return self.language_model().layers[layer].self_attn

    def language_scale(self, layer: int) -> float:
        """The factor on the attention logits of an LLM layer."""
        return self.language_attention(layer).scaling

    def language_heads(self, layer: int, hidden: Tensor, signal: Signal) -> Tensor:
        """Queries, keys or values [G, heads, K, D] of normed `hidden` [G, K, C], not rotated."""
        attention = self.language_attention(layer)
        projection, norm = _PROJECTIONS[signal]
        flat = getattr(attention, projection)(hidden)
        heads = flat.unflatten(-1, (-1, attention.head_dim))
        if norm is not None and hasattr(attention, norm):
            heads = getattr(attention, norm)(heads)
        return heads.transpose(1, 2)

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, S, D] of positions [B, S]."""
        return self.language_model().rotary_emb(hidden, positions)

    def plain_mask(self, hidden: Tensor, keys: int) -> Tensor:
        """A causal mask without padding for `hidden` [B, Q, C], the last Q of `keys` tokens.

        In the form that the LLM's attention takes: 2-D for flash attention, to be added for
        eager, else bool.
        """
        rows, queries = hidden.shape[:2]
        kind = self.language_model().config._attn_implementation or "eager"
        if "flash" in kind:
            return torch.ones(rows, keys, dtype=torch.long, device=hidden.device)
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=hidden.device)
        allowed = allowed.tril(keys - queries).expand(rows, 1, -1, -1)
        if kind != "eager":
            return allowed
        lowest = torch.finfo(hidden.dtype).min
        return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill(~allowed, lowest)

    # --- estimates ------------------------------------------------------------------------------

    def example(self) -> Picture:
        """A picture of the usual size, for estimates."""
        return plain(*self.facts.grid)

    def estimate(self, keep: int | None, text_tokens: int) -> CallRecord:
        """The record of one such picture in a prompt, of which `keep` tokens enter the LLM."""
        picture, layers = self.example(), self.facts.text_layers
        entering = picture.total if keep is None else keep
        flops = self.tower_flops([picture], {}, None)
        length = entering + text_tokens
        return CallRecord(
            (picture,),
            1,
            picture.total + text_tokens,
            (length,) * layers,
            (entering,) * layers,
            (entering,),
            None,
            flops,
            flops,
            2,
        )

    # --- diagnosis ------------------------------------------------------------------------------

    def attention_masses(self, inputs: Mapping[str, Any], new_tokens: int) -> Masses:
        """What generated tokens attend to; the prompt may be pruned before the LLM."""
        from vistoken.adapters.vlm_dominance import measure

        return measure(self, inputs, new_tokens)

    # --- installing ---------------------------------------------------------------------------

    def install(
        self, method: Method, stages: tuple[Stage, ...], edits: Edits, ledger: Ledger
    ) -> None:
        """Install a pruning method: probes, stages in tower and LLM, and the shortened prompt."""
        from vistoken.adapters.vlm_pipeline import Pipeline

        if not isinstance(method, Pruner):
            raise AttachError(f"{method.name} is not a pruning method; {self.title} cannot run it.")
        method.keeps_positions(self.facts)  # refuses what the model's positions cannot do
        for stage in stages:
            self._check_layer(stage)
        old: Pipeline | None = self.model.__dict__.get(PIPELINE)
        host = old.host if old else self
        for stage in stages:
            host._install_probes(stage, edits)
        host._install_tower_stages(stages, edits)
        host._install_language_stages(stages, edits)
        entries = (*(old.entries if old else ()), Entry(method, stages, ledger))
        edits.set_attribute(self.model, PIPELINE, Pipeline(host, entries))
        if old is None:
            self._install_calls(edits)

    def _check_layer(self, stage: Stage) -> None:
        facts, layer = self.facts, stage.layer
        if stage.place in (Place.VISION_LAYER, Place.VISION_BLOCK):
            if layer is None or not 0 <= layer < facts.feature_layer:
                raise AttachError(
                    f"A stage after vision layer {layer} is outside this model: features are "
                    f"taken after layer {facts.feature_layer}, so layers 0 to "
                    f"{facts.feature_layer - 1} can be followed by pruning."
                )
        elif stage.place is Place.LLM_LAYER:
            first, last = facts.first_text_stage, facts.text_layers - 2
            if layer is None or not first <= layer <= last:
                raise AttachError(
                    f"A stage after LLM layer {layer} is outside this model of {facts.text_layers} "
                    f"LLM layers: layers {first} to {last} can be followed by pruning."
                )

    def _install_probes(self, stage: Stage, edits: Edits) -> None:
        layer = stage.layer
        if stage.place is Place.LLM_LAYER:
            if Signal.LLM_ATTENTION in stage.signals and layer is not None:
                from vistoken.adapters.vlm_language import NoteLayerInput

                edits.hook_before(self.language_attention(layer), NoteLayerInput(self, layer))
            return
        if stage.signals & ATTENTION_SIGNALS:
            layer = self.facts.feature_layer if layer is None else layer
            edits.hook_before(self.vision_attention(layer), NoteAttentionInput(self, layer))
        if Signal.ENCODED in stage.signals:
            edits.hook_before(self.projector(), NoteEncoded(self))

    def _install_tower_stages(self, stages: tuple[Stage, ...], edits: Edits) -> None:
        blocks = [s.layer for s in stages if s.place is Place.VISION_BLOCK and s.layer is not None]
        drops = [s.layer for s in stages if s.place is Place.VISION_LAYER and s.layer is not None]
        for layer in dict.fromkeys(blocks):
            norm, mlp = self.vision_mlp(layer)
            edits.hook_before(norm, MergeInBlock(self, layer))
            edits.hook_after(mlp, FinishBlock(self, layer))
        for layer in dict.fromkeys([*blocks, *drops]):
            edits.hook_before(self.vision_layers()[layer + 1], DropAfterLayer(self, layer))
        if blocks:
            for layer in range(min(blocks) + 1, self.facts.vision_layers):
                edits.hook_before(self.vision_attention(layer), WeighAttention(self, layer))

    def _install_language_stages(self, stages: tuple[Stage, ...], edits: Edits) -> None:
        from vistoken.adapters.vlm_language import CutBeforeLayer

        layers = [s.layer for s in stages if s.place is Place.LLM_LAYER and s.layer is not None]
        if layers:
            decoder = self.language_model().layers
            for layer in range(min(layers) + 1, self.facts.text_layers):
                edits.hook_before(decoder[layer], CutBeforeLayer(self, layer))

    def _install_calls(self, edits: Edits) -> None:
        from vistoken.adapters.vlm_calls import PrunedGeneration
        from vistoken.adapters.vlm_forward import FinishForward, ShortenForward
        from vistoken.adapters.vlm_language import InjectArguments

        edits.mix_in(self.model, PrunedGeneration)
        edits.hook_before(self.model, ShortenForward())
        edits.hook_after(self.model, FinishForward())
        if self.injects:
            edits.hook_before(self.language_model(), InjectArguments(self))
