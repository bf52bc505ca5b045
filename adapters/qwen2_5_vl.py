"""Qwen2.5-VL: a packed tower with windowed attention, and an LLM with three position axes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from vistoken.adapters.vlm_grid import look_up
from vistoken.adapters.vlm_packed import PARTS, PackedTowerHost, packed_facts
from vistoken.contract import Place, Stage
from vistoken.errors import AttachError, ModelNotSupported
from vistoken.pictures import Picture


class Qwen2_5VLHost(PackedTowerHost):
    """`Qwen2_5_VLForConditionalGeneration`, images and videos.

    A visual token is a 2 × 2 group of 14 px patches. A video is one picture with a raster for
    each pair of frames, and one budget. Surviving tokens keep the time, height and width that
    `get_rope_index` gives them in the full prompt. Most vision layers attend within windows; for
    those, attention received counts the queries of other windows as giving none.
    """

    name: ClassVar[str] = "qwen2_5_vl"
    title: ClassVar[str] = "Qwen2.5-VL"
    classes: ClassVar[tuple[str, ...]] = ("Qwen2_5_VLForConditionalGeneration",)
    forward_names: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "inputs_embeds",
        "labels",
        "use_cache",
    )
    vision_arguments: ClassVar[tuple[str, ...]] = (
        *PackedTowerHost.vision_arguments,
        "second_per_grid_ts",
    )

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        look_up(model, (*PARTS, "model.visual.fullatt_block_indexes"), self.title)
        if "sliding_attention" in (
            getattr(self.model.config.text_config, "layer_types", None) or ()
        ):
            raise ModelNotSupported(
                f"{self.title} is supported without sliding-window attention in the LLM, whose "
                "window would reach further back in a shortened prompt; set "
                "config.text_config.use_sliding_window=False before loading."
            )
        self.facts = packed_facts(self, mlp_matrices=3)

    def _check_layer(self, stage: Stage) -> None:
        super()._check_layer(stage)
        if stage.place is not Place.LLM_LAYER:
            return
        rotary = self.language_model().rotary_emb
        weight = self.model.get_input_embeddings().weight
        cos, _ = rotary(weight[:1, None], torch.zeros(3, 1, 1, device=weight.device))
        if cos.dim() != 3:
            import transformers

            raise AttachError(
                f"transformers {transformers.__version__} joins the three position axes of "
                f"{self.title} inside each attention layer, where pruning after LLM layer "
                f"{stage.layer} cannot follow them; use transformers 5.17 or newer, or prune "
                "before the LLM."
            )

    def segments(self, pictures: Sequence[Picture], layer: int) -> list[tuple[int, int]]:
        if layer in self.visual.fullatt_block_indexes:
            return super().segments(pictures, layer)
        return [
            (self.group_size * size, self.group_size * part.tokens)
            for picture in pictures
            for part in picture.parts
            for size in _windows(part.grid, self._window)[1]
        ]

    def raster_order(self, pictures: Sequence[Picture]) -> Tensor | None:
        return _raster_order(tuple(pictures), self._window)

    @property
    def _window(self) -> int:
        """Tokens along a side of a window."""
        visual = self.visual
        return visual.window_size // visual.spatial_merge_size // visual.patch_size


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _windows(grid: tuple[int, int], side: int) -> tuple[Tensor, list[int]]:
    """The raster indices of a frame's tokens, window by window, and the size of each window."""
    rows, columns = (torch.arange(size, device="cpu") // side for size in grid)
    number = (rows[:, None] * (int(columns[-1]) + 1) + columns).flatten()
    return number.argsort(stable=True), number.bincount().tolist()


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _raster_order(pictures: tuple[Picture, ...], side: int) -> Tensor:
    found, first = [], 0
    for picture in pictures:
        for part in picture.parts:
            found.append(_windows(part.grid, side)[0].argsort() + first)
            first += part.tokens
    return torch.cat(found)
