"""LLaVA-OneVision: pictures of any resolution, and videos, through a SigLIP tower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vistoken.adapters.vlm_anyres import (
    Tiling,
    check_tiles,
    pack_all,
    picture_keys,
    read_sizes,
    single,
    tiles_of,
    tiling,
)
from vistoken.adapters.vlm_grid import (
    RECEIVED,
    GridTowerHost,
    feature_layer,
    look_up,
    text_shape,
    vision_shape,
)
from vistoken.adapters.vlm_tower import TowerCall, current_call, image_keys
from vistoken.contract import ModelFacts, Signal
from vistoken.errors import AttachError, DataError, ModelNotSupported
from vistoken.pictures import Part, Picture

PARTS = (
    "model.vision_tower.embeddings.num_positions",
    "model.vision_tower.encoder.layers.0.self_attn.q_proj",
    "model.multi_modal_projector.linear_1",
    "model.multi_modal_projector.linear_2",
    "model.image_newline",
    "model.language_model.layers.0.self_attn.q_proj",
    "lm_head",
)
_KINDS = {"image": "pixel_values", "video": "pixel_values_videos"}
_ASPECT = "anyres_max_"


@dataclass(frozen=True)
class Shrunk:
    """A tiling whose raster is scaled down, bilinearly, where it exceeds `most` tiles.

    A row or column of the smaller raster counts to the tile in which its center lies.
    """

    tiling: Tiling
    most: int

    @cached_property
    def raster(self) -> tuple[int, int]:
        """Rows and columns of the raster as the LLM reads it; the rounding is transformers'."""
        height, width = self.tiling.height, self.tiling.width
        ratio = math.sqrt(height * width / (self.most * self.tiling.side**2))
        if ratio > 1.1:
            return int(height // ratio), int(width // ratio)
        return height, width

    @property
    def shrinks(self) -> bool:
        """Whether the raster is scaled down."""
        return self.raster != (self.tiling.height, self.tiling.width)

    def picture(self) -> Picture:
        """The tokens as the LLM reads them."""
        if not self.shrinks:
            return self.tiling.picture()
        overview, full = self.tiling.parts
        rows, columns = self.raster
        raster = Part(_scaled(full.row_bands, rows), _scaled(full.column_strips, columns))
        newlines = (overview.tokens + row * (columns + 1) + columns for row in range(rows))
        return Picture((overview, raster), tuple(newlines))

    def shrink(self, values: Tensor) -> Tensor:
        """Values [n, ...] of all tokens, overview first, as those of the tokens that are left."""
        if not self.shrinks:
            return values
        overview, raster = values.split([self.tiling.side**2, len(values) - self.tiling.side**2])
        full = self.tiling.height, self.tiling.width
        return torch.cat([overview, interpolate(raster[None], full, self.raster)[0]])


class LlavaOnevisionHost(GridTowerHost):
    """`LlavaOnevisionForConditionalGeneration` with a SigLIP vision tower.

    A picture is an overview of 27 x 27 tokens at 384 px and the raster of its tiles without
    padding, scaled down where it is larger than `vision_aspect_ratio` allows (anyres_max_9: nine
    tiles); a newline token ends each row of the raster. Where `batch_num_images` says that a prompt
    has several pictures, each of them is the overview and one newline. A frame of a video is scaled
    down to 14 x 14 tokens; one newline ends the video.

    The model scales features down behind the projector. Encoder features, attention, queries, keys
    and values of such tokens are scaled down in the same way, so that they stay token by token with
    the features; but the projector of scaled encoder features is no longer exactly the scaled
    projection. Where nothing is scaled it is exact. Tokens are not always patches, so pruning
    inside the tower is not offered.
    """

    name: ClassVar[str] = "llava_onevision"
    title: ClassVar[str] = "LLaVA-OneVision"
    classes: ClassVar[tuple[str, ...]] = ("LlavaOnevisionForConditionalGeneration",)
    forward_names: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "pixel_values",
        "image_sizes",
        "pixel_values_videos",
        "image_sizes_videos",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "inputs_embeds",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "vision_aspect_ratio",
        "batch_num_images",
        "labels",
        "use_cache",
        "logits_to_keep",
    )
    pixel_arguments: ClassVar[tuple[str, ...]] = tuple(_KINDS.values())
    vision_arguments: ClassVar[tuple[str, ...]] = (
        "image_sizes",
        "image_sizes_videos",
        "batch_num_images",
        "vision_aspect_ratio",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )
    fallbacks: ClassVar[dict[Signal, str]] = {Signal.CLS_ATTENTION: RECEIVED}

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        look_up(model, PARTS, f"{self.title} with a SigLIP tower")
        config = self.model.config
        embeddings = self.tower().embeddings
        if (
            config.vision_feature_select_strategy != "full"
            or embeddings.num_positions != embeddings.num_patches
        ):
            raise ModelNotSupported(
                "LLaVA-OneVision is supported with a tower without CLS token and with "
                "vision_feature_select_strategy='full', got "
                f"{config.vision_feature_select_strategy!r} and a {type(self.tower()).__name__}."
            )
        most = config.vision_aspect_ratio.strip(_ASPECT)  # strips characters, as transformers does
        if not most.isdecimal() or int(most) < 1:
            raise ModelNotSupported(
                f"LLaVA-OneVision is supported with vision_aspect_ratio='{_ASPECT}<tiles>', got "
                f"{config.vision_aspect_ratio!r}."
            )
        self.most = int(most)
        self.tile: int = config.vision_config.image_size
        self.pinpoints = tuple((int(high), int(wide)) for high, wide in config.image_grid_pinpoints)
        odd = [point for point in self.pinpoints if any(edge % self.tile for edge in point)]
        if odd or not self.pinpoints:
            raise ModelNotSupported(
                "LLaVA-OneVision needs image_grid_pinpoints in multiples of the vision tower's "
                f"image_size {self.tile}, got {odd or self.pinpoints}."
            )
        self.facts = self._facts()

    def _facts(self) -> ModelFacts:
        config = self.model.config
        vision, chosen = config.vision_config, config.vision_feature_layer
        side, out = vision.image_size // vision.patch_size, config.text_config.hidden_size
        joined = 1 if isinstance(chosen, int) else len(chosen)
        return ModelFacts(
            host=self.name,
            grid=(side, side),
            prefix_tokens=0,
            vision_layers=vision.num_hidden_layers,
            feature_layer=feature_layer(chosen, vision.num_hidden_layers, self.title),
            text_layers=config.text_config.num_hidden_layers,
            vision=vision_shape(vision),
            text=text_shape(self.model),
            patch_embedding_macs=side**2 * 3 * vision.patch_size**2 * vision.hidden_size,
            projector_macs=joined * vision.hidden_size * out + out * out,
            tiled=True,
        )

    def placeholders(self) -> dict[str, int]:
        config = self.model.config
        return {"image": config.image_token_id, "video": config.video_token_id}

    def separator(self) -> Tensor:
        return self.model.model.image_newline

    # --- geometry -------------------------------------------------------------------------------

    def pictures(self, vision: dict[str, Any], kinds: Tensor) -> list[Picture]:
        found: list[Picture] = []
        if vision.get("pixel_values") is not None:
            found += self._images(vision)
        videos = vision.get("pixel_values_videos")
        if videos is not None:
            if videos.dim() != 5 or tuple(videos.shape[2:]) != (3, self.tile, self.tile):
                raise DataError(
                    f"pixel_values_videos must be [videos, frames, 3, {self.tile}, {self.tile}], "
                    f"got {list(videos.shape)}; use the model's own video processor."
                )
            rows, columns = self._frame
            frames = (Part((rows,), (columns,)),) * videos.shape[1]
            newline = videos.shape[1] * rows * columns
            found += [Picture(frames, (newline,), "video")] * len(videos)
        return found

    def _images(self, vision: dict[str, Any]) -> list[Picture]:
        self._check_aspect(vision)  # other tokens than those the pictures are said to have
        if vision.get("image_sizes") is None:
            raise DataError(
                "The call has pixel_values but no image_sizes; pass on everything that the "
                "processor returned."
            )
        # read once, before the tower: later it would keep the CPU waiting for the GPU
        vision["image_sizes"] = sizes = read_sizes(vision["image_sizes"])
        if vision.get("batch_num_images") is not None:
            given = vision["batch_num_images"]
            counts = given.tolist() if hasattr(given, "tolist") else list(given)
            if sum(counts) != len(sizes):
                raise DataError(
                    f"batch_num_images={counts} counts {sum(counts)} image(s), but image_sizes "
                    f"names {len(sizes)}; pass on what the processor returned."
                )
            vision["batch_num_images"] = counts
        layouts = self.layouts(vision)
        check_tiles(vision["pixel_values"], [one.tiling.tiles for one in layouts], self.tile)
        return [one.picture() for one in layouts]

    @property
    def _frame(self) -> tuple[int, int]:
        """Rows and columns of the tokens of a frame of a video."""
        rows, columns = self.facts.grid
        return math.ceil(rows / 2), math.ceil(columns / 2)

    def layouts(self, vision: dict[str, Any]) -> list[Shrunk]:
        """How each image of a call is cut into tiles, and what is left of the raster.

        Images of a prompt with several are one tile each, as in transformers.
        """
        sizes, side = vision["image_sizes"], self.facts.grid[0]
        counts = vision.get("batch_num_images")
        cut = [True] * len(sizes) if counts is None else [n == 1 for n in counts for _ in range(n)]
        return [
            Shrunk(
                tiling(size, self.pinpoints, self.tile, side) if more else single(side), self.most
            )
            for size, more in zip(sizes, cut, strict=True)
        ]

    def tiles(self, pictures: Sequence[Picture]) -> list[list[int]]:
        return [
            [
                band * strip
                for part in picture.parts
                for band in part.row_bands
                for strip in part.column_strips
            ]
            for picture in pictures
        ]

    def example(self) -> Picture:
        """A square picture of 2 x 2 tiles."""
        size = (2 * self.tile, 2 * self.tile)
        return Shrunk(
            tiling(size, self.pinpoints, self.tile, self.facts.grid[0]), self.most
        ).picture()

    # --- encoding -------------------------------------------------------------------------------

    def encode(self, call: TowerCall) -> Sequence[Tensor] | Tensor:
        found: list[Sequence[Tensor] | Tensor] = []
        for kind, argument in _KINDS.items():
            pictures = tuple(picture for picture in call.pictures if picture.kind == kind)
            if not pictures:
                continue
            # a pass of its own through the tower: what its probes note must not mix with others'
            own = replace(call, pictures=pictures, noted={}, encoded=None, extra={})
            tiles = call.vision[argument].flatten(0, 1) if kind == "video" else self._tiles(own)
            with current_call(own):
                features = self.projector()(self.tower_states(tiles))
            found.append(self.pack(own, features))
            call.extra[kind] = own
        return _joined(found)

    def _tiles(self, call: TowerCall) -> Tensor:
        """The tiles of all images in a row, without padding tiles."""
        counts = [one.tiling.tiles for one in self.layouts(call.vision)]
        return tiles_of(call.vision["pixel_values"], counts)

    def tower_states(self, tiles: Tensor) -> Tensor:
        """What the projector reads [tiles, N, E], of tiles [tiles, 3, side, side]."""
        chosen = self.model.config.vision_feature_layer
        # recent transformers keep just the chosen states, earlier ones all of them
        states = self.tower()(tiles, output_hidden_states=chosen, return_dict=True).hidden_states
        if isinstance(chosen, int):
            return states[chosen]
        return torch.cat([states[layer] for layer in chosen], dim=-1)

    def tower_signal(
        self, call: TowerCall, signal: Signal, layer: int
    ) -> Sequence[Tensor] | Tensor:
        found = []
        for kind in _KINDS:
            if kind in call.extra:
                found.append(super().tower_signal(call.extra[kind], signal, layer))
        return _joined(found)

    def pack(self, call: TowerCall, values: Tensor) -> Sequence[Tensor] | Tensor:
        if call.pictures[0].kind == "video":
            frames = interpolate(values, self.facts.grid, self._frame)
            return frames.unflatten(0, (len(call.pictures), -1)).flatten(1, 2)
        layouts = self.layouts(call.vision)
        packed = pack_all([one.tiling for one in layouts], values.device).pack(values)
        if not any(one.shrinks for one in layouts):
            return packed
        return [one.shrink(own) for one, own in zip(layouts, packed, strict=True)]

    def image_keys(self, vision: dict[str, Any]) -> Tensor:
        found = []
        if vision.get("pixel_values") is not None:
            counts = [one.tiling.tiles for one in self.layouts(vision)]
            found.append(picture_keys(image_keys(tiles_of(vision["pixel_values"], counts)), counts))
        if vision.get("pixel_values_videos") is not None:
            found.append(image_keys(vision["pixel_values_videos"]))
        return torch.cat(found)

    # --- checks ---------------------------------------------------------------------------------

    def check_vision_arguments(self, given: dict[str, Any]) -> None:
        super().check_vision_arguments(given)
        self._check_aspect(given)

    def _check_aspect(self, given: dict[str, Any]) -> None:
        wanted = self.model.config.vision_aspect_ratio
        if given.get("vision_aspect_ratio") not in (None, wanted):
            raise AttachError(
                f"vision_aspect_ratio={given['vision_aspect_ratio']!r} differs from the model's "
                f"{wanted!r}, for which the methods were attached; set it in model.config before "
                "attaching."
            )


def interpolate(values: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Scale rasters [R, rows * columns, ...] of `grid` bilinearly to `size`, as the model does."""
    rest = values.shape[2:]
    raster = values.reshape(*values.shape[:2], math.prod(rest)).transpose(1, 2)
    raster = raster.unflatten(-1, grid).contiguous()
    found = nn.functional.interpolate(raster, size=size, mode="bilinear")
    return found.flatten(2).transpose(1, 2).reshape(len(values), -1, *rest)


def _scaled(shares: tuple[int, ...], length: int) -> tuple[int, ...]:
    """How many of `length` scaled rows have their center in each band of `shares` rows."""
    total, edges = sum(shares), list(accumulate(shares))
    counts = [0] * len(shares)
    for row in range(length):
        center = (2 * row + 1) * total  # in units of 1 / (2 * length)
        counts[next(i for i, edge in enumerate(edges) if center < 2 * length * edge)] += 1
    return tuple(counts)


def _joined(found: list[Sequence[Tensor] | Tensor]) -> Sequence[Tensor] | Tensor:
    """What each pass gave for its pictures, as one."""
    return found[0] if len(found) == 1 else [one for some in found for one in some]
