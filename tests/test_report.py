"""The report's figures against counted runs and real caches."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tiny
import vistoken

pytest.importorskip("transformers")


def counted(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1)
    return counter.get_total_flops()


def eager_llava(kv_heads: int) -> Any:
    """Eager attention: the counter knows no formula for the CPU's fused attention."""
    return tiny.tiny_llava(layers=3, kv_heads=kv_heads, attention="eager")


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("keep", [9, 18])
def test_flops_agree_with_a_counted_run(kv_heads: int, keep: int) -> None:
    model = eager_llava(kv_heads)
    rows = (tiny.prompt(3, "image", 4, "image", 2), tiny.prompt(50, "image", seed=2))
    inputs = {**tiny.batch(*rows), "pixel_values": tiny.pictures(3)}
    dense = counted(model, inputs)
    with vistoken.prune_visual_tokens(model, keep=keep, method="uniform") as held:
        pruned = counted(model, inputs)
        report = held.report()
    assert report.flops_dense == pytest.approx(dense, rel=0.02)
    assert report.flops == pytest.approx(pruned, rel=0.02)
    assert report.flops < report.flops_dense


def test_kv_bytes_are_those_of_the_cache() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.tiny_llava().to(dtype)
        inputs = tiny.one_image()

        def size(inputs: Any = inputs, model: Any = model) -> int:
            cache = model(**inputs, use_cache=True).past_key_values
            return sum(
                tensor.numel() * tensor.element_size()
                for layer in cache.layers
                for tensor in (layer.keys, layer.values)
            )

        dense = size()
        with vistoken.prune_visual_tokens(model, keep=9) as held:
            pruned = size()
            report = held.report()
        assert (report.kv_bytes_dense, report.kv_bytes) == (dense, pruned)


def test_text_and_dictionary() -> None:
    model = tiny.tiny_llava()
    inputs = tiny.one_image()
    with vistoken.prune_visual_tokens(model, keep=9) as held:
        model(**inputs)
        report = held.report()
    content = json.loads(json.dumps(report.to_dict()))
    assert content["tokens_in"] == [36] and content["tokens_out"] == [9]
    assert content["kept"] == [report.kept[0].tolist()]
    assert content["layer_tokens"] == [9] * 4
    assert content["mean_tokens"] == 9 and content["notes"] == []
    assert "36 -> 9" in str(report) and "-75.0%" in str(report)


def test_a_row_without_images_does_not_hide_the_savings() -> None:
    model = tiny.tiny_llava()
    rows = (tiny.prompt(3, "image", 2), tiny.prompt(5))
    inputs = {**tiny.batch(*rows), "pixel_values": tiny.pictures(1)}
    with vistoken.prune_visual_tokens(model, keep=9) as held:
        logits = model(**inputs).logits
        report = held.report()
    assert logits.shape[1] == len(rows[0]) - 36 + 9
    assert report.kv_bytes < report.kv_bytes_dense


def test_a_call_without_pictures_is_reported_as_the_last_one() -> None:
    model = tiny.tiny_llava()
    text = tiny.batch(tiny.prompt(5))
    with vistoken.prune_visual_tokens(model, keep=9) as held:
        model(**text)
        first = held.report()
        model(**tiny.one_image())
        assert held.report().tokens_out == [9]
        model(**text)
        last = held.report()
    assert first.to_dict() == last.to_dict()
    assert last.tokens_in == [] and last.flops == last.flops_dense > 0
