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


# rows and columns of tiles into which a picture of LLaVA-NeXT may be cut, and those of ours
CANVASES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
CANVAS = (2, 2)


@dataclass(frozen=True)
class Size:
    """What a config is built from; `vision` and `text` are the fields of the two configs.

    tiled: a LLaVA-NeXT, whose pictures here fill 2 x 2 tiles; small: the size with which exactness
    is checked in fp32.
    """

    title: str
    vision: dict[str, Any]
    text: dict[str, Any]
    image_token: int
    small: str
    tiled: bool = False

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one picture, newline tokens included."""
        return count_tokens(self.vision["image_size"] // self.vision["patch_size"], self.tiled)


_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_VICUNA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
# deep enough that merging halves of 36 tokens in the tower and three stages in the LLM fit
_TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "image_size": 84,
    "patch_size": 14,
    "projection_dim": 32,
}
_TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}
SIZES = {
    "llava-1.5-7b": Size("LLaVA-1.5-7B", _CLIP_L, _VICUNA_7B, 32000, "tiny"),
    "llava-next-7b": Size("LLaVA-NeXT-7B", _CLIP_L, _VICUNA_7B, 32000, "tiny-next", tiled=True),
    "tiny": Size("tiny LLaVA", _TINY_VISION, _TINY_TEXT, 120, "tiny"),
    "tiny-next": Size("tiny LLaVA-NeXT", _TINY_VISION, _TINY_TEXT, 120, "tiny-next", tiled=True),
}


def count_tokens(side: int, tiled: bool) -> int:
    """Visual tokens of a picture of side x side tokens; tiled: those of its overview.

    A tiled picture has the overview and a raster of 2 x 2 such tiles, each row of which ends with
    a newline token.
    """
    rows, columns = (tiles * side for tiles in CANVAS) if tiled else (0, 0)
    return side * side + rows * (columns + 1)


def build_model(
    name: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    attention: str = "sdpa",
) -> Any:
    """Return a LLaVA or LLaVA-NeXT of transformers, of the size `name`, in eval mode.

    Parameters are allocated and drawn on `device` by transformers' own initialisation (normal,
    std 0.02), so a 7B model takes seconds on a GPU. No EOS token, so that `generate` runs to its
    limit. Raises `DataError` for an unknown size, `BackendUnavailable` without transformers.
    """
    size = find_size(name)
    try:
        import transformers
    except ImportError as error:
        raise BackendUnavailable(
            "building LLaVA needs transformers: pip install 'vistoken[vlm]'"
        ) from error
    text = transformers.LlamaConfig(**size.text, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    given: dict[str, Any] = {
        "vision_config": transformers.CLIPVisionConfig(**size.vision),
        "text_config": text,
        "image_token_index": size.image_token,
        "image_seq_length": size.visual_tokens,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    if size.tiled:
        edge = size.vision["image_size"]
        given["image_grid_pinpoints"] = [[down * edge, across * edge] for down, across in CANVASES]
        config: Any = transformers.LlavaNextConfig(**given)
        kind: Any = transformers.LlavaNextForConditionalGeneration
    else:
        config = transformers.LlavaConfig(**given)
        kind = transformers.LlavaForConditionalGeneration
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with device:
            model = kind._from_config(config, dtype=dtype, attn_implementation=attention)
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
    dtype, random, on the model's device; of a LLaVA-NeXT pixel_values [B, 5, 3, H, W], an overview
    and 2 x 2 tiles, and image_sizes [B, 2].
    """
    config = model.config
    edge = config.vision_config.image_size
    tiled = hasattr(config, "image_grid_pinpoints")
    visual = count_tokens(edge // config.vision_config.patch_size, tiled)
    # below the image token every id is a word; 0 to 2 are padding, start and end
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, config.image_token_id, (batch, before + after), generator=generator)
    words[:, 0] = 1
    image = torch.full((batch, visual), config.image_token_id)
    ids = torch.cat([words[:, :before], image, words[:, before:]], dim=1).to(model.device)
    views = (1 + CANVAS[0] * CANVAS[1],) if tiled else ()
    pixels = torch.randn(batch, *views, 3, edge, edge, generator=generator)
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.to(model.device, model.dtype),
    }
    if tiled:
        sizes = torch.tensor([[tiles * edge for tiles in CANVAS]] * batch)
        given["image_sizes"] = sizes.to(model.device)
    return given


@contextmanager
def borders(model: Any, crossed: Callable[[str], None]) -> Iterator[None]:
    """Call `crossed` as a forward pass of a model goes over the borders between its parts.

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
