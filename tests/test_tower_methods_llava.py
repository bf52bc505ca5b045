"""FlowCut and ToMe attached to a model, against a tower run by hand, one picture at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import llava_oracles as hand
import tiny
import vistoken
from vistoken.pruning import Pruner
from vistoken.pruning.flowcut import FlowCut
from vistoken.pruning.tome import ToMe

DEPTH = 8
LAST = 6  # features are what layer 6 of 0 to 7 gives; before it, methods may prune


@pytest.fixture(autouse=True)
def no_graph() -> Iterator[None]:
    with torch.no_grad():
        yield


def tiny_llava(attention: str = "sdpa", peak: float = 200.0) -> Any:
    return hand.tiny_llava(vision_layers=DEPTH, attention=attention, peak=peak)


# --- the tower by hand --------------------------------------------------------------------------


def entered(model: Any, pixels: Tensor) -> Tensor:
    """What the first layer reads of one picture: [1 + N, C]."""
    tower = model.model.vision_tower
    return tower.pre_layrnorm(tower.embeddings(pixels[None]))[0]


def attend(
    layer: Any, x: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [S, C] plus its attention, and maps [H, S, S], keys and values [H, S, D]."""
    own, normed = layer.self_attn, layer.layer_norm1(x)
    q, k, v = (
        getattr(own, name)(normed).view(len(x), own.num_heads, -1).transpose(0, 1)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    logits = q @ k.mT / q.shape[-1] ** 0.5
    maps = (logits if bias is None else logits + bias).softmax(-1)
    return x + own.out_proj((maps @ v).transpose(0, 1).flatten(1)), maps, k, v


def think(layer: Any, x: Tensor) -> Tensor:
    return x + layer.mlp(layer.layer_norm2(x))


def layers(model: Any) -> list[Any]:
    return list(model.model.vision_tower.encoder.layers)[: LAST + 1]


def test_the_tower_by_hand_is_the_bare_model() -> None:
    model, pixels = tiny_llava("eager"), tiny.pictures(1)
    out = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    x = entered(model, pixels[0])
    for number, layer in enumerate(layers(model)):
        x, maps, _, _ = attend(layer, x)
        assert torch.allclose(maps, out.attentions[number][0], atol=1e-5)
        x = think(layer, x)
        assert torch.allclose(x, out.hidden_states[number + 1][0], atol=1e-5)
    its = hand.features(model, {"pixel_values": pixels})[0]
    assert torch.allclose(model.model.multi_modal_projector(x[1:]), its, atol=1e-5)


# --- FlowCut -------------------------------------------------------------------------------------


def flow(maps: Tensor, v: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """The CLS row and the information flow [N] behind one layer."""
    row = maps[:, 0, 1:].double().mean(0)
    v = v.double()
    if mode == "released":
        alike = torch.stack([(head @ head[0]).softmax(0)[1:] for head in v]).mean(0)
    else:
        flat = v.transpose(0, 1).flatten(1)
        alike = torch.stack([torch.cosine_similarity(flat[0], one, dim=0) for one in flat[1:]])
        alike = alike.clamp(min=0)
    norm = v.mean(0)[1:].abs().sum(-1)
    return row, (row / row.sum() + alike / alike.sum()) * norm


def spread(row: Tensor) -> float:
    share = (row / row.sum()).tolist()
    return -sum(p * math.log(p) for p in share if p > 0) / math.log(len(share))


def cut_by_hand(
    model: Any,
    pixels: Tensor,
    keep: int,
    mode: str,
    assumed: Callable[[int], float] | None,
) -> tuple[list[Tensor], list[list[int]], list[int]]:
    """Features, what is left of each picture, tokens that enter layers 0 to 6.

    assumed: the entropy ratio at each layer; None measures it, over all pictures.
    """
    xs = [entered(model, one) for one in pixels]
    left = [list(range(tiny.TOKENS)) for _ in xs]
    history: list[Tensor] = []
    lengths = []
    for number, layer in enumerate(layers(model)):
        count, rest = len(left[0]), LAST - number - 1
        lengths.append(count)
        ratios = []
        for b, x in enumerate(xs):
            x, maps, _, v = attend(layer, x)
            xs[b] = think(layer, x)
            row, found = flow(maps, v, mode)
            if number:
                history[b] = 0.5 * history[b] + 0.5 * found
            else:
                history.append(found)
            ratios.append(spread(row))
        if number == LAST or rest % 2 or count <= keep:
            continue
        target = keep
        if rest:
            ratio = min(ratios) if assumed is None else assumed(number)
            drop = round((count - keep) / math.sqrt(rest) * (1 - ratio**2))
            target = max(count - drop, keep)
        for b, x in enumerate(xs):
            stay = hand.best(history[b], target)
            history[b] = history[b][stay]
            left[b] = [left[b][j] for j in stay]
            xs[b] = torch.cat([x[:1], x[1:][stay]])
    return [model.model.multi_modal_projector(x[1:]) for x in xs], left, lengths


def typical(layer: int) -> float:
    return {1: 0.97, 3: 0.9}[layer]


def check(
    method: Pruner, attention: str, inputs: dict[str, Tensor], by_hand: Callable[..., Any]
) -> list[int]:
    """Kept tokens, lengths, logits by step and generated ids; returns the lengths."""
    model = tiny_llava(attention)
    seen: list[int] = []
    tower = model.model.vision_tower
    with vistoken.attach(model, method) as held:
        hooks = [
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(kwargs["hidden_states"].shape[1] - 1),
                with_kwargs=True,
            )
            for layer in tower.encoder.layers[: LAST + 1]
        ]
        model(**inputs)
        for hook in hooks:
            hook.remove()
        kept = [own.tolist() for own in held.report().kept]
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, -6:]
    found, again = hand.pruned(model, inputs, method)
    bare = tiny_llava("eager")
    visual, left, lengths = by_hand(bare, inputs["pixel_values"])
    assert kept == again == left and seen == lengths
    by_row = []
    renumber = method.positions != "original"
    for number, row in enumerate(hand.rows_of(inputs)):
        own = slice(row.first, row.first + len(row.pictures))
        by_row.append(
            hand.greedy_by_hand(bare, row, visual[own], left=left[own], renumber=renumber)
        )
        if renumber:
            short, _ = hand.short_prompt(bare, row, visual[own], left[own])
            route = bare.generate(inputs_embeds=short[None], max_new_tokens=6, do_sample=False)
            assert torch.equal(route[0], ids[number])
    hand.assert_rows(found, by_row)
    return lengths


calls = pytest.mark.parametrize(
    ("make", "attention"), [(hand.one_row, "eager"), (hand.padded_batch, "sdpa")]
)


@calls
@pytest.mark.parametrize(
    "given",
    [{}, {"mode": "paper"}, {"entropy": 0.5}, {"positions": "original"}],
    ids=["released", "paper", "entropy", "original"],
)
def test_flowcut_by_its_fixed_schedule(given: dict[str, Any], make: Any, attention: str) -> None:
    method = FlowCut(keep=9, **given)
    ratio = typical if method.entropy is None else lambda _: 0.5

    def by_hand(model: Any, pixels: Tensor) -> Any:
        return cut_by_hand(model, pixels, 9, method.mode, ratio)

    lengths = check(method, attention, make(), by_hand)
    first, second = (10, 9) if method.entropy else (1, 3)
    assert lengths == [36] * 2 + [36 - first] * 2 + [36 - first - second] * 2 + [9]


@calls
@pytest.mark.parametrize("mode", ["released", "paper"])
def test_flowcut_by_the_least_entropy_of_the_batch(make: Any, mode: str, attention: str) -> None:
    method = FlowCut(keep=9, mode=mode, batch_invariant=False)

    def by_hand(model: Any, pixels: Tensor) -> Any:
        return cut_by_hand(model, pixels, 9, mode, None)

    lengths = check(method, attention, make(), by_hand)
    assert 9 < lengths[4] < lengths[2] < 36


def test_the_official_schedule_depends_on_the_batch() -> None:
    model, inputs = tiny_llava(), hand.padded_batch()
    together = cut_by_hand(model, inputs["pixel_values"], 9, "released", None)[2]
    alone = [
        cut_by_hand(model, one[None], 9, "released", None)[2] for one in inputs["pixel_values"]
    ]
    assert together[2] == min(lengths[2] for lengths in alone)
    assert any(lengths != together for lengths in alone)


@pytest.mark.parametrize(
    "method",
    [FlowCut(keep=9), FlowCut(keep=9, batch_invariant=False), ToMe(keep=12)],
    ids=["flowcut", "measured", "tome"],
)
def test_the_same_picture_twice_keeps_the_same(method: Pruner) -> None:
    model, inputs = tiny_llava(), hand.padded_batch()
    inputs["pixel_values"] = inputs["pixel_values"][[0, 1, 0]]
    _, kept = hand.pruned(model, inputs, method, 0)
    assert kept[0] == kept[2] != kept[1]


def test_attention_of_nothing_but_one_token_is_finite() -> None:
    """Weights of exactly zero: the entropy is 0, and most of the surplus goes at once."""
    model, inputs = tiny_llava(peak=1e5), hand.padded_batch()
    bare = model.model.vision_tower
    bare.set_attn_implementation("eager")
    maps = bare(inputs["pixel_values"], output_attentions=True).attentions[3]
    assert bool((maps[:, :, 0] == 0).any())
    for invariant in (True, False):
        method = FlowCut(keep=9, batch_invariant=invariant)
        found, kept = hand.pruned(model, inputs, method, 1)
        assert all(bool(logits.isfinite().all()) for logits in found)
        assert [len(stay) for stay in kept] == [9] * 3


# --- ToMe ----------------------------------------------------------------------------------------


def merge_by_hand(
    model: Any, pixels: Tensor, counts: list[int], order: str, weigh: bool = True
) -> tuple[list[Tensor], list[list[int]], list[int]]:
    """Features in raster order, what is left of each picture, tokens that enter layers 0 to 6.

    counts: how many tokens merge in each layer, from the first on.
    """
    found, left = [], []
    for one in pixels:
        x, origin, sizes = entered(model, one), list(range(tiny.TOKENS)), [1] * tiny.TOKENS
        lengths = []
        for number, layer in enumerate(layers(model)):
            lengths.append(len(origin))
            # a token that stands for several weighs as much as they would
            bias = torch.tensor([1.0, *sizes]).log() if weigh else None
            x, _, k, _ = attend(layer, x, bias)
            merging = counts[number] if number < len(counts) else 0
            if merging:
                metric = k.double().mean(0)[1:]
                first = range(1, len(origin), 2)  # CLS is position 0, so index 1 is position 2
                second = range(0, len(origin), 2)
                links = []
                for a in first:
                    alike = torch.cosine_similarity(metric[a][None], metric[list(second)]).tolist()
                    top = max(range(len(alike)), key=lambda j: (alike[j], -j))
                    links.append((-alike[top], a, second[top]))
                joined = {a: b for _, a, b in sorted(links)[:merging]}
                rows, weights = {}, {}
                for i in range(len(origin)):
                    if i not in joined:
                        members = [i, *(a for a, b in joined.items() if b == i)]
                        weights[i] = sum(sizes[j] for j in members)
                        heavy = torch.stack([sizes[j] * x[1 + j] for j in members])
                        rows[i] = heavy.sum(0) / weights[i]
                sequence = sorted(rows)
                if order == "released":
                    sequence = [i for i in first if i in rows] + list(second)
                x = torch.stack([x[0], *(rows[i] for i in sequence)])
                sizes = [weights[i] for i in sequence]
                origin = [origin[i] for i in sequence]
                assert sum(sizes) == tiny.TOKENS
            x = think(layer, x)
        raster = sorted(range(len(origin)), key=lambda i: origin[i])
        found.append(model.model.multi_modal_projector(x[1:][raster]))
        left.append(sorted(origin))
    return found, left, lengths


@calls
@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ({"keep": 12}, [4] * 6),
        ({"keep": 12, "order": "released"}, [4] * 6),
        ({"keep": 12, "schedule": "decreasing"}, [8, 7, 5, 3, 1]),
        ({"keep": 12, "last_layer": 2}, [8, 8, 8]),
        ({"keep": 3}, [6, 6, 6, 6, 6, 3]),  # half of the tokens is the most that can merge
        ({"keep": 35}, [1]),
        ({"keep": 12, "positions": "original"}, [4] * 6),
    ],
    ids=["constant", "released", "decreasing", "last_layer", "few", "one", "original"],
)
def test_tome(given: dict[str, Any], counts: list[int], make: Any, attention: str) -> None:
    method = ToMe(**given)

    def by_hand(model: Any, pixels: Tensor) -> Any:
        return merge_by_hand(model, pixels, counts, method.order)

    lengths = check(method, attention, make(), by_hand)
    assert lengths[-1] == given["keep"]


def test_sizes_in_the_attention_matter() -> None:
    """The oracle above would see it if merged tokens weighed as much as single ones."""
    model, inputs = tiny_llava(), hand.one_row()
    with_sizes, without = (
        merge_by_hand(model, inputs["pixel_values"], [4] * 6, "raster", weigh)[0][0]
        for weigh in (True, False)
    )
    assert len(with_sizes) == len(without) and not torch.allclose(with_sizes, without, atol=1e-3)


# --- calls ---------------------------------------------------------------------------------------

METHODS = [(FlowCut(keep=9), FlowCut(keep=36)), (ToMe(keep=12), ToMe(keep=36))]
names = [method.name for method, _ in METHODS]


@pytest.mark.parametrize("method", [method for method, _ in METHODS], ids=names)
def test_a_batch_is_its_rows(method: Pruner) -> None:
    hand.check_batch_is_its_rows(method, vision_layers=DEPTH)


@pytest.mark.parametrize(("method", "neutral"), METHODS, ids=names)
def test_no_trace_is_left(method: Pruner, neutral: Pruner) -> None:
    hand.check_leaves_no_trace(method, neutral, vision_layers=DEPTH)
