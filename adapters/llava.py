"""LLaVA-1.5: a CLIP tower, a two-layer projector, and a Llama-like LLM in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vistoken.adapters.vlm import VisionLanguageHost
from vistoken.adapters.vlm_grid import (
    INSIDE,
    GridTowerHost,
    feature_layer,
    look_up,
    text_shape,
    vision_shape,
)
from vistoken.adapters.vlm_tower import TowerCall
from vistoken.contract import ModelFacts, Place
from vistoken.errors import DataError, ModelNotSupported
from vistoken.pictures import Picture, plain

PARTS = (
    "model.vision_tower.embeddings.class_embedding",
    "model.vision_tower.encoder.layers",
    "model.multi_modal_projector.linear_1",
    "model.multi_modal_projector.linear_2",
    "model.language_model.layers",
    "lm_head",
)


class LlavaHost(GridTowerHost):
    """`LlavaForConditionalGeneration` with a CLIP vision tower.

    576 visual tokens a picture at 336 px (a 24 × 24 grid); the CLS row is read at the layer whose
    output is projected (`config.vision_feature_layer`; of a list, the last).
    """

    name: ClassVar[str] = "llava"
    title: ClassVar[str] = "LLaVA-1.5"
    classes: ClassVar[tuple[str, ...]] = ("LlavaForConditionalGeneration",)
    places: ClassVar[frozenset[Place]] = VisionLanguageHost.places | INSIDE
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
    )
    vision_arguments: ClassVar[tuple[str, ...]] = (
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "image_sizes",
    )

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        look_up(model, PARTS, f"{self.title} with a CLIP tower")
        config = self.model.config
        if config.vision_feature_select_strategy != "default":
            raise ModelNotSupported(
                "LLaVA-1.5 is supported with vision_feature_select_strategy='default' (the CLS "
                f"token is dropped), got {config.vision_feature_select_strategy!r}."
            )
        self.facts = llava_facts(self.model, self.name, self.title)

    def placeholders(self) -> dict[str, int]:
        return {"image": self.model.config.image_token_id}

    def pictures(self, vision: dict[str, Any], kinds: Tensor) -> list[Picture]:
        pixels, size = vision["pixel_values"], self.model.config.vision_config.image_size
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise DataError(
                f"pixel_values must be [images, 3, {size}, {size}], got {list(pixels.shape)}; "
                "use the model's own image processor."
            )
        return [plain(*self.facts.grid)] * len(pixels)

    def encode(self, call: TowerCall) -> Sequence[Tensor] | Tensor:
        pixels = call.vision["pixel_values"].to(self.tower().dtype)
        found = self.model.get_image_features(pixels, return_dict=True)
        features = torch.stack(list(found.pooler_output))
        call.projected = features.shape[0] * features.shape[1]
        return features


def llava_facts(model: Any, name: str, title: str, *, tiled: bool = False) -> ModelFacts:
    """The facts of a LLaVA-like model with a CLIP tower and a projector of two linear layers."""
    config = model.config
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    chosen = config.vision_feature_layer
    layers = 1 if isinstance(chosen, int) else len(chosen)
    width, out = vision.hidden_size, config.text_config.hidden_size
    return ModelFacts(
        host=name,
        grid=(side, side),
        prefix_tokens=1,
        vision_layers=vision.num_hidden_layers,
        feature_layer=feature_layer(chosen, vision.num_hidden_layers, title),
        text_layers=config.text_config.num_hidden_layers,
        vision=vision_shape(vision),
        text=text_shape(model),
        patch_embedding_macs=side * side * 3 * vision.patch_size**2 * width,
        projector_macs=width * layers * out + out * out,
        tiled=tiled,
    )
