"""LLaVA-NeXT: pictures of any resolution as tiles through a CLIP tower, in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vistoken.adapters.llava import PARTS, llava_facts
from vistoken.adapters.vlm import VisionLanguageHost
from vistoken.adapters.vlm_anyres import (
    Packing,
    Tiling,
    check_tiles,
    pack_all,
    pack_left,
    picture_keys,
    read_sizes,
    shown_tokens,
    tiles_of,
    tiling,
)
from vistoken.adapters.vlm_grid import INSIDE, GridTowerHost, look_up
from vistoken.adapters.vlm_tower import TowerCall, image_keys
from vistoken.contract import Place
from vistoken.errors import DataError, ModelNotSupported
from vistoken.pictures import Picture

_PACKING = "packing"


class LlavaNextHost(GridTowerHost):
    """`LlavaNextForConditionalGeneration` with a CLIP vision tower.

    A picture is an overview of 24 x 24 tokens at 336 px and the raster of its tiles without
    padding, at most 2,880 tokens in five tiles; a newline token ends each row of the raster. The
    CLS row is read at the layer whose output is projected (`config.vision_feature_layer`; of a
    list, the last).
    """

    name: ClassVar[str] = "llava_next"
    title: ClassVar[str] = "LLaVA-NeXT"
    classes: ClassVar[tuple[str, ...]] = ("LlavaNextForConditionalGeneration",)
    places: ClassVar[frozenset[Place]] = VisionLanguageHost.places | INSIDE
    forward_names: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "pixel_values",
        "image_sizes",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "inputs_embeds",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "labels",
    )
    vision_arguments: ClassVar[tuple[str, ...]] = (
        "image_sizes",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )
    parts: ClassVar[tuple[str, ...]] = (*PARTS, "model.image_newline")

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        look_up(model, self.parts, f"{self.title} with a CLIP tower")
        config = self.model.config
        if config.vision_feature_select_strategy != "default":
            raise ModelNotSupported(
                f"{self.title} is supported with vision_feature_select_strategy='default' (the "
                f"CLS token is dropped), got {config.vision_feature_select_strategy!r}."
            )
        self.facts = llava_facts(self.model, self.name, self.title, tiled=True)
        self.pinpoints = tuple((int(high), int(wide)) for high, wide in config.image_grid_pinpoints)
        odd = [point for point in self.pinpoints if any(edge % self.tile for edge in point)]
        if odd or not self.pinpoints:
            raise ModelNotSupported(
                f"{self.title} needs image_grid_pinpoints in multiples of the vision tower's "
                f"image_size {self.tile}, got {odd or self.pinpoints}."
            )

    @property
    def tile(self) -> int:
        """The edge of a tile in pixels."""
        return self.model.config.vision_config.image_size

    def placeholders(self) -> dict[str, int]:
        return {"image": self.model.config.image_token_id}

    def separator(self) -> Tensor:
        return self.model.model.image_newline

    # --- geometry -------------------------------------------------------------------------------

    def pictures(self, vision: dict[str, Any], kinds: Tensor) -> list[Picture]:
        pixels = vision["pixel_values"]
        if vision.get("image_sizes") is None:
            raise DataError(
                "The call has pixel_values but no image_sizes; pass on everything that the "
                "processor returned."
            )
        # read once, before the tower: later it would keep the CPU waiting for the GPU
        vision["image_sizes"] = read_sizes(vision["image_sizes"])
        tilings = self.tilings(vision)
        check_tiles(pixels, [one.tiles for one in tilings], self.tile)
        return [one.picture() for one in tilings]

    def tilings(self, vision: dict[str, Any]) -> list[Tiling]:
        """How each image of a call is cut into tiles."""
        side = self.facts.grid[0]
        sizes = read_sizes(vision["image_sizes"])
        return [tiling(size, self.pinpoints, self.tile, side) for size in sizes]

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

    def visible(self, call: TowerCall) -> Tensor | None:
        return shown_tokens(self.tilings(call.vision), self._device)

    def example(self) -> Picture:
        """The largest canvas, of those the one closest to a square, filled."""
        size = max(self.pinpoints, key=lambda point: (point[0] * point[1], min(point)))
        return tiling(size, self.pinpoints, self.tile, self.facts.grid[0]).picture()

    # --- encoding -------------------------------------------------------------------------------

    def encode(self, call: TowerCall) -> Sequence[Tensor] | Tensor:
        tilings = self.tilings(call.vision)
        found = self.tower_states(self._pixels(call.vision))
        features = self.projector()(found)
        call.projected = features.shape[0] * features.shape[1]
        if call.origin is None:
            packing = pack_all(tilings, features.device)
        else:
            packing = pack_left(tilings, call.origin)
        if packing.origin is not None:
            call.packed_origin = packing.split(packing.origin)
        call.extra[_PACKING] = packing
        return packing.pack(features)

    def tower_states(self, tiles: Tensor) -> Tensor:
        """What the projector reads [tiles, K, E], of tiles [tiles, 3, side, side]."""
        chosen = self.model.config.vision_feature_layer
        joined = chosen if isinstance(chosen, (list, tuple)) else [chosen]
        # recent transformers keep just the one state that a number names, earlier ones all of
        # them; lists they count differently
        wanted = joined[0] if len(joined) == 1 else True
        states = self.tower()(tiles, output_hidden_states=wanted, return_dict=True).hidden_states
        found = [states[layer] for layer in joined]
        return (found[0] if len(found) == 1 else torch.cat(found, dim=-1))[:, 1:]

    def _pixels(self, vision: dict[str, Any]) -> Tensor:
        counts = [one.tiles for one in self.tilings(vision)]
        return tiles_of(vision["pixel_values"], counts)

    def pack(self, call: TowerCall, values: Tensor) -> Sequence[Tensor] | Tensor:
        packing: Packing = call.extra[_PACKING]
        return packing.pack(values)

    def tile_keys(self, vision: dict[str, Any]) -> Tensor:
        return image_keys(self._pixels(vision))

    def image_keys(self, vision: dict[str, Any]) -> Tensor:
        counts = [one.tiles for one in self.tilings(vision)]
        return picture_keys(LlavaNextHost.tile_keys(self, vision), counts)
