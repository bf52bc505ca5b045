"""LLaVA-1.5: a CLIP tower, a two-layer projector, and a Llama-like LLM in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vistoken.adapters.vlm import VisionLanguageHost
from vistoken.contract import ModelFacts, Signal
from vistoken.cost import TransformerShape
from vistoken.errors import AttachError, DataError, ModelNotSupported

_PROJECTIONS = {
    Signal.VISION_QUERIES: "q_proj",
    Signal.VISION_KEYS: "k_proj",
    Signal.VISION_VALUES: "v_proj",
}
_PARTS = (
    "model.vision_tower.embeddings.class_embedding",
    "model.vision_tower.encoder.layers",
    "model.multi_modal_projector.linear_1",
    "model.multi_modal_projector.linear_2",
    "model.language_model.layers",
    "lm_head",
)


class LlavaHost(VisionLanguageHost):
    """`LlavaForConditionalGeneration` with a CLIP vision tower.

    576 visual tokens a picture at 336 px (a 24 × 24 grid); the CLS row is read at the layer whose
    output is projected (`config.vision_feature_layer`; of a list, the last).
    """

    name: ClassVar[str] = "llava"
    title: ClassVar[str] = "LLaVA-1.5"
    classes: ClassVar[tuple[str, ...]] = ("LlavaForConditionalGeneration",)
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
        for path in _PARTS:
            _look_up(model, path)
        config = self.model.config
        if config.vision_feature_select_strategy != "default":
            raise ModelNotSupported(
                "LLaVA-1.5 is supported with vision_feature_select_strategy='default' (the CLS "
                f"token is dropped), got {config.vision_feature_select_strategy!r}."
            )
        self.facts = _read_facts(self.model)

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    def vision_layers(self) -> Sequence[nn.Module]:
        return self.model.model.vision_tower.encoder.layers

    def vision_attention(self, layer: int) -> nn.Module:
        return self.model.model.vision_tower.encoder.layers[layer].self_attn

    def vision_heads(self, layer: int, hidden: Tensor, signal: Signal) -> Tensor:
        attention: Any = self.vision_attention(layer)
        flat = getattr(attention, _PROJECTIONS[signal])(hidden)
        return flat.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def vision_scale(self, layer: int) -> float:
        attention: Any = self.vision_attention(layer)
        return attention.scale

    def projector(self) -> nn.Module:
        return self.model.model.multi_modal_projector

    def encode(self, pixel_values: Tensor) -> Tensor:
        tower = self.model.model.vision_tower
        pixels = pixel_values.to(tower.dtype)
        found = self.model.get_image_features(pixels, return_dict=True)
        return torch.stack(list(found.pooler_output))

    def image_count(self, pixel_values: Tensor) -> int:
        size = self.model.config.vision_config.image_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise DataError(
                f"pixel_values must be [images, 3, {size}, {size}], got "
                f"{list(pixel_values.shape)}; use the model's own image processor."
            )
        return pixel_values.shape[0]

    def check_vision_arguments(self, given: dict[str, Any]) -> None:
        for name in self.vision_arguments:
            wanted = getattr(self.model.config, name, None)
            if given.get(name) is not None and given[name] != wanted:
                raise AttachError(
                    f"{name}={given[name]!r} differs from the model's {wanted!r}, for which the "
                    "methods were attached; set it in model.config before attaching."
                )


def _look_up(model: nn.Module, path: str) -> Any:
    found: Any = model
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            raise ModelNotSupported(
                f"{type(model).__name__} was recognised as LLaVA-1.5 with a CLIP tower, but has no "
                f"{path!r}. Looked for: {', '.join(_PARTS)}. Only checkpoints with a CLIP vision "
                "tower are supported."
            )
    return found


def _feature_layer(config: Any, layers: int) -> int:
    """The vision layer whose output is projected, from an index into the hidden states."""
    chosen = config.vision_feature_layer
    index = chosen if isinstance(chosen, int) else chosen[-1]
    state = index % (layers + 1)
    if state == 0:
        raise ModelNotSupported(
            f"vision_feature_layer={chosen!r} takes the embeddings, before any vision layer; "
            "LLaVA-1.5 is supported with features from a layer (-2 in the published models)."
        )
    return state - 1


def _read_facts(model: Any) -> ModelFacts:
    config = model.config
    vision, text = config.vision_config, config.text_config
    side = vision.image_size // vision.patch_size
    chosen = config.vision_feature_layer
    feature_layers = 1 if isinstance(chosen, int) else len(chosen)
    width, out = vision.hidden_size, text.hidden_size
    heads = text.num_attention_heads
    mlp = model.model.language_model.layers[0].mlp
    return ModelFacts(
        host="llava",
        grid=(side, side),
        prefix_tokens=1,
        vision_layers=vision.num_hidden_layers,
        feature_layer=_feature_layer(config, vision.num_hidden_layers),
        text_layers=text.num_hidden_layers,
        vision=TransformerShape(
            layers=vision.num_hidden_layers,
            width=width,
            heads=vision.num_attention_heads,
            kv_heads=vision.num_attention_heads,
            head_dim=width // vision.num_attention_heads,
            mlp_width=vision.intermediate_size,
            mlp_matrices=2,
        ),
        text=TransformerShape(
            layers=text.num_hidden_layers,
            width=out,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or out // heads,
            mlp_width=text.intermediate_size,
            mlp_matrices=3 if hasattr(mlp, "gate_proj") else 2,
            vocab=text.vocab_size,
        ),
        patch_embedding_macs=side * side * 3 * vision.patch_size**2 * width,
        projector_macs=width * feature_layers * out + out * out,
    )
