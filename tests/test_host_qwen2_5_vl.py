"""Qwen2.5-VL: windows, contiguous videos with time, and what both Qwen-VL hosts must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny_qwen as tiny
import vistoken
from qwen_host_tests import KEEP, METHODS, HostTests, LastRow, mixed
from qwen_oracle import Family, logits_by_hand, rows_by_hand
from vistoken.contract import Signal
from vistoken.errors import AttachError, ModelNotSupported

pytest.importorskip("transformers")


class TestQwen2_5VL(HostTests):
    family = Family("qwen2_5_vl", tiny.tiny_qwen2_5_vl, split=False)

    def tower_order(self, model: Any, grids: list[tuple[int, int, int]]) -> torch.Tensor:
        from transformers.vision_utils import get_vision_window_index

        visual = model.model.visual
        patches = torch.tensor([[t, h * tiny.MERGE, w * tiny.MERGE] for t, h, w in grids])
        return get_vision_window_index(
            patches,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )[0]

    def test_scores_do_not_depend_on_the_order_of_windows(self) -> None:
        inputs, _ = mixed(self.family)
        every = []
        for window in (4, 8, 12, 400):  # 400: one window, so the order is raster order
            model = self.family.build(window=window, full=(0, 1, 2, 3))
            every.append(self.spied(model, inputs))
        straight = every.pop()
        wanted = (Signal.CLS_ATTENTION, Signal.ENCODED, Signal.VISION_KEYS, Signal.FEATURES)
        for other in every:
            for (_, ours), (_, theirs) in zip(straight, other, strict=True):
                for signal in wanted:
                    assert torch.allclose(ours[signal], theirs[signal], atol=1e-5), signal

    @pytest.mark.parametrize("window", [4, 12])
    def test_other_windows(self, window: int) -> None:
        model = self.family.build(window=window)
        inputs, _ = mixed(self.family)
        with vistoken.attach(model, METHODS["cls_topk"]) as held, torch.no_grad():
            logits = model(**inputs).logits
            report = held.report()
        for number, row in enumerate(rows_by_hand(model, self.family, inputs, report.kept)):
            by_hand = logits_by_hand(model, row)
            assert torch.allclose(logits[number, -len(row) :], by_hand, atol=1e-5)
        eager = self.family.build(window=window, attention="eager")
        assert report.flops_dense == pytest.approx(self.counted(eager, inputs), rel=0.02)

    @pytest.mark.parametrize("as_tensor", [True, False])
    def test_seconds_between_frames_stretch_time(self, model: Any, as_tensor: bool) -> None:
        inputs, _ = mixed(self.family)
        seconds: Any = torch.tensor([3.0]) if as_tensor else [3.0]
        with vistoken.attach(model, METHODS["random"]) as held, torch.no_grad():
            logits = model(**inputs, second_per_grid_ts=seconds).logits
            kept = held.report().kept
        rows = rows_by_hand(model, self.family, inputs, kept, interval=6)
        for number, row in enumerate(rows):
            by_hand = logits_by_hand(model, row)
            assert torch.allclose(logits[number, -len(row) :], by_hand, atol=1e-5)

    def test_a_video_is_one_picture(self, model: Any) -> None:
        inputs = {**tiny.batch(tiny.prompt(2, (3, 4, 5), 3)), **tiny.videos((3, 4, 5))}
        with vistoken.attach(model, METHODS["uniform"]) as held, torch.no_grad():
            model(**inputs)
        assert held.report().tokens_in == [60] and held.report().tokens_out == [KEEP]

    def test_sliding_window_attention_is_refused(self) -> None:
        model = self.family.build(use_sliding_window=True, sliding_window=8, max_window_layers=2)
        with pytest.raises(ModelNotSupported, match="sliding-window"):
            vistoken.attach(model, METHODS["uniform"])

    def test_angles_apart_by_axis_are_refused_inside_the_llm(
        self, model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As the first releases of transformers 5 hand them to the layers."""

        def apart(hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.zeros(3, 1, 1, 8), torch.zeros(3, 1, 1, 8)

        monkeypatch.setattr(model.model.language_model.rotary_emb, "forward", apart)
        with pytest.raises(AttachError, match="transformers .* after LLM layer 1"):
            vistoken.attach(model, LastRow(keep=KEEP))
        vistoken.attach(model, METHODS["uniform"]).detach()
