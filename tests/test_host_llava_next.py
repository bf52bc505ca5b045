"""LLaVA-NeXT and LLaVA-NeXT-Video: what methods see, and what they leave, against slow oracles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_llava_next as nx
import vistoken
from llava_next_oracles import (
    KEEP,
    LONG,
    NEW,
    SMALL,
    Spy,
    TowerTop,
    assembled,
    by_hand,
    generate,
    mixed,
    pooled,
    runs,
    short_tower,
    shown,
    tower,
)
from vistoken.contract import Signal
from vistoken.errors import AttachError, MethodError
from vistoken.registry import method_class, recognise

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def image_model() -> Any:
    return nx.tiny_llava_next()


@pytest.fixture(scope="module")
def video_model() -> Any:
    return nx.tiny_llava_next_video()


def pick(video: bool, image_model: Any, video_model: Any) -> Any:
    return video_model if video else image_model


BOTH = pytest.mark.parametrize("video", [False, True], ids=["images", "videos"])


def same(found: dict[Signal, Any], one: int, expected: dict[Signal, Tensor]) -> None:
    for signal, value in expected.items():
        own = found[signal][one]
        if signal is Signal.VISION_KEYS:
            own = own.transpose(0, 1).flatten(1)
        own = own[:, None] if own.dim() == 1 else own
        assert torch.allclose(own, value, atol=1e-6), signal


@torch.no_grad()
def test_signals_of_images(image_model: Any) -> None:
    sizes = (nx.TALL, SMALL, LONG)
    inputs, _ = nx.many_images(sizes)
    Spy.seen.clear()
    with vistoken.attach(image_model, Spy(keep=KEEP)):
        image_model(**inputs)
    features = runs(image_model, inputs)
    assert len(Spy.seen) == 3
    for number, (size, (tokens, found)) in enumerate(zip(sizes, Spy.seen, strict=True)):
        tiles, rows, columns = nx.geometry(size)
        assert tokens == nx.GRID**2 + rows * columns
        own = tower(image_model, inputs["pixel_values"][number, :tiles])
        same(found, 0, {signal: assembled(value, size) for signal, value in own.items()})
        newline = (features[number] == image_model.model.image_newline).all(-1)
        assert torch.equal(found[Signal.FEATURES][0], features[number][~newline])
        through = found[Signal.PROJECTOR](found[Signal.ENCODED])
        assert torch.allclose(through, found[Signal.FEATURES], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["average", "max", "conv"])
def test_signals_of_videos(mode: str) -> None:
    model = nx.tiny_llava_next_video(spatial_pool_mode=mode)
    inputs, _ = nx.many_videos()
    Spy.seen.clear()
    with vistoken.attach(model, Spy(keep=KEEP)):
        model(**inputs)
    features = runs(model, inputs)
    (_, image), (tokens, videos) = Spy.seen
    own = tower(model, inputs["pixel_values"][0])
    same(image, 0, {signal: assembled(value, nx.WIDE) for signal, value in own.items()})
    assert tokens == 5 * nx.FRAME
    for number, frames in enumerate(inputs["pixel_values_videos"]):
        own = {signal: pooled(value) for signal, value in tower(model, frames).items()}
        if mode != "average":
            own.pop(Signal.ENCODED)
        same(videos, number, own)
        assert torch.equal(videos[Signal.FEATURES][number], features[1 + number])
    through = videos[Signal.PROJECTOR](videos[Signal.ENCODED])
    assert torch.allclose(through, videos[Signal.FEATURES], atol=1e-6)


@BOTH
def test_keys_of_pictures_are_the_same_in_any_batch(
    video: bool, image_model: Any, video_model: Any
) -> None:
    host = recognise(pick(video, image_model, video_model))
    together, singles = mixed(video)
    names = ("pixel_values", "image_sizes", "pixel_values_videos")
    keys = host.image_keys({name: together[name] for name in names if name in together})
    alone = [
        host.image_keys({name: single[name] for name in names if name in single})
        for single in singles[:2]
    ]
    if video:  # images come first
        alone = [alone[0][:1], alone[0][1:], alone[1]]
    assert torch.equal(torch.cat(alone), keys) and len(keys.unique()) == 3


# --- pruning before the LLM ----------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("uniform", "renumber"),
        ("cls_topk", "original"),
        ("holov", "renumber"),
        ("random", "original"),
    ],
)
def test_pruning_equals_the_prompt_shortened_by_hand(
    video: bool, name: str, positions: str, image_model: Any, video_model: Any
) -> None:
    model = pick(video, image_model, video_model)
    inputs, singles = mixed(video)
    method = method_class(name).from_options({"keep": KEEP, "positions": positions})
    with vistoken.attach(model, method) as held:
        found = generate(model, inputs)
        kept = held.report().kept
        logits = [model(**single).logits for single in singles]
    assert [len(own) for own in kept] == [KEEP] * 3
    assert torch.equal(found[:, :-NEW], inputs["input_ids"])
    for row, oracle in enumerate(by_hand(model, inputs, kept)):
        extra = {"position_ids": oracle["at"]} if positions == "original" else {}
        extra["attention_mask"] = torch.ones_like(oracle["at"])
        extra["inputs_embeds"] = oracle["embeds"]
        assert torch.allclose(logits[row], model(**extra).logits, atol=1e-5), row
        assert torch.equal(found[row, -NEW:], generate(model, extra)[0]), row


@pytest.mark.parametrize("newlines", ["keep", "drop"])
def test_newlines(newlines: str, image_model: Any) -> None:
    inputs = nx.one_image()
    _, rows, columns = nx.geometry(nx.TALL)
    ends = {nx.GRID**2 + row * (columns + 1) + columns for row in range(rows)}
    method = method_class("cls_topk")
    with vistoken.attach(image_model, method(keep=30, newlines=newlines)) as held:
        logits = image_model(**inputs).logits
        kept = held.report().kept
    assert len(kept[0]) == 30
    assert ends & set(kept[0].tolist()) == (ends if newlines == "keep" else set())
    oracle = by_hand(image_model, inputs, kept)[0]
    expected = image_model(inputs_embeds=oracle["embeds"]).logits
    assert torch.allclose(logits, expected, atol=1e-5)
    with vistoken.attach(image_model, method(keep=len(ends), newlines=newlines)):
        if newlines == "drop":
            assert image_model(**inputs).logits.shape[1] == 10 + len(ends)
        else:
            with pytest.raises(MethodError, match="newline"):
                image_model(**inputs)


def test_flat_tiles_and_sizes_in_a_list(image_model: Any) -> None:
    sizes = (nx.TALL, SMALL, LONG)
    inputs, _ = nx.many_images(sizes)
    pairs = zip(inputs["pixel_values"], sizes, strict=True)
    tiles = [own[: nx.geometry(size)[0]] for own, size in pairs]
    flat = {**inputs, "pixel_values": torch.cat(tiles), "image_sizes": [list(s) for s in sizes]}
    with vistoken.attach(image_model, method_class("random")(keep=KEEP)) as held:
        expected = image_model(**inputs).logits
        kept = held.report().kept
        assert torch.equal(image_model(**flat).logits, expected)
    for own, other in zip(held.report().kept, kept, strict=True):
        assert torch.equal(own, other)


# --- pruning inside the tower --------------------------------------------------------------------


@torch.no_grad()
def test_tokens_dropped_in_the_tower(image_model: Any) -> None:
    sizes = (nx.TALL, SMALL, LONG)
    inputs, _ = nx.many_images(sizes)
    Spy.seen.clear()
    with vistoken.attach(image_model, TowerTop(keep=30)) as held:
        logits = image_model(**inputs).logits
        report = held.report()
    assert report.tokens_out == [30] * 3

    def level(size: tuple[int, int]) -> int:
        counts, wanted = shown(size).sum(1), 30 - nx.geometry(size)[1]
        return next(t for t in range(1, 17) if int(counts.clamp(max=t).sum()) >= wanted)

    keep = max(map(level, sizes))
    for number, (size, (origin, found)) in enumerate(zip(sizes, Spy.seen, strict=True)):
        visible = shown(size)
        states, numbers = [], []
        for tile, own in enumerate(visible):
            left, index = short_tower(image_model, inputs["pixel_values"][number, tile], own, keep)
            states.append(left[own[index]])
            numbers.append(tile * nx.GRID**2 + index[own[index]])
        place = torch.full((visible.numel(),), -1)
        order = assembled(torch.arange(visible.numel()).view(-1, nx.GRID**2, 1), size)[:, 0]
        place[order] = torch.arange(len(order))
        expected, sort = place[torch.cat(numbers)].sort()
        assert torch.equal(origin[0], expected)
        encoded = torch.cat(states)[sort]
        assert torch.allclose(found[Signal.ENCODED][0], encoded, atol=1e-5)
        projected = image_model.model.multi_modal_projector(encoded)
        assert torch.allclose(found[Signal.FEATURES][0], projected, atol=1e-5)
        assert found[Signal.CLS_ATTENTION].shape == origin.shape
        assert found[Signal.VISION_KEYS].shape == (1, 4, len(expected), 8)
    assert logits.shape[1] == max(10 + 60, 9 + 30)


@pytest.mark.parametrize("name", ["flowcut", "tome"])
def test_methods_inside_the_tower(name: str, image_model: Any) -> None:
    inputs, _ = nx.many_images((nx.TALL, SMALL, LONG))
    with vistoken.attach(image_model, method_class(name)(keep=30)) as held:
        generate(image_model, inputs)
        report = held.report()
    for own in report.kept:
        assert len(own) == 30 and bool((own[1:] > own[:-1]).all())
    assert report.flops < report.flops_dense


def test_places_inside_the_tower_that_cannot_work(video_model: Any) -> None:
    with pytest.raises(AttachError, match="vision layer"):
        vistoken.attach(video_model, method_class("flowcut")(keep=30))
    joined = nx.tiny_llava_next(vision_feature_layer=[-3, -2])
    with pytest.raises(AttachError, match="joins the outputs"):
        vistoken.attach(joined, method_class("flowcut")(keep=30))
    inputs = nx.one_image()
    with vistoken.attach(joined, method_class("cls_topk")(keep=30)) as held:
        logits = joined(**inputs).logits
        kept = held.report().kept
    oracle = by_hand(joined, inputs, kept)[0]
    assert torch.allclose(logits, joined(inputs_embeds=oracle["embeds"]).logits, atol=1e-5)
