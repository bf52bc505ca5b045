"""Tiny random LLaVA-NeXT and LLaVA-NeXT-Video models, pictures of any size, prompts, batches."""

from __future__ import annotations

from typing import Any

import torch

import tiny

IMAGE, VIDEO = 3, 5
GRID = 4  # tokens along the edge of a tile
TILE = 14 * GRID
POINTS = [[TILE * down, TILE * across] for down, across in [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]]
FRAME = (GRID // 2) ** 2  # tokens of a frame
TALL, WIDE = (100, 70), (70, 100)  # 8 x 6 and 6 x 8 tokens in 2 x 2 tiles


def tiny_llava_next(*, video: bool = False, seed: int = 5, **changes: Any) -> Any:
    """A model with tiles of 4 × 4 tokens, width 32, vocabulary 64, in fp32.

    changes: kv_heads, or arguments of the config. Most seeds repeat one token for ever; 5 does not.
    """
    import transformers

    name = "LlavaNextVideo" if video else "LlavaNext"
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=14,
        projection_dim=32,
    )
    text = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=changes.pop("kv_heads", 2),
        vocab_size=64,
        max_position_embeddings=1024,
        pad_token_id=tiny.PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    given: dict[str, Any] = {
        "image_token_index": IMAGE,
        "image_grid_pinpoints": POINTS,
        "image_seq_length": GRID**2,
    }
    if video:
        given["video_token_index"] = VIDEO
    config = getattr(transformers, name + "Config")(
        vision_config=vision, text_config=text, **(given | changes)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build = getattr(transformers, name + "ForConditionalGeneration")
        model = build._from_config(config, attn_implementation="sdpa")
        for parameter in model.parameters():  # far from the symmetric start, so that edits show
            parameter.data.normal_(std=0.15)
    model.generation_config.pad_token_id = tiny.PAD
    return model.eval()


def tiny_llava_next_video(**changes: Any) -> Any:
    """The same with videos: frames of 2 × 2 tokens."""
    return tiny_llava_next(video=True, **changes)


def geometry(size: tuple[int, int]) -> tuple[int, int, int]:
    """Tiles (with the overview), and raster rows and columns, by transformers' own functions."""
    from transformers.models.llava_next import modeling_llava_next as own

    down, across = own.get_anyres_image_grid_shape(size, POINTS, TILE)
    raster = own.unpad_image(torch.empty(1, down * GRID, across * GRID), size)
    return 1 + down * across, raster.shape[1], raster.shape[2]


def tokens(size: tuple[int, int]) -> int:
    """Tokens of a picture in the prompt, newlines included."""
    _, rows, columns = geometry(size)
    return GRID**2 + rows * (columns + 1)


def pictures(*sizes: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random pixels [images, most tiles, 3, 56, 56], padded with zeros, and image_sizes."""
    generator = torch.Generator().manual_seed(seed)
    counts = [geometry(size)[0] for size in sizes]
    pixels = torch.zeros(len(sizes), max(counts), 3, TILE, TILE)
    for own, count in zip(pixels, counts, strict=True):
        own[:count] = torch.randn(count, 3, TILE, TILE, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def videos(count: int, frames: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random frames [videos, frames, 3, 56, 56]."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, frames, 3, TILE, TILE, generator=generator)
    return {"pixel_values_videos": pixels}


def prompt(*parts: int | str | tuple[int, int], seed: int = 0) -> list[int]:
    """Token ids: a size becomes a picture's placeholders, 'video:3' those of three frames."""
    ids: list[int] = []
    for number, part in enumerate(parts):
        if isinstance(part, tuple):
            ids += [IMAGE] * tokens(part)
        elif isinstance(part, str):
            ids += [VIDEO] * (int(part.split(":")[1]) * FRAME)
        else:
            words = torch.Generator().manual_seed(100 * seed + number)
            ids += torch.randint(6, 64, (part,), generator=words).tolist()
    return [1, *ids]


def one_image(seed: int = 0, size: tuple[int, int] = TALL) -> dict[str, torch.Tensor]:
    """A prompt with one picture, ready for `generate`."""
    return {**tiny.batch(prompt(4, size, 5, seed=seed)), **pictures(size, seed=seed)}


def one_video(seed: int = 0, frames: int = 6) -> dict[str, torch.Tensor]:
    """A prompt with one video, ready for `generate`."""
    ids = tiny.batch(prompt(4, f"video:{frames}", 5, seed=seed))
    return {**ids, **videos(1, frames, seed=seed)}


def many_images(
    sizes: tuple[tuple[int, int], ...] = (TALL, WIDE, WIDE),
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
        prompt(3, "video:5", 2, WIDE, 4, seed=1),
        prompt(2, "video:5", 6, seed=2),
        prompt(7, seed=3),
    ]
    images, clips = pictures(WIDE, seed=5), videos(2, 5, seed=6)
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

    return [
        HostCase("llava_next", tiny_llava_next, one_image, many_images, tokens(TALL), keep=30),
        HostCase(
            "llava_next_video", tiny_llava_next_video, one_video, many_videos, 6 * FRAME, keep=15
        ),
    ]
