"""LLaVA-NeXT-Video: LLaVA-NeXT, and videos as frames whose tokens are pooled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from vistoken.adapters.llava_next import LlavaNextHost
from vistoken.adapters.vlm import VisionLanguageHost
from vistoken.adapters.vlm_grid import HEADS
from vistoken.adapters.vlm_tower import TowerCall, current_call, image_keys
from vistoken.contract import Place, Signal
from vistoken.errors import DataError
from vistoken.pictures import Part, Picture

_KINDS = {"image": "pixel_values", "video": "pixel_values_videos"}


class LlavaNextVideoHost(LlavaNextHost):
    """`LlavaNextVideoForConditionalGeneration` with a CLIP vision tower.

    Images are those of LLaVA-NeXT. Each frame of a video is a raster of its own, pooled before the
    projector (12 x 12 tokens at 336 px), without newlines. Attention, queries, keys and values of
    a pooled token are the means over what was pooled, also where features are pooled in another
    way. A pooled token is no patch of the tower, so pruning inside the tower is not offered.
    """

    name: ClassVar[str] = "llava_next_video"
    title: ClassVar[str] = "LLaVA-NeXT-Video"
    classes: ClassVar[tuple[str, ...]] = ("LlavaNextVideoForConditionalGeneration",)
    places: ClassVar[frozenset[Place]] = VisionLanguageHost.places
    forward_names: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "pixel_values",
        "pixel_values_videos",
        *LlavaNextHost.forward_names[2:],
    )
    pixel_arguments: ClassVar[tuple[str, ...]] = tuple(_KINDS.values())
    parts: ClassVar[tuple[str, ...]] = (*LlavaNextHost.parts, "model.vision_resampler.pool")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.stride: int = self.model.config.spatial_pool_stride

    def placeholders(self) -> dict[str, int]:
        config = self.model.config
        return {"image": config.image_token_id, "video": config.video_token_id}

    def pictures(self, vision: dict[str, Any], kinds: Tensor) -> list[Picture]:
        found = [] if vision.get("pixel_values") is None else super().pictures(vision, kinds)
        videos = vision.get("pixel_values_videos")
        if videos is None:
            return found
        if videos.dim() != 5 or tuple(videos.shape[2:]) != (3, self.tile, self.tile):
            raise DataError(
                f"pixel_values_videos must be [videos, frames, 3, {self.tile}, {self.tile}], got "
                f"{list(videos.shape)}; use the model's own video processor."
            )
        rows, columns = (edge // self.stride for edge in self.facts.grid)
        frames = (Part((rows,), (columns,)),) * videos.shape[1]
        return found + [Picture(frames, kind="video")] * len(videos)

    # --- encoding -------------------------------------------------------------------------------

    def encode(self, call: TowerCall) -> Sequence[Tensor] | Tensor:
        found: list[Sequence[Tensor] | Tensor] = []
        for kind, argument in _KINDS.items():
            pictures = tuple(picture for picture in call.pictures if picture.kind == kind)
            if not pictures:
                continue
            # a pass of its own through the tower: what its probes note must not mix with others'
            own = replace(call, pictures=pictures, noted={}, encoded=None, extra={})
            with current_call(own):
                if kind == "image":
                    found.append(super().encode(own))
                else:
                    found.append(self._encode_videos(own.vision[argument]))
            call.extra[kind] = own
        return found[0] if len(found) == 1 else [one for some in found for one in some]

    def _encode_videos(self, videos: Tensor) -> Tensor:
        # one tensor of all videos, or one tensor for each
        found = self.model.get_video_features(videos, return_dict=True).pooler_output
        return torch.stack([video.flatten(0, -2) for video in found])

    def tower_signal(
        self, call: TowerCall, signal: Signal, layer: int
    ) -> Sequence[Tensor] | Tensor:
        found: list[Sequence[Tensor] | Tensor] = []
        if "image" in call.extra:
            found.append(super().tower_signal(call.extra["image"], signal, layer))
        if "video" in call.extra:
            found.append(self._video_signal(call.extra["video"], signal, layer))
        return found[0] if len(found) == 1 else [one for some in found for one in some]

    def _video_signal(self, call: TowerCall, signal: Signal, layer: int) -> Tensor:
        """A signal [V, ...] of the pooled tokens of every video."""
        videos = len(call.pictures)
        if signal is Signal.SIZES:
            return torch.ones(videos, call.pictures[0].tokens, device=self._device)
        found = self.tile_signal(call, signal, layer)
        if signal is Signal.ENCODED:  # read by the projector, so pooled already
            return found.unflatten(0, (videos, -1)).flatten(1, 2)
        if signal not in HEADS:
            return self._pooled(found[..., None])[..., 0].unflatten(0, (videos, -1)).flatten(1, 2)
        by_token = found[:, :, self.facts.prefix_tokens :].transpose(1, 2)
        pooled = self._pooled(by_token.flatten(2)).unflatten(-1, by_token.shape[2:])
        return pooled.unflatten(0, (videos, -1)).flatten(1, 2).transpose(1, 2)

    def _pooled(self, values: Tensor) -> Tensor:
        """Means [frames, pooled, X] of values [frames, N, X] of a frame's tokens."""
        raster = values.transpose(1, 2).unflatten(-1, self.facts.grid)
        return avg_pool2d(raster, self.stride).flatten(2).transpose(1, 2)

    def image_keys(self, vision: dict[str, Any]) -> Tensor:
        found = []
        if vision.get("pixel_values") is not None:
            found.append(super().image_keys(vision))
        if vision.get("pixel_values_videos") is not None:
            found.append(image_keys(vision["pixel_values_videos"]))
        return torch.cat(found)

    # --- cost -----------------------------------------------------------------------------------

    def tower_flops(
        self, pictures: Sequence[Picture], lengths: dict[int, int], projected: int | None
    ) -> int:
        images = [picture for picture in pictures if picture.kind == "image"]
        videos = [picture for picture in pictures if picture.kind == "video"]
        pooled = sum(picture.tokens for picture in videos)
        flops = super().tower_flops(images, lengths, None)
        flops += super().tower_flops(videos, lengths, pooled)
        pool = self.model.model.vision_resampler.pool
        if isinstance(pool, nn.Conv2d):
            flops += 2 * pooled * pool.weight.numel()
        return flops
