"""Models for benchmarks: real architectures with random weights, made in place on the device.

Speed and memory depend on shapes, not on what was learned, so nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vistoken.errors import BackendUnavailable, DataError

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """What a config is built from; `vision` and `text` are the fields of the two configs."""

    title: str
    vision: dict[str, Any]
    text: dict[str, Any]
    image_token: int

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one picture."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


SIZES = {
    "llava-1.5-7b": Size(
        title="LLaVA-1.5-7B",
        vision={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
        text={
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        image_token=32000,
    ),
    "tiny": Size(
        title="tiny LLaVA",
        vision={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 84,
            "patch_size": 14,
            "projection_dim": 32,
        },
        text={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 128,
            "max_position_embeddings": 512,
        },
        image_token=120,
    ),
}


def build_llava(name: str, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Any:
    """Return a `LlavaForConditionalGeneration` of the size `name`, in eval mode, sdpa attention.

    Parameters are allocated and drawn on `device` by transformers' own initialisation (normal,
    std 0.02), so a 7B model takes seconds on a GPU. No EOS token, so that `generate` runs to its
    limit. Raises `DataError` for an unknown size, `BackendUnavailable` without transformers.
    """
    size = find_size(name)
    try:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
        from transformers import LlavaForConditionalGeneration as Llava
    except ImportError as error:
        raise BackendUnavailable(
            "building LLaVA needs transformers: pip install 'vistoken[vlm]'"
        ) from error
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size.vision),
        text_config=LlamaConfig(**size.text, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        image_token_id=size.image_token,
        image_seq_length=size.visual_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with device:
            model = Llava._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def find_size(name: str) -> Size:
    """Return the size by name; raises `DataError` with the known names."""
    if name not in SIZES:
        raise DataError(f"there is no model size {name!r}; known sizes: {', '.join(SIZES)}")
    return SIZES[name]


def make_inputs(
    model: Any, batch: int, *, before: int = 35, after: int = 25, seed: int = 0
) -> Inputs:
    """Return what a processor would: one picture a row, `before` and `after` text tokens around it.

    input_ids, attention_mask [B, before + N + after] and pixel_values [B, 3, H, W] in the model's
    dtype, random, on the model's device.
    """
    config = model.config
    side = config.vision_config.image_size
    visual = (side // config.vision_config.patch_size) ** 2
    # below the image token every id is a word; 0 to 2 are padding, start and end
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, config.image_token_id, (batch, before + after), generator=generator)
    words[:, 0] = 1
    image = torch.full((batch, visual), config.image_token_id)
    ids = torch.cat([words[:, :before], image, words[:, before:]], dim=1).to(model.device)
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.to(model.device, model.dtype),
    }


@contextmanager
def borders(model: Any, crossed: Callable[[str], None]) -> Iterator[None]:
    """Call `crossed` as a forward pass of a LLaVA goes over the borders between its parts.

    "tower" as the vision tower begins, "select" as the projector is done, "llm" as the language
    model begins. So of a pruned call, the reading of the prompt lies before "tower", and signals,
    selection, gather and shortening lie between "select" and "llm".
    """
    parts: Any = model.model
    tower: nn.Module = parts.vision_tower
    projector: nn.Module = parts.multi_modal_projector
    llm: nn.Module = parts.language_model
    handles = [
        tower.register_forward_pre_hook(lambda module, args: crossed("tower")),
        projector.register_forward_hook(lambda module, args, out: crossed("select")),
        llm.register_forward_pre_hook(lambda module, args: crossed("llm")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
