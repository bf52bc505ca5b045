"""A slow transcription of FlowCut's rule, and a synthetic tower that calls the method as a host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from device_reads import Reads
from vistoken.contract import ModelFacts, Place, Signal, View
from vistoken.cost import TransformerShape
from vistoken.pictures import plain
from vistoken.pruning.flowcut import FlowCut


def facts(depth: int, prefix: int = 1, text_layers: int = 8, **more: Any) -> ModelFacts:
    shape = TransformerShape(2, 8, 2, 2, 4, 16, 2)
    return ModelFacts(
        "none", (4, 10), prefix, depth + 2, depth, text_layers, shape, shape, 0, 0, **more
    )


# --- the oracle: one picture after the other, loops over fp64 numbers ----------------------------


@dataclass
class Layer:
    """Queries, keys and values [I, H, P + N, D] of all tokens; nothing changes as tokens go."""

    queries: Tensor
    keys: Tensor
    values: Tensor


def softmax(row: Sequence[float]) -> list[float]:
    top = max(row)
    exps = [math.exp(x - top) for x in row]
    return [e / sum(exps) for e in exps]


def dot(one: np.ndarray, other: np.ndarray) -> float:
    return sum(float(a) * float(b) for a, b in zip(one, other, strict=True))


def head_mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def statistics(
    layer: Layer, picture: int, left: list[int], prefix: int, mode: str
) -> tuple[list[float], list[float] | None, list[float]]:
    """Attention, likeness and norm of the tokens `left` of one picture after one layer."""
    kept = list(range(prefix)) + [prefix + i for i in left]
    q, k, v = (
        x[picture][:, kept].double().numpy() for x in (layer.queries, layer.keys, layer.values)
    )
    heads, count, width = v.shape
    attention, likeness = [], []
    for h in range(heads):
        query = q[h, 0] if prefix else q[h].mean(0)
        attention.append(softmax([dot(query, k[h, j]) / math.sqrt(width) for j in range(count)]))
        likeness.append(softmax([dot(v[h, 0], v[h, j]) for j in range(count)]))
    norm = [
        sum(abs(sum(float(v[h, j, d]) for h in range(heads)) / heads) for d in range(width))
        for j in range(count)
    ]
    if mode == "paper":
        flat = v.transpose(1, 0, 2).reshape(count, -1)
        size = [math.sqrt(dot(row, row)) for row in flat]
        cosine = [dot(flat[0], flat[j]) / (size[0] * size[j]) for j in range(count)]
        likeness = [[max(x, 0.0) for x in cosine]]
    alike = head_mean(likeness)[prefix:] if prefix else None
    return head_mean(attention)[prefix:], alike, norm[prefix:]


def flow(a: list[float], u: list[float] | None, w: list[float]) -> list[float]:
    share = [x / sum(a) for x in a]
    if u is not None:
        total = sum(u) or 1.0  # every cosine may be negative
        share = [s + x / total for s, x in zip(share, u, strict=True)]
    return [s * x for s, x in zip(share, w, strict=True)]


def spread(a: list[float]) -> float:
    share = [x / sum(a) for x in a]
    return -sum(p * math.log(p) for p in share if p > 0) / math.log(len(share))


def transcription(
    layers: list[Layer],
    keep: int,
    *,
    prefix: int = 1,
    mode: str = "released",
    assumed: dict[int, float] | None = None,
) -> tuple[list[list[int]], list[int]]:
    """What is left of each picture, and how many tokens after each layer.

    assumed: entropy ratio per layer instead of the measured one, whose least of the batch counts.
    """
    images, tokens = layers[0].values.shape[0], layers[0].values.shape[2] - prefix
    left = [list(range(tokens)) for _ in range(images)]
    history: list[list[float]] = [[] for _ in range(images)]
    lengths = []
    for i, layer in enumerate(layers):
        count = len(left[0])
        if count > keep:
            remaining, drops = len(layers) - i - 1, []
            for b in range(images):
                a, u, w = statistics(layer, b, left[b], prefix, mode)
                score = flow(a, u, w)
                old = history[b] or score
                history[b] = [0.5 * o + 0.5 * s for o, s in zip(old, score, strict=True)]
                if remaining % 2 == 0:
                    ratio = spread(a) if assumed is None else assumed[i]
                    part = (count - keep) / math.sqrt(max(remaining, 1)) * (1 - ratio**2)
                    drops.append(count - keep if remaining == 0 else round(part))
            target = max(count - max(drops, default=0), keep)
            for b in range(images):
                order = sorted(range(count), key=lambda j: (-history[b][j], j))
                stay = sorted(order[:target])
                left[b] = [left[b][j] for j in stay]
                history[b] = [history[b][j] for j in stay]
        lengths.append(len(left[0]))
    return left, lengths


# --- the tower that calls the method, as a host does ---------------------------------------------


def synthetic(
    images: int,
    tokens: int,
    depth: int,
    *,
    seed: int = 0,
    prefix: int = 1,
    peak: float = 2.0,
    dtype: torch.dtype = torch.float32,
) -> list[Layer]:
    """Random layers; the larger `peak`, the more the attention concentrates."""
    draw = torch.Generator().manual_seed(seed)
    shape = (images, 3, prefix + tokens, 5)
    return [
        Layer(*((torch.randn(shape, generator=draw) * s).to(dtype) for s in (peak, 1.5, 0.8)))
        for _ in range(depth)
    ]


def only(layers: list[Layer], *pictures: int) -> list[Layer]:
    rows = list(pictures)
    return [Layer(x.queries[rows], x.keys[rows], x.values[rows]) for x in layers]


def read(layer: Layer, origin: Tensor, prefix: int, signal: Signal) -> Tensor:
    images = len(origin)
    kept = torch.cat([torch.arange(prefix).repeat(images, 1), prefix + origin], 1)
    rows = torch.arange(images)[:, None]
    q, k, v = (
        x.transpose(1, 2)[rows, kept].transpose(1, 2)
        for x in (layer.queries, layer.keys, layer.values)
    )
    if signal is Signal.CLS_ATTENTION:
        logits = q[:, :, :1].float() @ k.float().mT / math.sqrt(k.shape[-1])
        return logits.softmax(-1)[:, :, 0, prefix:].mean(1)
    return {Signal.VISION_QUERIES: q, Signal.VISION_KEYS: k, Signal.VISION_VALUES: v}[signal]


def run(
    method: FlowCut,
    layers: list[Layer],
    keep: int,
    *,
    prefix: int = 1,
    visible: Tensor | None = None,
    reads: Reads | None = None,
) -> tuple[Tensor, list[int]]:
    """Original indices of what is left, and how many tokens after each layer."""
    images, tokens = layers[0].values.shape[0], layers[0].values.shape[2] - prefix
    known = facts(len(layers), prefix)
    origin, memory, lengths = torch.arange(tokens).repeat(images, 1), {}, []
    for stage in method.stages(known):
        if stage.place is not Place.VISION_LAYER:
            continue
        assert stage.layer == len(lengths)
        layer = layers[stage.layer]
        if origin.shape[1] > keep:
            seen = None if visible is None else visible.gather(1, origin)
            view = View(
                stage,
                known,
                plain(1, tokens),
                origin,
                memory,
                lambda signal, layer=layer, at=origin: read(layer, at, prefix, signal),
                visible=seen,
                prefix=prefix,
            )
            with reads or nullcontext():
                selection = method.select(view, keep)
            if selection is not None:
                assert selection.tokens is None and selection.indices.dtype == torch.int64
                assert (selection.indices.diff(dim=1) > 0).all()
                origin = origin.gather(1, selection.indices)
        lengths.append(origin.shape[1])
    return origin, lengths


def flat(tokens: int, depth: int, one_hot: bool) -> list[Layer]:
    layers = synthetic(1, tokens, depth)
    for layer in layers:
        layer.queries = torch.ones_like(layer.queries) * 50
        layer.keys = torch.zeros_like(layer.keys)
        if one_hot:
            layer.keys[:, :, 4] = 50
    return layers
