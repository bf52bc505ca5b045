"""The hosts that the lifecycle matrix crosses with every method; a new host is one more row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import tiny
import tiny_internvl
import tiny_llava_next
import tiny_llava_onevision
import tiny_qwen
from vistoken.pictures import Picture
from vistoken.registry import recognise

# Options that a method needs to be itself on a tiny grid, beyond the budget.
OPTIONS: dict[str, dict[str, Any]] = {"holov": {"crops": 4}}


@dataclass(frozen=True)
class HostCase:
    """How to build a tiny model of one host and inputs for it.

    one(seed): a prompt with one picture of `tokens` visual tokens, newline tokens included; keep: a
    budget for it. many(): a left-padded batch of several pictures, with a row that has two and a
    row that has none, and its rows as single calls. The LLM has at least 4 layers.
    """

    name: str
    build: Callable[[], Any]
    one: Callable[[int], dict[str, torch.Tensor]]
    many: Callable[[], tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]]
    tokens: int
    keep: int

    def picture(self, model: Any) -> Picture:
        """The geometry of the picture of `one`."""
        from vistoken.adapters.vlm_pipeline import Pipeline

        pipeline = Pipeline(recognise(model), ())
        given = self.one(0)
        vision = pipeline.vision_of(given)
        (found,) = pipeline.read(given["input_ids"], None, None, None, vision).pictures
        return found


def _llava_one(seed: int) -> dict[str, torch.Tensor]:
    return tiny.one_image(seed=seed)


def _llava_many() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A left-padded batch (two images, one, none) and its rows as single calls."""
    rows = [
        tiny.prompt(3, "image", 4, "image", 2, seed=1),
        tiny.prompt(2, "image", 6, seed=2),
        tiny.prompt(7, seed=3),
    ]
    pixels = tiny.pictures(3, seed=5)
    singles = [
        {**tiny.batch(rows[0]), "pixel_values": pixels[:2]},
        {**tiny.batch(rows[1]), "pixel_values": pixels[2:]},
        tiny.batch(rows[2]),
    ]
    return {**tiny.batch(*rows), "pixel_values": pixels}, singles


HOSTS = [
    HostCase("llava", tiny.tiny_llava, _llava_one, _llava_many, tokens=tiny.TOKENS, keep=9),
    *tiny_llava_next.cases(),
    *tiny_llava_onevision.cases(),
    *tiny_internvl.cases(),
    *(
        HostCase(name, build, tiny_qwen.one_image, tiny_qwen.many, tokens=tiny_qwen.TOKENS, keep=9)
        for name, build in (
            ("qwen2_5_vl", tiny_qwen.tiny_qwen2_5_vl),
            ("qwen3_vl", tiny_qwen.tiny_qwen3_vl),
        )
    ),
]
