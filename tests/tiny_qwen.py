"""Tiny random Qwen2.5-VL and Qwen3-VL models, pictures and videos for them, and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

PAD, IMAGE, VIDEO, START, END = 0, 3, 4, 5, 6
WORDS = range(7, 64)
PATCH, MERGE, TEMPORAL = 2, 2, 2
VALUES = 3 * TEMPORAL * PATCH * PATCH  # of a patch
SIDE = 6  # tokens along a side of the usual picture
TOKENS = SIDE * SIDE

Grid = tuple[int, int, int]  # frames, rows and columns of tokens


def _text(head_dim: int, sections: list[int], layers: int) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "vocab_size": 64,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": sections,
        },
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _vision(layers: int, **more: Any) -> dict[str, Any]:
    return {
        "depth": layers,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "out_hidden_size": 32,
        **more,
    }


def _built(family: Any, config: Any, seed: int, attention: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family._from_config(config, attn_implementation=attention)
        for parameter in model.parameters():  # far from the symmetric start, so that edits show
            parameter.data.normal_(std=0.15)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # every generation has its full length
    return model.eval()


def tiny_qwen2_5_vl(
    *,
    seed: int = 0,
    layers: int = 4,
    vision_layers: int = 4,
    window: int = 8,
    full: Sequence[int] = (1, 3),
    attention: str = "sdpa",
    **text: Any,
) -> Any:
    """A Qwen2.5-VL with windows of 2 × 2 tokens (window = 8 px), width 32, vocabulary 64, fp32."""
    from transformers import Qwen2_5_VLConfig
    from transformers import Qwen2_5_VLForConditionalGeneration as Family

    sizes = _text(8, [2, 1, 1], layers)
    sizes.pop("head_dim")
    config = Qwen2_5_VLConfig(
        text_config={**sizes, **text},
        vision_config=_vision(
            vision_layers,
            window_size=window,
            fullatt_block_indexes=list(full),
            tokens_per_second=2,
            hidden_act="silu",
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return _built(Family, config, seed, attention)


def tiny_qwen3_vl(
    *,
    seed: int = 0,
    layers: int = 4,
    vision_layers: int = 4,
    deepstack: Sequence[int] = (0, 2),
    attention: str = "sdpa",
) -> Any:
    """A Qwen3-VL with features of two vision layers in the LLM, width 32, vocabulary 64, fp32."""
    from transformers import Qwen3VLConfig
    from transformers import Qwen3VLForConditionalGeneration as Family

    config = Qwen3VLConfig(
        text_config=_text(16, [4, 2, 2], layers),
        vision_config=_vision(
            vision_layers,
            deepstack_visual_indexes=list(deepstack),
            num_position_embeddings=64,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return _built(Family, config, seed, attention)


def patches(*grids: Grid, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random patches of pictures of these sizes in tokens, and their grid argument."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.tensor([[t, h * MERGE, w * MERGE] for t, h, w in grids])
    return torch.randn(int(grid.prod(1).sum()), VALUES, generator=generator), grid


def images(*sizes: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """The image arguments of a call, for images of these rows and columns of tokens."""
    pixels, grid = patches(*((1, *size) for size in sizes), seed=seed)
    return {"pixel_values": pixels, "image_grid_thw": grid}


def videos(*grids: Grid, seed: int = 50) -> dict[str, torch.Tensor]:
    """The video arguments of a call."""
    pixels, grid = patches(*grids, seed=seed)
    return {"pixel_values_videos": pixels, "video_grid_thw": grid}


def words(count: int, seed: int) -> list[int]:
    """Random word ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(WORDS.start, WORDS.stop, (count,), generator=generator).tolist()


def prompt(*parts: int | tuple[int, ...], split: bool = False, seed: int = 0) -> list[int]:
    """Token ids: a number is that many words, (rows, columns) an image, three numbers a video.

    split: a video's frames are runs of their own behind timestamps, as in Qwen3-VL.
    """
    ids = [1]
    for number, part in enumerate(parts):
        if isinstance(part, int):
            ids += words(part, 100 * seed + number)
        elif len(part) == 2:
            ids += [START, *[IMAGE] * (part[0] * part[1]), END]
        elif split:
            for frame in range(part[0]):
                stamp = words(2, 100 * seed + 10 * number + frame)
                ids += [*stamp, START, *[VIDEO] * (part[1] * part[2]), END]
        else:
            ids += [START, *[VIDEO] * (part[0] * part[1] * part[2]), END]
    return ids


def batch(*rows: list[int], left: bool = True) -> dict[str, torch.Tensor]:
    """Pad rows to one length: input_ids, attention_mask and mm_token_type_ids."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    types = (ids == IMAGE).long() + 2 * (ids == VIDEO)
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}


def one_image(seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt with one image of 6 × 6 tokens, ready for `generate`."""
    size = (SIDE, SIDE)
    return {**batch(prompt(4, size, 5, seed=seed)), **images(size, seed=seed)}


def many() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A left-padded batch (two images, one, none; of different sizes) and its rows alone."""
    sizes = [(SIDE, SIDE), (4, 7), (5, 6)]
    rows = [
        prompt(3, sizes[0], 4, sizes[1], 2, seed=1),
        prompt(2, sizes[2], 6, seed=2),
        prompt(7, seed=3),
    ]
    every = images(*sizes, seed=5)
    cut = int(every["image_grid_thw"][:2].prod(1).sum())
    first = {
        "pixel_values": every["pixel_values"][:cut],
        "image_grid_thw": every["image_grid_thw"][:2],
    }
    second = {
        "pixel_values": every["pixel_values"][cut:],
        "image_grid_thw": every["image_grid_thw"][2:],
    }
    singles = [{**batch(rows[0]), **first}, {**batch(rows[1]), **second}, batch(rows[2])]
    return {**batch(*rows), **every}, singles
