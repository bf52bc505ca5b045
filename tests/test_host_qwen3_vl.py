"""Qwen3-VL: DeepStack, frames between timestamps, and what both Qwen-VL hosts must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny_qwen as tiny
import vistoken
from qwen_host_tests import KEEP, METHODS, HostTests, LastRow, generate, mixed
from qwen_oracle import Family, logits_by_hand, rows_by_hand, shown
from vistoken.errors import AttachError

pytest.importorskip("transformers")


class TestQwen3VL(HostTests):
    family = Family("qwen3_vl", tiny.tiny_qwen3_vl, split=True)

    def test_every_frame_is_a_picture(self, model: Any) -> None:
        inputs = {
            **tiny.batch(tiny.prompt(2, (3, 4, 5), 3, split=True)),
            **tiny.videos((3, 4, 5)),
        }
        with vistoken.attach(model, METHODS["uniform"]) as held, torch.no_grad():
            model(**inputs)
        assert held.report().tokens_in == [20] * 3 and held.report().tokens_out == [KEEP] * 3

    def test_added_features_matter_and_follow_the_kept_tokens(self, model: Any) -> None:
        """In a row that reads a video before an image, encoded the other way round."""
        inputs, _ = mixed(self.family)
        with vistoken.attach(model, METHODS["random"]) as held, torch.no_grad():
            logits = model(**inputs).logits
            kept = held.report().kept
        row = rows_by_hand(model, self.family, inputs, kept)[0]
        assert torch.allclose(logits[0, -len(row) :], logits_by_hand(model, row), atol=1e-5)
        for layer in range(2):
            changed = [features.clone() for features in row.added]
            changed[layer] = changed[layer].roll(1, 0)
            row.added, before = changed, row.added
            assert not torch.allclose(logits[0, -len(row) :], logits_by_hand(model, row), atol=1e-3)
            row.added = before

    def test_merged_tokens_take_the_added_features_of_their_place(self, model: Any) -> None:
        inputs = tiny.one_image()
        method = vistoken.Pooling(keep=KEEP)
        with vistoken.attach(model, method) as held, torch.no_grad():
            logits = model(**inputs).logits[0]
            kept = held.report().kept
        (row,) = rows_by_hand(model, self.family, inputs, kept)
        (picture,) = shown(model, self.family, inputs, "image")
        pooled = picture.features.view(3, 2, 3, 2, -1).mean((1, 3)).flatten(0, 1)
        row.embeds[row.visual] = pooled
        assert torch.allclose(logits, logits_by_hand(model, row), atol=1e-4)

    def test_stages_wait_for_the_last_added_features(self) -> None:
        model = self.family.build(vision_layers=4, deepstack=(0, 1, 2), layers=5)
        with pytest.raises(AttachError, match="layers 2 to 3"):
            vistoken.attach(model, LastRow(keep=KEEP, layer=1))
        with vistoken.attach(model, LastRow(keep=KEEP, layer=2)) as held:
            generate(model, tiny.one_image())
        assert held.report().layer_tokens == [36, 36, 36, KEEP, KEEP]

    def test_without_deepstack(self) -> None:
        model = self.family.build(deepstack=())
        inputs, _ = mixed(self.family)
        with vistoken.attach(model, METHODS["cls_topk"]) as held, torch.no_grad():
            logits = model(**inputs).logits
            kept = held.report().kept
        for number, row in enumerate(rows_by_hand(model, self.family, inputs, kept)):
            by_hand = logits_by_hand(model, row)
            assert torch.allclose(logits[number, -len(row) :], by_hand, atol=1e-5)
