"""Hosts whose vision tower reads a batch of equal tiles: CLIP, SigLIP, InternViT.

Everything here is per tile; how tiles make up a picture is left to `pack`, which the identity
serves where a picture is one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vistoken.adapters.vlm import VisionLanguageHost
from vistoken.adapters.vlm_tower import TowerCall, image_keys
from vistoken.contract import Place, Signal, Stage
from vistoken.cost import TransformerShape
from vistoken.errors import AttachError, ModelNotSupported
from vistoken.kernels import attention_received, attention_row
from vistoken.pictures import Picture

_PROJECTIONS = {
    Signal.VISION_QUERIES: "q_proj",
    Signal.VISION_KEYS: "k_proj",
    Signal.VISION_VALUES: "v_proj",
}
HEADS = frozenset(_PROJECTIONS)
INSIDE = frozenset({Place.VISION_BLOCK, Place.VISION_LAYER})
RECEIVED = (
    "the vision tower has no CLS token: the mean attention that each token receives stands in "
    "for the CLS attention row"
)


class GridTowerHost(VisionLanguageHost):
    """Base of hosts whose tower reads tiles [tiles, 3, side, side] into [tiles, P + N, D]."""

    def tower(self) -> Any:
        """The vision tower; its `encoder.layers` are the vision layers."""
        return self.model.model.vision_tower

    def vision_layers(self) -> Sequence[nn.Module]:
        return self.tower().encoder.layers

    def vision_attention(self, layer: int) -> nn.Module:
        attention: Any = self.vision_layers()[layer]
        return attention.self_attn

    def vision_mlp(self, layer: int) -> tuple[nn.Module, nn.Module]:
        block: Any = self.vision_layers()[layer]
        return block.layer_norm2, block.mlp

    def vision_scale(self, layer: int) -> float:
        """The factor on the attention logits of a vision layer."""
        attention: Any = self.vision_attention(layer)
        return attention.scale

    def vision_heads(self, layer: int, hidden: Tensor, signal: Signal) -> Tensor:
        """Queries, keys or values [tiles, H, S, D / H] of `hidden` [tiles, S, D]."""
        attention: Any = self.vision_attention(layer)
        flat = getattr(attention, _PROJECTIONS[signal])(hidden)
        return flat.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def projector(self) -> nn.Module:
        return self.model.model.multi_modal_projector

    def image_keys(self, vision: dict[str, Any]) -> Tensor:
        return image_keys(vision["pixel_values"])

    # --- signals --------------------------------------------------------------------------------

    def tile_signal(self, call: TowerCall, signal: Signal, layer: int) -> Tensor:
        if signal is Signal.ENCODED:
            assert call.encoded is not None  # noted by a probe that attach installed
            return call.encoded
        hidden = call.noted["attention", layer]
        if signal in HEADS:
            return self.vision_heads(layer, hidden, signal)
        prefix = self.facts.prefix_tokens
        with torch.no_grad():
            keys = self.vision_heads(layer, hidden, Signal.VISION_KEYS)
            if prefix:
                query = self.vision_heads(layer, hidden[:, :1], Signal.VISION_QUERIES)
                row = attention_row(query, keys, self.vision_scale(layer))[:, :, 0]
            else:
                query = self.vision_heads(layer, hidden, Signal.VISION_QUERIES)
                row = attention_received(query, keys, self.vision_scale(layer))
        return row.mean(dim=1)[:, prefix:]

    def tower_signal(
        self, call: TowerCall, signal: Signal, layer: int
    ) -> Sequence[Tensor] | Tensor:
        if signal is Signal.SIZES:
            if call.sizes is not None:
                return self.pack(call, call.sizes)
            if call.origin is not None:
                return self.pack(call, torch.ones(call.origin.shape, device=self._device))
            return [torch.ones(one.tokens, device=self._device) for one in call.pictures]
        found = self.tile_signal(call, signal, layer)
        if signal not in HEADS:
            return self.pack(call, found)
        by_token = found[:, :, self.facts.prefix_tokens :].transpose(1, 2)
        packed = self.pack(call, by_token)
        if isinstance(packed, Tensor):
            return packed.transpose(1, 2)
        return [one.transpose(0, 1) for one in packed]

    def pack(self, call: TowerCall, values: Tensor) -> Sequence[Tensor] | Tensor:
        """Values of tile tokens [tiles, N, ...] as those of each picture's tokens [n, ...]."""
        return values

    @property
    def _device(self) -> torch.device:
        return self.tower().device

    # --- cost -----------------------------------------------------------------------------------

    def tile_count(self, pictures: Sequence[Picture]) -> int:
        """Tiles that the tower reads for these pictures."""
        return sum(len(tiles) for tiles in self.tiles(pictures))

    def tower_flops(
        self, pictures: Sequence[Picture], lengths: dict[int, int], projected: int | None
    ) -> int:
        facts, tiles = self.facts, self.tile_count(pictures)
        per_tile, length = [], facts.visual_tokens + facts.prefix_tokens
        for layer in range(facts.vision_layers):
            length = lengths.get(layer, length)
            per_tile.append(length)
        if projected is None:
            projected = tiles * facts.visual_tokens
        tower = tiles * (2 * facts.patch_embedding_macs + facts.vision.flops(per_tile))
        return tower + 2 * facts.projector_macs * projected

    # --- checks ---------------------------------------------------------------------------------

    def _check_layer(self, stage: Stage) -> None:
        super()._check_layer(stage)
        chosen = self.model.config.vision_feature_layer
        if stage.place in INSIDE and not isinstance(chosen, int) and len(chosen) > 1:
            raise AttachError(
                f"vision_feature_layer={chosen} joins the outputs of several vision layers, which "
                "differ in length when tokens are dropped inside the tower; use a method that acts "
                "after the projector."
            )

    def check_vision_arguments(self, given: dict[str, Any]) -> None:
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            wanted = getattr(self.model.config, name, None)
            if given.get(name) is not None and given[name] != wanted:
                raise AttachError(
                    f"{name}={given[name]!r} differs from the model's {wanted!r}, for which the "
                    "methods were attached; set it in model.config before attaching."
                )


def look_up(model: nn.Module, paths: Sequence[str], title: str) -> None:
    """Check that every dotted path leads to something; raises `ModelNotSupported` naming it."""
    for path in paths:
        found: Any = model
        for name in path.split("."):
            found = getattr(found, name, None)
            if found is None:
                raise ModelNotSupported(
                    f"{type(model).__name__} was recognised as {title}, but has no {path!r}. "
                    f"Looked for: {', '.join(paths)}. Only checkpoints built of these parts are "
                    "supported."
                )


def feature_layer(chosen: int | Sequence[int], layers: int, title: str) -> int:
    """The vision layer whose output is projected, from an index into the hidden states."""
    index = chosen if isinstance(chosen, int) else chosen[-1]
    state = index % (layers + 1)
    if state == 0:
        raise ModelNotSupported(
            f"vision_feature_layer={chosen!r} takes the embeddings, before any vision layer; "
            f"{title} is supported with features from a layer (-2 in the published models)."
        )
    return state - 1


def text_shape(model: Any) -> TransformerShape:
    """The sizes of the LLM of a transformers VLM."""
    text = model.config.text_config
    heads = text.num_attention_heads
    mlp = model.model.language_model.layers[0].mlp
    return TransformerShape(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        mlp_width=text.intermediate_size,
        mlp_matrices=3 if hasattr(mlp, "gate_proj") else 2,
        vocab=text.vocab_size,
    )


def vision_shape(vision: Any, mlp_matrices: int = 2) -> TransformerShape:
    """The sizes of a CLIP-like vision tower."""
    return TransformerShape(
        layers=vision.num_hidden_layers,
        width=vision.hidden_size,
        heads=vision.num_attention_heads,
        kv_heads=vision.num_attention_heads,
        head_dim=vision.hidden_size // vision.num_attention_heads,
        mlp_width=vision.intermediate_size,
        mlp_matrices=mlp_matrices,
    )
