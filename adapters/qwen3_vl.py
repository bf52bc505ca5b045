"""Qwen3-VL: a packed vision tower, several of whose layers reach the first layers of the LLM."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vistoken.adapters.vlm_grid import look_up
from vistoken.adapters.vlm_packed import PARTS, PackedTowerHost, packed_facts
from vistoken.adapters.vlm_tower import TowerCall
from vistoken.pictures import Part, Picture
from vistoken.prompt import Shortening


class Qwen3VLHost(PackedTowerHost):
    """`Qwen3VLForConditionalGeneration`, images and videos.

    A visual token is a 2 × 2 group of 16 px patches. The prompt has a timestamp before each pair
    of frames of a video, so each is a picture of its own, with the budget of a picture. The LLM
    adds features of some vision layers (DeepStack) to the visual tokens behind its first layers:
    a token that stays keeps its own; one that stands for merged tokens keeps those of the token
    whose place it takes. Inside the LLM, tokens can be dropped after the last layer that adds any.
    """

    name: ClassVar[str] = "qwen3_vl"
    title: ClassVar[str] = "Qwen3-VL"
    classes: ClassVar[tuple[str, ...]] = ("Qwen3VLForConditionalGeneration",)
    injects: ClassVar[bool] = True
    forward_names: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "inputs_embeds",
        "labels",
    )

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        look_up(model, (*PARTS, "model.visual.deepstack_merger_list"), self.title)
        added = len(self.visual.deepstack_merger_list)
        self.facts = packed_facts(
            self, mlp_matrices=2, mergers=1 + added, first_text_stage=max(0, added - 1)
        )

    def shown(self, kind: str, frames: int, part: Part) -> list[Picture]:
        if kind == "image":
            return super().shown(kind, frames, part)
        return [Picture((part,), kind=kind)] * frames

    def keep_more(self, call: TowerCall, output: Any, sizes: list[int]) -> None:
        added = call.extra.setdefault("added", [])
        by_layer = [features.split(sizes) for features in output.deepstack_features]
        added += zip(*by_layer, strict=True)

    def inject(self, call: TowerCall, plan: Shortening, kept: list[Tensor]) -> dict[str, Any]:
        """The mask [B, S] of visual tokens, and for each row the features [layers, n, C] to add.

        In reading order, which is not that of encoding where a row mixes images and videos.
        """
        if not call.extra["added"]:
            return {}
        shape = (plan.short.rows, plan.length)
        mask = torch.zeros(shape, dtype=torch.bool, device=plan.index.device)
        at = (plan.visual_rows, plan.visual_columns)
        mask = mask.index_put(at, torch.ones_like(plan.kept, dtype=torch.bool))
        rows: list[list[Tensor]] = [[] for _ in range(plan.short.rows)]
        starts = plan.short.image_starts
        for number in sorted(range(len(kept)), key=lambda number: starts[number]):
            features = torch.stack(call.extra["added"][number])
            rows[plan.short.image_rows[number]].append(features[:, kept[number]])
        return {"mask": mask, "rows": [torch.cat(own, dim=1) for own in rows if own]}

    def injected(self, found: dict[str, Any], copies: int) -> dict[str, Any]:
        rows = [own for own in found["rows"] for _ in range(copies)]
        return {
            "visual_pos_masks": found["mask"].repeat_interleave(copies, dim=0),
            "deepstack_visual_embeds": list(torch.cat(rows, dim=1).unbind(0)),
        }
