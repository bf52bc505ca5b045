"""Tiny random InternVL models, pictures of several tiles, videos, prompts, batches."""

from __future__ import annotations

from typing import Any

import torch

import tiny

IMAGE, START, END = 3, 4, 5
GRID = 4  # tokens along the edge of a tile
TILE = 7 * 2 * GRID  # patches of 7 px, two to a token along an edge
TOKENS = GRID * GRID


def tiny_internvl(
    *,
    attention: str = "sdpa",
    llm: str = "Qwen2",
    vision: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A model with tiles of 4 × 4 tokens, width 32, vocabulary 64, in fp32.

    llm: the family of the LLM; vision: changes of the tower's config; changes: of the model's.
    """
    import transformers

    tower: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": [TILE, TILE],
        "patch_size": [7, 7],
        "use_qk_norm": True,
    }
    text = getattr(transformers, llm + "Config")(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        max_position_embeddings=1024,
        pad_token_id=tiny.PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    given: dict[str, Any] = {"image_token_id": IMAGE, "image_seq_length": TOKENS}
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**(tower | (vision or {}))),
        text_config=text,
        tie_word_embeddings=False,
        **(given | changes),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build = transformers.InternVLForConditionalGeneration
        model = build._from_config(config, attn_implementation=attention)
        for parameter in model.parameters():  # far from the symmetric start, so that edits show
            parameter.data.normal_(std=0.15)
        for name, parameter in model.model.language_model.named_parameters():
            if "norm" in name:  # else every prompt would be answered alike
                parameter.data += 1
    model.generation_config.pad_token_id = tiny.PAD
    return model.eval()


def tiles(count: int, *, seed: int = 0) -> torch.Tensor:
    """Random pixel values [count, 3, 56, 56]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, TILE, TILE, generator=generator)


def prompt(*parts: int | str, seed: int = 0) -> list[int]:
    """Token ids: 'picture:3' becomes one picture of three tiles, 'video:3' one of three frames."""
    ids: list[int] = [1]
    for number, part in enumerate(parts):
        if isinstance(part, int):
            words = torch.Generator().manual_seed(100 * seed + number)
            ids += torch.randint(6, 64, (part,), generator=words).tolist()
            continue
        kind, count = part.split(":")
        if kind == "picture":
            ids += [START, *[IMAGE] * (TOKENS * int(count)), END]
        else:
            for frame in range(int(count)):
                ids += [20 + frame, START, *[IMAGE] * TOKENS, END]
    return ids


def one_picture(seed: int = 0, count: int = 3) -> dict[str, torch.Tensor]:
    """A prompt with one picture of some tiles, ready for `generate`."""
    ids = tiny.batch(prompt(4, f"picture:{count}", 5, seed=seed))
    return {**ids, "pixel_values": tiles(count, seed=seed)}


def many() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A left-padded batch (pictures of 3 and 1 tiles, of 2, none) and its rows as single calls."""
    rows = [
        prompt(3, "picture:3", 4, "picture:1", 2, seed=1),
        prompt(2, "picture:2", 6, seed=2),
        prompt(7, seed=3),
    ]
    pixels = tiles(6, seed=5)
    singles = [
        {**tiny.batch(rows[0]), "pixel_values": pixels[:4]},
        {**tiny.batch(rows[1]), "pixel_values": pixels[4:]},
        tiny.batch(rows[2]),
    ]
    return {**tiny.batch(*rows), "pixel_values": pixels}, singles


def cases() -> list[Any]:
    """The rows of the lifecycle matrix."""
    from hosts import HostCase

    return [HostCase("internvl", tiny_internvl, one_picture, many, 3 * TOKENS, keep=12)]
