"""Slow re-derivations of what a pruned Qwen-VL must compute, token by token on the bare model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import tiny_qwen as tiny


@dataclass(frozen=True)
class Family:
    """One model family: how to build it, and whether a video's frames are pictures of their own."""

    name: str
    build: Callable[..., Any]
    split: bool


@dataclass
class Shown:
    """A picture of a call: its grid in tokens, its features, and what DeepStack adds per layer."""

    grid: tuple[int, int, int]
    features: torch.Tensor
    added: list[torch.Tensor]


def shown(model: Any, family: Family, inputs: dict[str, Any], kind: str) -> list[Shown]:
    """The pictures of one kind, by the model's own feature functions."""
    names = ("pixel_values", "image_grid_thw")
    if kind == "video":
        names = ("pixel_values_videos", "video_grid_thw")
    if names[0] not in inputs:
        return []
    run = model.get_image_features if kind == "image" else model.get_video_features
    with torch.no_grad():
        output = run(inputs[names[0]], inputs[names[1]], return_dict=True)
    features = torch.cat(list(output.pooler_output))
    layers = getattr(output, "deepstack_features", None) or []
    added = [f if isinstance(f, torch.Tensor) else torch.cat(list(f)) for f in layers]
    grids = []
    for t, h, w in inputs[names[1]].tolist():
        size = (h // tiny.MERGE, w // tiny.MERGE)
        grids += [(1, *size)] * t if family.split and kind == "video" else [(t, *size)]
    found, first = [], 0
    for t, h, w in grids:
        own = slice(first, first + t * h * w)
        found.append(Shown((t, h, w), features[own], [layer[own] for layer in added]))
        first = own.stop
    return found


@dataclass
class Row:
    """A prompt without padding: embeddings, positions [3, S], which tokens are visual, features."""

    embeds: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    added: list[torch.Tensor]
    next: int

    def __len__(self) -> int:
        return len(self.embeds)


def rows_by_hand(
    model: Any,
    family: Family,
    inputs: dict[str, Any],
    kept: list[torch.Tensor] | None = None,
    interval: int = 2,
) -> list[Row]:
    """The rows of a call in which picture i, in encoding order, keeps the tokens kept[i].

    interval: how far the time of a contiguous video's frames is apart in positions.
    """
    embed = model.get_input_embeddings()
    images, clips = (shown(model, family, inputs, kind) for kind in ("image", "video"))
    number = {tiny.IMAGE: 0, tiny.VIDEO: len(images)}
    every, rows = [*images, *clips], []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        tokens, positions, visual, added, seen, base = [], [], [], [], 0, 0
        for token in ids[mask.bool()].tolist():
            if token not in number:
                tokens.append(embed(torch.tensor(token)))
                positions.append((base, base, base))
                visual.append(False)
                base += 1
                continue
            picture = every[number[token]]
            frames, height, width = picture.grid
            frame, row, column = seen // (height * width), seen // width % height, seen % width
            if kept is None or seen in kept[number[token]].tolist():
                tokens.append(picture.features[seen])
                step = interval if frames > 1 else 1
                positions.append((base + frame * step, base + row, base + column))
                visual.append(True)
                added.append([layer[seen] for layer in picture.added])
            seen += 1
            if seen == frames * height * width:
                number[token], seen, base = number[token] + 1, 0, base + max(height, width)
        layers = [torch.stack(layer) for layer in zip(*added, strict=True)]
        rows.append(
            Row(
                torch.stack(tokens).detach(),
                torch.tensor(positions).T,
                torch.tensor(visual),
                layers,
                max(max(p) for p in positions) + 1,
            )
        )
    return rows


def deepstack(row: Row, length: int) -> dict[str, Any]:
    """What the language model takes beside the embeddings, where the family has it."""
    if not row.added:
        return {}
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[0, : len(row)] = row.visual
    return {"visual_pos_masks": mask, "deepstack_visual_embeds": row.added}


@torch.no_grad()
def logits_by_hand(model: Any, row: Row, more: list[int] | None = None) -> torch.Tensor:
    """Logits [S + E, vocabulary] of a row and further tokens, without a cache."""
    more = more or []
    embeds = row.embeds
    if more:
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor(more))])
    behind = torch.arange(row.next, row.next + len(more)).expand(3, -1)
    axes = torch.cat([row.positions, behind], dim=1)
    place = torch.arange(len(embeds))
    output = model.model.language_model(
        inputs_embeds=embeds[None],
        position_ids=torch.cat([place[None], axes])[:, None],
        attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
        use_cache=False,
        **deepstack(row, len(embeds)),
    )
    return model.lm_head(output.last_hidden_state)[0]


def greedy_by_hand(model: Any, row: Row, count: int) -> list[int]:
    """The next tokens, each from a run without a cache."""
    found: list[int] = []
    for _ in range(count):
        found.append(int(logits_by_hand(model, row, found)[-1].argmax()))
    return found


def generate_by_hand(model: Any, row: Row, **options: Any) -> torch.Tensor:
    """The bare model's own `generate` on the embeddings of a row: beams, samples, caches."""

    def add(module: Any, args: Any, kwargs: Any) -> Any:
        embeds = kwargs["inputs_embeds"]
        if embeds.shape[1] != len(row) or not row.added:
            return None
        own, copies = deepstack(row, len(row)), len(embeds)
        own["visual_pos_masks"] = own["visual_pos_masks"].expand(copies, -1)
        own["deepstack_visual_embeds"] = [f.repeat(copies, 1) for f in row.added]
        return args, {**kwargs, **own}

    place = torch.arange(len(row))[None]
    handle = model.model.language_model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        return model.generate(
            inputs_embeds=row.embeds[None],
            position_ids=torch.cat([place, row.positions])[:, None],
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            **options,
        )
    finally:
        handle.remove()


@contextmanager
def masked_keys(model: Any, layer: int, dropped: torch.Tensor) -> Iterator[None]:
    """Let no layer behind `layer` see the columns where `dropped` [S] of the prompt is True."""

    def mask(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0]
        length = hidden.shape[1]
        hide = torch.full((length, length), torch.finfo(hidden.dtype).min).triu(1)
        hide[:, : len(dropped)][:, dropped] = torch.finfo(hidden.dtype).min
        return args, {**kwargs, "attention_mask": hide[None, None]}

    decoder = model.model.language_model.layers[layer + 1 :]
    handles = [one.register_forward_pre_hook(mask, with_kwargs=True) for one in decoder]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_attention(model: Any) -> Iterator[dict[int, list[tuple[torch.Tensor, ...]]]]:
    """Run the tower's attention eagerly and record, per layer, each segment's weights, q, k, v.

    weights [H, L, L]; queries (rotated), keys (rotated) and values [H, L, D / H].
    """
    from transformers import AttentionInterface

    visual = model.model.visual
    numbers = {id(block.attn): number for number, block in enumerate(visual.blocks)}
    found: dict[int, list[tuple[torch.Tensor, ...]]] = {}

    def slow(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
    ) -> Any:
        weights = (query @ key.transpose(2, 3) * scaling).softmax(-1)
        entry = tuple(part[0] for part in (weights, query, key, value))
        found.setdefault(numbers[id(module)], []).append(entry)
        return (weights @ value).transpose(1, 2), weights

    AttentionInterface.register("recorded_by_the_test", slow)
    before = visual.config._attn_implementation
    visual.config._attn_implementation = "recorded_by_the_test"
    try:
        with torch.no_grad():
            yield found
    finally:
        visual.config._attn_implementation = before
