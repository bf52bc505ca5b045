"""Tiny random models, built in code from configs: every part is there, nothing is trained."""

from __future__ import annotations

from typing import Any

import torch

IMAGE = 3
PAD = 0
GRID = 6
TOKENS = GRID * GRID


def tiny_llava(
    *,
    seed: int = 0,
    layers: int = 4,
    vision_layers: int = 4,
    feature_layer: int | list[int] = -2,
    kv_heads: int = 2,
    attention: str = "sdpa",
) -> Any:
    """A LLaVA-1.5 with a 6 × 6 grid (36 visual tokens), width 32, vocabulary 64, in fp32."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=14 * GRID,
        patch_size=14,
        projection_dim=32,
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=64,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llava._from_config(config, attn_implementation=attention)
        for parameter in model.parameters():  # far from the symmetric start, so that edits show
            parameter.data.normal_(std=0.15)
    model.generation_config.pad_token_id = PAD
    return model.eval()


def pictures(count: int, *, seed: int = 0) -> torch.Tensor:
    """Random pixel values [count, 3, 84, 84]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 14 * GRID, 14 * GRID, generator=generator)


def prompt(*parts: int | str, seed: int = 0) -> list[int]:
    """Token ids: 'image' becomes one image's placeholders, a number that many random words."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = [1]
    for part in parts:
        if part == "image":
            ids += [IMAGE] * TOKENS
        else:
            ids += torch.randint(4, 64, (int(part),), generator=generator).tolist()
    return ids


def batch(*rows: list[int], left: bool = True) -> dict[str, torch.Tensor]:
    """Pad rows to one length: input_ids and attention_mask."""
    length = max(map(len, rows))
    pads = [[PAD] * (length - len(row)) for row in rows]
    ids = [p + r if left else r + p for p, r in zip(pads, rows, strict=True)]
    masks = [
        [0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p)
        for p, r in zip(pads, rows, strict=True)
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


def one_image(*, seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt with one image, ready for `generate`."""
    return {**batch(prompt(4, "image", 5, seed=seed)), "pixel_values": pictures(1, seed=seed)}
