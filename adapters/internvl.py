"""InternVL: tiles through an InternViT tower, 2 x 2 patches to a token, in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vistoken.adapters.vlm_anyres import picture_keys
from vistoken.adapters.vlm_grid import (
    HEADS,
    GridTowerHost,
    feature_layer,
    look_up,
    text_shape,
    vision_shape,
)
from vistoken.adapters.vlm_tower import TowerCall, image_keys
from vistoken.contract import ModelFacts, Signal
from vistoken.errors import DataError, ModelNotSupported
from vistoken.pictures import Part, Picture

PARTS = (
    "model.vision_tower.embeddings.cls_token",
    "model.vision_tower.encoder.layer.0.attention.q_proj",
    "model.multi_modal_projector.linear_1",
    "model.multi_modal_projector.linear_2",
    "model.language_model.layers.0.self_attn.q_proj",
    "model.language_model.layers.0.mlp.gate_proj",
    "lm_head",
)
_TILES = "tiles of each picture"  # what `pictures` adds to the vision arguments of a call


class InternVLHost(GridTowerHost):
    """`InternVLForConditionalGeneration` with an `InternVLVisionModel` tower and a dense LLM.

    A tile of 448 px gives 16 x 16 tokens: pixel shuffle puts the 2 x 2 patches of a token side by
    side, and what the projector reads of it is these four vectors. CLS attention, queries, keys and
    values of a token are the means over its patches. Tokens are no patches, so pruning inside the
    tower is not offered.

    The tiles of a picture are told from the prompt, as the model does: an unbroken run of m times
    256 placeholders is a picture of m tiles (the thumbnail, if any, last), each a raster of its
    own. Every frame of a video stands between marks of its own in the prompt, so it is a picture
    of its own, with its own budget.
    """

    name: ClassVar[str] = "internvl"
    title: ClassVar[str] = "InternVL"
    classes: ClassVar[tuple[str, ...]] = ("InternVLForConditionalGeneration",)
    forward_names: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "pixel_values",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "inputs_embeds",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "labels",
        "logits_to_keep",
        "image_sizes",
    )
    vision_arguments: ClassVar[tuple[str, ...]] = (
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "image_sizes",
    )

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        look_up(model, PARTS, f"{self.title} with an InternViT tower and a dense LLM")
        config = self.model.config
        if config.vision_feature_select_strategy != "default":
            raise ModelNotSupported(
                "InternVL is supported with vision_feature_select_strategy='default' (the CLS "
                f"token is dropped), got {config.vision_feature_select_strategy!r}."
            )
        if not isinstance(config.vision_feature_layer, int):
            raise ModelNotSupported(
                "InternVL is supported with features from one vision layer, got "
                f"vision_feature_layer={config.vision_feature_layer!r}."
            )
        vision = config.vision_config
        size, patch = _edge(vision.image_size, "image_size"), _edge(vision.patch_size, "patch_size")
        self.tile = size
        self.patches = size // patch  # along an edge of a tile
        self.factor = round(1 / config.downsample_ratio)  # patches along an edge of a token
        if self.factor * config.downsample_ratio != 1 or self.patches % self.factor:
            raise ModelNotSupported(
                f"InternVL needs a downsample_ratio of 1 / n that divides the {self.patches} x "
                f"{self.patches} patches of a tile (0.5 in the published models), got "
                f"{config.downsample_ratio!r}."
            )
        self.facts = self._facts(patch)

    def _facts(self, patch: int) -> ModelFacts:
        config = self.model.config
        vision, layers = config.vision_config, config.vision_config.num_hidden_layers
        side, out = self.patches // self.factor, config.text_config.hidden_size
        return ModelFacts(
            host=self.name,
            grid=(side, side),
            prefix_tokens=1,
            vision_layers=layers,
            feature_layer=feature_layer(config.vision_feature_layer, layers, self.title),
            text_layers=config.text_config.num_hidden_layers,
            vision=vision_shape(vision),
            text=text_shape(self.model),
            patch_embedding_macs=self.patches**2 * 3 * patch**2 * vision.hidden_size,
            projector_macs=self.factor**2 * vision.hidden_size * out + out * out,
            tiled=True,
        )

    # --- where the parts are --------------------------------------------------------------------

    def placeholders(self) -> dict[str, int]:
        return {"image": self.model.config.image_token_id}

    def vision_layers(self) -> Sequence[nn.Module]:
        return self.tower().encoder.layer

    def vision_attention(self, layer: int) -> nn.Module:
        block: Any = self.vision_layers()[layer]
        return block.attention

    def vision_heads(self, layer: int, hidden: Tensor, signal: Signal) -> Tensor:
        attention: Any = self.vision_attention(layer)
        if signal is Signal.VISION_VALUES:
            flat = attention.v_proj(hidden)
        elif signal is Signal.VISION_KEYS:
            flat = attention.k_norm(attention.k_proj(hidden))
        else:
            flat = attention.q_norm(attention.q_proj(hidden))
        return flat.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    # --- geometry -------------------------------------------------------------------------------

    def pictures(self, vision: dict[str, Any], kinds: Tensor) -> list[Picture]:
        pixels, size = vision["pixel_values"], self.tile
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise DataError(
                f"pixel_values must be [tiles of all pictures, 3, {size}, {size}], got "
                f"{list(pixels.shape)}; use the model's own processor."
            )
        counts = self._tile_counts(kinds)
        if sum(counts) != len(pixels):
            raise DataError(
                f"The prompt holds the placeholder tokens of {sum(counts)} tile(s) in "
                f"{len(counts)} picture(s), but pixel_values holds {len(pixels)} tile(s). Write "
                "the image placeholder once per image in the prompt and let the processor expand "
                "it."
            )
        vision[_TILES] = counts
        rows, columns = self.facts.grid
        return [Picture((Part((rows,), (columns,)),) * count) for count in counts]

    def _tile_counts(self, kinds: Tensor) -> list[int]:
        """Tiles of each unbroken run of placeholders, in reading order; kinds [B, L]."""
        steps = nn.functional.pad((kinds != 0).long(), (1, 1)).diff(dim=1)
        runs = ((steps < 0).nonzero() - (steps > 0).nonzero())[:, 1].tolist()
        tokens = self.facts.visual_tokens
        odd = [run for run in runs if run % tokens]
        if odd:
            raise DataError(
                f"A run of {odd[0]} image placeholder tokens is no whole number of tiles of "
                f"{tokens} visual tokens. Write the image placeholder once per image in the prompt "
                "and let the processor expand it."
            )
        return [run // tokens for run in runs]

    def tiles(self, pictures: Sequence[Picture]) -> list[list[int]]:
        return [[part.tokens for part in picture.parts] for picture in pictures]

    def image_keys(self, vision: dict[str, Any]) -> Tensor:
        return picture_keys(image_keys(vision["pixel_values"]), vision[_TILES])

    # --- encoding -------------------------------------------------------------------------------

    def encode(self, call: TowerCall) -> Sequence[Tensor] | Tensor:
        found = self.model.get_image_features(call.vision["pixel_values"], return_dict=True)
        return self.pack(call, found.pooler_output)

    def pack(self, call: TowerCall, values: Tensor) -> Sequence[Tensor] | Tensor:
        counts = call.vision[_TILES]
        if len(set(counts)) == 1:
            return values.unflatten(0, (len(counts), counts[0])).flatten(1, 2)
        return [own.flatten(0, 1) for own in values.split(counts)]

    def tile_signal(self, call: TowerCall, signal: Signal, layer: int) -> Tensor:
        found = super().tile_signal(call, signal, layer)
        if signal is Signal.ENCODED:
            return found
        if signal not in HEADS:
            return self.mean_of_patches(found[..., None])[..., 0]
        prefix = self.facts.prefix_tokens
        return torch.cat([found[:, :, :prefix], self.mean_of_patches(found[:, :, prefix:])], dim=2)

    def mean_of_patches(self, values: Tensor) -> Tensor:
        """Means [..., tokens, X] of values [..., patches, X] over the patches of each token.

        Token (i, j) takes the patches (factor * i + a, factor * j + b); both are in raster order.
        """
        side, factor = self.patches // self.factor, self.factor
        raster = values.unflatten(-2, (side, factor, side, factor))
        return raster.mean(dim=(-4, -2)).flatten(-3, -2)

    # --- cost -----------------------------------------------------------------------------------

    def tower_flops(
        self, pictures: Sequence[Picture], lengths: dict[int, int], projected: int | None
    ) -> int:
        facts, tiles = self.facts, self.tile_count(pictures)
        length = self.patches**2 + facts.prefix_tokens
        tower = 2 * facts.patch_embedding_macs + facts.vision.flops([length] * facts.vision_layers)
        return tiles * (tower + 2 * facts.projector_macs * facts.visual_tokens)


def _edge(given: Any, name: str) -> int:
    """The edge of a square, from a number or (height, width)."""
    edges = set(given) if isinstance(given, (list, tuple)) else {given}
    if len(edges) != 1:
        raise ModelNotSupported(f"InternVL is supported with square tiles, got {name}={given!r}.")
    return int(edges.pop())
