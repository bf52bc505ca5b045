"""Hosts whose vision tower reads all pictures as one packed sequence of patches: Qwen-VL.

The images of a call are one pass of the tower, its videos another. Patches [P, D] are packed
picture by picture and frame by frame; the M patches of a merge group (2 × 2) follow one another,
and the merger makes one visual token of them. Attention stays inside segments of the sequence: the
frames, or smaller windows, for which the tower may have reordered the groups. What a method reads
is per visual token, in raster order: the patches of a token are put side by side (encoder features)
or averaged (attention received; queries and keys as rotated, and values).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vistoken.adapters.vlm import VisionLanguageHost
from vistoken.adapters.vlm_grid import HEADS, RECEIVED, text_shape
from vistoken.adapters.vlm_rows import rotate
from vistoken.adapters.vlm_tower import NoteEncoded, TowerCall, image_keys
from vistoken.contract import ModelFacts, Signal, Stage
from vistoken.cost import TransformerShape
from vistoken.edits import Edits
from vistoken.errors import DataError
from vistoken.kernels import attention_received
from vistoken.pictures import Part, Picture, plain

ARGUMENTS = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}
QKV = (Signal.VISION_QUERIES, Signal.VISION_KEYS, Signal.VISION_VALUES)
USUAL = (24, 24)  # visual tokens of the picture that estimates are made for
PARTS = (
    "model.visual.patch_embed.proj",
    "model.visual.blocks",
    "model.visual.merger",
    "model.language_model.layers",
    "model.get_rope_index",
    "lm_head",
)


class MergedProjector(nn.Module):
    """A patch merger [patches, D] as a map of what it reads for one token: [..., M·D] -> [..., C].

    It only reshapes; the merger is the model's own and stays where it is.
    """

    def __init__(self, merger: nn.Module, patches: int) -> None:
        super().__init__()
        self.merger = merger
        self.patches = patches

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens.reshape(-1, tokens.shape[-1] // self.patches)
        return self.merger(rows).view(*tokens.shape[:-1], -1)


@dataclass(frozen=True)
class TowerPass:
    """What was noted of one pass of the tower, over these pictures.

    encoded [P, D]: what the merger read, None if nobody asked. noted: what probes noted.
    """

    pictures: tuple[Picture, ...]
    encoded: Tensor | None
    noted: dict[tuple[str, int], Any]


class PackedTowerHost(VisionLanguageHost):
    """Base of hosts whose tower `model.visual` reads packed patches and merges groups of them.

    Tokens are not patches one to one, so nothing can be dropped inside the tower.
    """

    pixel_arguments: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    vision_arguments: ClassVar[tuple[str, ...]] = ("image_grid_thw", "video_grid_thw")
    text_arguments: ClassVar[tuple[str, ...]] = ("mm_token_type_ids", "cache_position")
    fallbacks: ClassVar[dict[Signal, str]] = {Signal.CLS_ATTENTION: RECEIVED}

    # --- what differs between the families ------------------------------------------------------

    def shown(self, kind: str, frames: int, part: Part) -> list[Picture]:
        """The pictures that a row of a grid argument stands for, as they lie in the prompt."""
        return [Picture((part,) * frames, kind=kind)]

    def segments(self, pictures: Sequence[Picture], layer: int) -> list[tuple[int, int]]:
        """Patches of each segment that attends to itself in a vision layer, and of its frame."""
        sizes = [self.group_size * part.tokens for picture in pictures for part in picture.parts]
        return [(size, size) for size in sizes]

    def raster_order(self, pictures: Sequence[Picture]) -> Tensor | None:
        """For each token in raster order its place in the tower's sequence, on the CPU.

        None where the tower keeps raster order.
        """
        return None

    def keep_more(self, call: TowerCall, output: Any, sizes: list[int]) -> None:
        """Keep what the LLM reads of a pass beside the features, of which pictures have `sizes`."""

    # --- parts ----------------------------------------------------------------------------------

    @property
    def visual(self) -> Any:
        """The vision tower."""
        return self.model.model.visual

    @property
    def group_size(self) -> int:
        """Patches that are merged to one token."""
        return self.visual.spatial_merge_size**2

    def placeholders(self) -> dict[str, int]:
        config = self.model.config
        return {"image": config.image_token_id, "video": config.video_token_id}

    def projector(self) -> nn.Module:
        return MergedProjector(self.visual.merger, self.group_size)

    def vision_attention(self, layer: int) -> nn.Module:
        return self.visual.blocks[layer].attn

    def check_vision_arguments(self, given: dict[str, Any]) -> None:
        """Nothing of a call overrides the config."""

    def example(self) -> Picture:
        return plain(*self.facts.grid)

    def _install_probes(self, stage: Stage, edits: Edits) -> None:
        # what methods get as the projector is not the module that the tower calls
        others = stage.signals - {Signal.ENCODED}
        super()._install_probes(Stage(stage.place, stage.layer, others), edits)
        if Signal.ENCODED in stage.signals:
            edits.hook_before(self.visual.merger, NoteEncoded(self))

    # --- pictures -------------------------------------------------------------------------------

    def pictures(self, vision: dict[str, Any], kinds: Tensor) -> list[Picture]:
        """See the base; moves the grids in `vision` to the CPU, so that they are read back once."""
        for name in self.vision_arguments:
            if isinstance(vision.get(name), Tensor):
                vision[name] = vision[name].cpu()
        return [picture for found in self._rows(vision) for picture in found[3]]

    def _rows(self, vision: dict[str, Any]) -> list[tuple[str, int, int, list[Picture]]]:
        """For each row of the grid arguments: name of its pixels, range of patches, pictures."""
        found = []
        for kind, (pixels, grid) in ARGUMENTS.items():
            if pixels not in vision:
                continue
            first = 0
            for frames, rows, columns in self._grid(vision, pixels, grid):
                part = Part((rows // self._merge,), (columns // self._merge,))
                last = first + frames * rows * columns
                found.append((pixels, first, last, self.shown(kind, frames, part)))
                first = last
        return found

    def _grid(self, vision: dict[str, Any], pixels: str, grid: str) -> list[list[int]]:
        """The rows [frames, rows, columns] of patches of a grid argument, checked."""
        patches, given = vision[pixels], vision.get(grid)
        width = self.visual.patch_embed.proj.weight[0].numel()
        if not isinstance(given, Tensor) or given.dim() != 2 or given.shape[1] != 3:
            shape = list(given.shape) if isinstance(given, Tensor) else given
            raise DataError(
                f"{pixels} needs {grid} [pictures, 3]: frames, rows and columns of patches of each "
                f"picture; got {shape}. Pass everything that the model's processor returns."
            )
        rows: list[list[int]] = given.tolist()
        if any(t < 1 or min(h, w) < 1 or h % self._merge or w % self._merge for t, h, w in rows):
            raise DataError(
                f"{grid} must have rows and columns that are multiples of {self._merge}, got "
                f"{rows}; use the model's own processor."
            )
        wanted = [sum(t * h * w for t, h, w in rows), width]
        if list(patches.shape) != wanted:
            raise DataError(
                f"{pixels} must be [patches, values] = {wanted} for {grid} {rows}, got "
                f"{list(patches.shape)}; use the model's own processor."
            )
        return rows

    @property
    def _merge(self) -> int:
        return self.visual.spatial_merge_size

    def image_keys(self, vision: dict[str, Any]) -> Tensor:
        keys = []
        for pixels, first, last, pictures in self._rows(vision):
            patches = vision[pixels][first:last]
            keys.append(image_keys(patches.unflatten(0, (len(pictures), -1))))
        return torch.cat(keys)

    def long_positions(
        self, ids: Tensor | None, kinds: Tensor, mask: Tensor, vision: dict[str, Any]
    ) -> Tensor:
        """See the base; computed by the model itself, on the CPU, from `kinds` alone."""
        before = torch.cat([torch.zeros_like(kinds[:, :1]), kinds[:, :-1]], dim=1)
        runs = int(((kinds != 0) & (kinds != before)).sum())
        wanted = len(self.pictures(vision, kinds))
        if runs != wanted:
            raise DataError(
                f"The prompt holds {wanted} picture(s) or video frame(s) in {runs} run(s) of "
                "placeholders; the model needs text between them, as its chat template writes it."
            )
        surrogate = torch.zeros_like(kinds)
        for number, token in enumerate(self.placeholders().values(), 1):
            surrogate[kinds == number] = token
        grids = {name: vision[name] for name in self.vision_arguments if name in vision}
        positions, _ = self.model.model.get_rope_index(
            surrogate, mm_token_type_ids=kinds, attention_mask=mask.cpu(), **grids
        )
        return positions

    # --- the tower ------------------------------------------------------------------------------

    def encode(self, call: TowerCall) -> Sequence[Tensor] | Tensor:
        features: list[Tensor] = []
        passes: list[TowerPass] = []
        for kind, (pixels, grid) in ARGUMENTS.items():
            if pixels not in call.vision:
                continue
            own = tuple(picture for picture in call.pictures if picture.kind == kind)
            patches = call.vision[pixels].to(self.visual.dtype)
            sizes = [picture.tokens for picture in own]
            # not by get_image_features, which reads the grid back behind the tower
            given = call.vision[grid].to(patches.device, non_blocking=True)
            output = self.visual(patches, grid_thw=given, return_dict=True)
            features += output.pooler_output.split(sizes)
            self.keep_more(call, output, sizes)
            passes.append(TowerPass(own, call.encoded, call.noted))
            call.encoded, call.noted = None, {}
        call.extra["passes"] = passes
        return features

    def tower_signal(
        self, call: TowerCall, signal: Signal, layer: int
    ) -> Sequence[Tensor] | Tensor:
        if signal is Signal.SIZES:
            return [torch.ones(p.tokens, device=self.visual.device) for p in call.pictures]
        found: list[Tensor] = []
        for one in call.extra["passes"]:
            values = self._in_raster(one, self._by_token(one, signal, layer))
            found += values.split([picture.tokens for picture in one.pictures])
        return [own.transpose(0, 1) for own in found] if signal in HEADS else found

    def _in_raster(self, one: TowerPass, values: Tensor) -> Tensor:
        order = self.raster_order(one.pictures)
        if order is None:
            return values
        if values.is_cuda:
            order = order.pin_memory()
        return values.index_select(0, order.to(values.device, non_blocking=True))

    def _by_token(self, one: TowerPass, signal: Signal, layer: int) -> Tensor:
        """A signal of all tokens of a pass [n, ...], in the tower's order."""
        if signal is Signal.ENCODED:
            assert one.encoded is not None  # noted by a probe that attach installed
            return one.encoded.reshape(-1, self.group_size * one.encoded.shape[-1])
        if signal in HEADS:
            (values,) = self._heads(one, layer, signal)
        else:
            values = self._received(one, layer)
        return values.unflatten(0, (-1, self.group_size)).mean(1)

    def _heads(self, one: TowerPass, layer: int, *signals: Signal) -> list[Tensor]:
        """Queries or keys (rotated) or values [P, H, D / H] of a layer."""
        attention: Any = self.vision_attention(layer)
        hidden = one.noted["attention", layer]
        parts = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        heads = dict(zip(QKV, parts, strict=True))
        angles = one.noted["arguments", layer]["position_embeddings"]
        cos, sin = (part.float()[None] for part in angles)
        found = []
        for signal in signals:
            part = heads[signal]
            if signal is not Signal.VISION_VALUES:
                turned = rotate(part.float().transpose(0, 1)[None], cos, sin)
                part = turned[0].transpose(0, 1).to(part.dtype)
            found.append(part)
        return found

    @torch.no_grad()
    def _received(self, one: TowerPass, layer: int) -> Tensor:
        """Attention that each patch receives [P], fp32: mean over the queries of its frame."""
        query, keys = self._heads(one, layer, Signal.VISION_QUERIES, Signal.VISION_KEYS)
        attention: Any = self.vision_attention(layer)
        found, first = [], 0
        for (size, frame), run in groupby(self.segments(one.pictures, layer)):
            last = first + size * len(list(run))
            q, k = (
                part[first:last].unflatten(0, (-1, size)).transpose(1, 2) for part in (query, keys)
            )
            received = attention_received(q, k, attention.scaling).mean(1)
            found.append(received.flatten() * (size / frame))
            first = last
        return torch.cat(found)

    # --- cost -----------------------------------------------------------------------------------

    def tower_flops(
        self, pictures: Sequence[Picture], lengths: dict[int, int], projected: int | None
    ) -> int:
        facts, tokens = self.facts, sum(picture.tokens for picture in pictures)
        patch = self.visual.patch_embed.proj.weight.numel()
        total = 2 * tokens * (self.group_size * patch + facts.projector_macs)
        known: dict[tuple[tuple[int, int], ...], int] = {}
        for layer in range(facts.vision_layers):
            own = tuple(self.segments(pictures, layer))
            if own not in known:
                known[own] = sum(facts.vision.layer_flops(size) for size, _ in own)
            total += known[own]
        return total


def packed_facts(
    host: PackedTowerHost, *, mlp_matrices: int, mergers: int = 1, first_text_stage: int = 0
) -> ModelFacts:
    """The facts of a model with a packed tower; `mergers` read every group of patches."""
    model, visual = host.model, host.visual
    config = model.config.vision_config
    width, patches = config.hidden_size, host.group_size
    inner = patches * width
    return ModelFacts(
        host=host.name,
        grid=USUAL,
        prefix_tokens=0,
        vision_layers=len(visual.blocks),
        feature_layer=len(visual.blocks) - 1,
        text_layers=model.config.text_config.num_hidden_layers,
        vision=TransformerShape(
            layers=len(visual.blocks),
            width=width,
            heads=config.num_heads,
            kv_heads=config.num_heads,
            head_dim=width // config.num_heads,
            mlp_width=config.intermediate_size,
            mlp_matrices=mlp_matrices,
        ),
        text=text_shape(model),
        patch_embedding_macs=USUAL[0] * USUAL[1] * patches * visual.patch_embed.proj.weight.numel(),
        projector_macs=mergers * inner * (inner + config.out_hidden_size),
        position_axes=3,
        first_text_stage=first_text_stage,
    )
