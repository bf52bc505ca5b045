"""Tiny random LLaVA-OneVision models, pictures of any size, videos, prompts, batches."""

from __future__ import annotations

from typing import Any

import torch

import tiny

IMAGE, VIDEO = 3, 5
GRID = 5  # tokens along the edge of a tile
TILE = 14 * GRID + 6  # as 384 px, no multiple of the patch
FRAME = 3 * 3  # tokens of a frame
MOST = 3  # tiles whose tokens a raster may have
POINTS = [[rows * TILE, columns * TILE] for rows in (1, 2, 3) for columns in (1, 2, 3)]
TALL, WIDE, HUGE = (110, 70), (70, 150), (210, 190)  # 2 x 1 and 1 x 2 tiles; 3 x 3, scaled down


def tiny_llava_onevision(*, attention: str = "sdpa", **changes: Any) -> Any:
    """A model with tiles of 5 × 5 tokens, width 32, vocabulary 64, in fp32.

    changes: arguments of the config.
    """
    import transformers

    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=14,
        vision_use_head=False,
    )
    text = transformers.Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=1024,
        pad_token_id=tiny.PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    given: dict[str, Any] = {
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": POINTS,
        "vision_aspect_ratio": f"anyres_max_{MOST}",
    }
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision, text_config=text, **(given | changes)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build = transformers.LlavaOnevisionForConditionalGeneration
        model = build._from_config(config, attn_implementation=attention)
        for parameter in model.parameters():  # far from the symmetric start, so that edits show
            parameter.data.normal_(std=0.15)
        for name, parameter in model.model.language_model.named_parameters():
            if "norm" in name:  # else every prompt would be answered alike
                parameter.data += 1
    model.generation_config.pad_token_id = tiny.PAD
    return model.eval()


def geometry(size: tuple[int, int]) -> tuple[int, int, int]:
    """Tiles (with the overview), and raster rows and columns, by transformers' own functions."""
    from transformers.models.llava_onevision import modeling_llava_onevision as own

    down, across = own.get_anyres_image_grid_shape(size, POINTS, TILE)
    raster = own.unpad_image(torch.empty(1, down * GRID, across * GRID), size)
    rows, columns = raster.shape[1:]
    ratio = (rows * columns / (MOST * GRID**2)) ** 0.5
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return 1 + down * across, rows, columns


def tokens(size: tuple[int, int] | None) -> int:
    """Tokens of a picture in the prompt, newlines included; None: one that is a single tile."""
    if size is None:
        return GRID**2 + 1
    _, rows, columns = geometry(size)
    return GRID**2 + rows * (columns + 1)


def pictures(*sizes: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random pixels [images, most tiles, 3, 76, 76], padded with zeros, and image_sizes."""
    generator = torch.Generator().manual_seed(seed)
    counts = [geometry(size)[0] for size in sizes]
    pixels = torch.zeros(len(sizes), max(counts), 3, TILE, TILE)
    for own, count in zip(pixels, counts, strict=True):
        own[:count] = torch.randn(count, 3, TILE, TILE, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def videos(count: int, frames: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random frames [videos, frames, 3, 76, 76]."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, frames, 3, TILE, TILE, generator=generator)
    return {"pixel_values_videos": pixels}


def prompt(*parts: int | str | tuple[int, int] | None, seed: int = 0) -> list[int]:
    """Token ids: a size (None: one tile) becomes a picture, 'video:3' a video of three frames."""
    ids: list[int] = [1]
    for number, part in enumerate(parts):
        if isinstance(part, int):
            words = torch.Generator().manual_seed(100 * seed + number)
            ids += torch.randint(6, 64, (part,), generator=words).tolist()
        elif isinstance(part, str):
            ids += [VIDEO] * (int(part.split(":")[1]) * FRAME + 1)
        else:
            ids += [IMAGE] * tokens(part)
    return ids


def one_image(seed: int = 0, size: tuple[int, int] = TALL) -> dict[str, torch.Tensor]:
    """A prompt with one picture, ready for `generate`."""
    return {**tiny.batch(prompt(4, size, 5, seed=seed)), **pictures(size, seed=seed)}


def one_huge(seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt with one picture whose raster is scaled down."""
    return one_image(seed, HUGE)


def one_video(seed: int = 0, frames: int = 4) -> dict[str, torch.Tensor]:
    """A prompt with one video, ready for `generate`."""
    ids = tiny.batch(prompt(4, f"video:{frames}", 5, seed=seed))
    return {**ids, **videos(1, frames, seed=seed)}


def several(seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt with two pictures as the processor gives it: a tile each."""
    found = pictures(TALL, WIDE, seed=seed)
    found["batch_num_images"] = torch.tensor([2])
    return {**tiny.batch(prompt(2, None, 3, None, 5, seed=seed)), **found}


def many(
    sizes: tuple[tuple[int, int], ...] = (TALL, HUGE, WIDE),
) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A left-padded batch (two pictures, one, none) and its rows as single calls."""
    rows = [
        prompt(3, sizes[0], 4, sizes[1], 2, seed=1),
        prompt(2, sizes[2], 6, seed=2),
        prompt(7, seed=3),
    ]
    found = pictures(*sizes, seed=5)
    pixels, edges = found["pixel_values"], found["image_sizes"]
    singles = [
        {**tiny.batch(rows[0]), "pixel_values": pixels[:2], "image_sizes": edges[:2]},
        {**tiny.batch(rows[1]), "pixel_values": pixels[2:], "image_sizes": edges[2:]},
        tiny.batch(rows[2]),
    ]
    return {**tiny.batch(*rows), **found}, singles


def many_videos() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A left-padded batch (video and picture, video, none) and its rows as single calls."""
    rows = [
        prompt(3, "video:3", 2, WIDE, 4, seed=1),
        prompt(2, "video:3", 6, seed=2),
        prompt(7, seed=3),
    ]
    images, clips = pictures(WIDE, seed=5), videos(2, 3, seed=6)
    frames = clips["pixel_values_videos"]
    singles = [
        {**tiny.batch(rows[0]), **images, "pixel_values_videos": frames[:1]},
        {**tiny.batch(rows[1]), "pixel_values_videos": frames[1:]},
        tiny.batch(rows[2]),
    ]
    return {**tiny.batch(*rows), **images, **clips}, singles


def cases() -> list[Any]:
    """The rows of the lifecycle matrix."""
    from hosts import HostCase

    build = tiny_llava_onevision
    return [HostCase("llava_onevision", build, one_huge, many, tokens(HUGE), keep=30)]
