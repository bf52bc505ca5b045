"""Methods that note what they see, and slow prompts and towers, for the LLaVA-NeXT hosts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import tiny_llava_next as nx
from vistoken.contract import Place, Selection, Signal, Stage, View
from vistoken.pruning import Pruner
from vistoken.pruning._pruner import top_indices

NEW, KEEP = 5, 14
SMALL, LONG = (20, 50), (400, 60)  # 1 x 2 tiles; 3 x 1 tiles
FIRST = frozenset({Signal.CLS_ATTENTION, Signal.VISION_KEYS, Signal.ENCODED, Signal.FEATURES})


@dataclass(frozen=True, kw_only=True)
class Spy(Pruner):
    """Notes every signal behind the projector, by the picture's number of tokens."""

    name: ClassVar[str] = "spy"
    signals: ClassVar[frozenset[Signal]] = FIRST | {Signal.PROJECTOR, Signal.IMAGE_KEY}
    seen: ClassVar[list[tuple[int, dict[Signal, Any]]]] = []

    def select(self, view: View, keep: int) -> Selection:
        found = {signal: view.read(signal) for signal in self.signals}
        self.seen.append((view.picture.tokens, found))
        return Selection(top_indices(view.cls_attention, keep))


@dataclass(frozen=True, kw_only=True)
class LastToken(Pruner):
    """Keeps what the last token attends to most after LLM layer 1, at the positions it had."""

    name: ClassVar[str] = "last_token"
    places: ClassVar[frozenset[Place]] = frozenset({Place.LLM_LAYER})
    signals: ClassVar[frozenset[Signal]] = frozenset({Signal.LLM_ATTENTION})
    numbering: ClassVar[str] = "original"

    def stages(self, facts: Any) -> tuple[Stage, ...]:
        return (Stage(Place.LLM_LAYER, 1, self.signals),)

    def select(self, view: View, keep: int) -> Selection:
        return Selection(top_indices(view.language.last_attention.mean(1), keep))


@dataclass(frozen=True, kw_only=True)
class TowerTop(Pruner):
    """Keeps what the CLS token attends to most after two vision layers; padding goes first."""

    name: ClassVar[str] = "tower_top"
    places: ClassVar[frozenset[Place]] = frozenset({Place.VISION_LAYER, Place.PROJECTED})
    signals: ClassVar[frozenset[Signal]] = FIRST

    def stages(self, facts: Any) -> tuple[Stage, ...]:
        inside = frozenset({Signal.CLS_ATTENTION})
        early, late = (Stage(Place.VISION_LAYER, layer, inside) for layer in (0, 1))
        return early, late, Stage(Place.PROJECTED, None, FIRST)

    def select(self, view: View, keep: int) -> Selection:
        if view.stage.place is Place.PROJECTED:
            Spy.seen.append((view.origin, {signal: view.read(signal) for signal in FIRST}))
            return Selection(top_indices(view.cls_attention, keep))
        left = keep if view.stage.layer == 1 else (view.tokens + keep) // 2
        return Selection(top_indices(view.cls_attention + view.visible, left))


@dataclass(frozen=True, kw_only=True)
class TowerFirst(TowerTop):
    """Keeps the first tokens after two vision layers, at no cost: it reads no signal."""

    name: ClassVar[str] = "tower_first"

    def stages(self, facts: Any) -> tuple[Stage, ...]:
        return tuple(Stage(stage.place, stage.layer) for stage in super().stages(facts))

    def select(self, view: View, keep: int) -> Selection:
        seen = torch.zeros(view.origin.shape) if view.visible is None else view.visible.float()
        return Selection(top_indices(seen, keep))


def generate(model: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **more}
    return model.generate(**inputs, **options)


def runs(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The model's own features of every picture, newlines included: images, then videos."""
    found: list[Tensor] = []
    if "pixel_values" in inputs:
        given = (inputs["pixel_values"], inputs["image_sizes"])
        found += model.get_image_features(*given, return_dict=True).pooler_output
    if "pixel_values_videos" in inputs:
        videos = model.get_video_features(inputs["pixel_values_videos"], return_dict=True)
        found += [video.flatten(0, -2) for video in videos.pooler_output]
    return found


def by_hand(model: Any, inputs: dict[str, Tensor], kept: list[Tensor]) -> list[dict[str, Tensor]]:
    """Per row the shortened prompt as embeddings, and the positions that its tokens had."""
    features, embed = runs(model, inputs), model.get_input_embeddings()
    images = len(inputs.get("image_sizes", []))
    waiting = {nx.IMAGE: list(range(images)), nx.VIDEO: list(range(images, len(features)))}
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        tokens, positions, seen = [], [], 0
        for position, token in enumerate(ids[mask.bool()].tolist()):
            if token not in waiting or not features:
                tokens.append(embed(torch.tensor(token)))
                positions.append(position)
                continue
            picture = waiting[token][0]
            if seen in kept[picture].tolist():
                tokens.append(features[picture][seen])
                positions.append(position)
            seen += 1
            if seen == len(features[picture]):
                waiting[token].pop(0)
                seen = 0
        rows.append({"embeds": torch.stack(tokens)[None], "at": torch.tensor(positions)[None]})
    return rows


def mixed(video: bool) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A left-padded batch whose pictures differ in size, and its rows as single calls."""
    return nx.many_videos() if video else nx.many_images((nx.TALL, SMALL, LONG))


def tower(model: Any, tiles: Tensor) -> dict[Signal, Tensor]:
    """Signals of single tiles, from a full attention map of the tower."""
    layer = 2  # its output, hidden_states[-2], is projected
    own = model.model.vision_tower
    own.set_attn_implementation("eager")
    found = own(tiles, output_hidden_states=True, output_attentions=True)
    own.set_attn_implementation("sdpa")
    block = own.encoder.layers[layer]
    keys = block.self_attn.k_proj(block.layer_norm1(found.hidden_states[layer]))
    return {
        Signal.CLS_ATTENTION: found.attentions[layer].mean(1)[:, 0, 1:, None],
        Signal.VISION_KEYS: keys[:, 1:],
        Signal.ENCODED: found.hidden_states[-2][:, 1:],
    }


def assembled(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Values [tiles, N, X] of a picture's tokens [n, X], by transformers' own unpadding."""
    from transformers.models.llava_next import modeling_llava_next as own

    down, across = own.get_anyres_image_grid_shape(size, nx.POINTS, nx.TILE)
    raster = values[1:].view(down, across, nx.GRID, nx.GRID, -1).permute(4, 0, 2, 1, 3)
    raster = raster.reshape(-1, down * nx.GRID, across * nx.GRID)
    return torch.cat([values[0], own.unpad_image(raster, size).flatten(1).T])


def pooled(values: Tensor) -> Tensor:
    """Means over 2 x 2 tokens of values [frames, N, X], as [pooled tokens of all frames, X]."""
    raster = values.unflatten(1, (nx.GRID // 2, 2, nx.GRID // 2, 2))
    return raster.mean((2, 4)).flatten(0, 2)


def dropped(inputs: dict[str, Tensor], kept: list[Tensor], lengths: list[int]) -> Tensor:
    """Columns [B, L] of the prompt that hold a visual token which did not stay."""
    images = len(inputs.get("image_sizes", []))
    waiting = {nx.IMAGE: list(range(images)), nx.VIDEO: list(range(images, len(kept)))}
    found = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        seen = 0
        for column, token in enumerate(ids):
            if token not in waiting:
                continue
            picture = waiting[token][0]
            found[row, column] = seen not in kept[picture].tolist()
            seen += 1
            if seen == lengths[picture]:
                waiting[token].pop(0)
                seen = 0
    return found


@dataclass
class HideKeys:
    """Hook before a decoder layer: a causal mask that also hides columns [B, L] of the prompt."""

    hidden: Tensor
    mask: Tensor

    def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:
        queries = args[0].shape[1]
        keys = kwargs["past_key_values"].get_seq_length(module.self_attn.layer_idx) + queries
        row = torch.arange(keys - queries, keys)[:, None]
        allowed = torch.arange(keys) <= row
        more = keys - self.hidden.shape[1]
        seen = torch.nn.functional.pad(~self.hidden & self.mask.bool(), (0, more), value=True)
        allowed = allowed[None, None] & seen[:, None, None]
        lowest = torch.finfo(torch.float32).min
        added = torch.zeros(allowed.shape).masked_fill(~allowed, lowest)
        return args, {**kwargs, "attention_mask": added}


def shown(size: tuple[int, int]) -> Tensor:
    """Which tokens of each tile [tiles, N] of a picture reach the LLM, the overview's all."""
    numbers = torch.arange(nx.geometry(size)[0] * nx.GRID**2)
    found = torch.isin(numbers, assembled(numbers.view(-1, nx.GRID**2, 1), size))
    return found.view(-1, nx.GRID**2)


def short_tower(model: Any, tile: Tensor, visible: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """What `TowerTop` leaves of one tile [3, side, side]: states [keep, D], and which tokens."""
    own, index = model.model.vision_tower, torch.arange(len(visible))
    states = own.pre_layrnorm(own.embeddings(tile[None]))
    for layer, block in enumerate(own.encoder.layers[:3]):
        attention, normed = block.self_attn, block.layer_norm1(states)
        query, key = (
            projection(normed)[0].unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj)
        )
        row = (query[:, :1] @ key.transpose(1, 2) * attention.scale).softmax(-1).mean(0)[0, 1:]
        states = block(states, None)
        if layer < 2:
            left = keep if layer else (len(index) + keep) // 2
            pick = (row + visible[index]).argsort(descending=True)[:left].sort().values
            states, index = states[:, torch.cat([torch.zeros(1).long(), pick + 1])], index[pick]
    return states[0, 1:], index
