"""What a call did: tokens, FLOPs and KV bytes, dense and as it ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistoken.contract import ModelFacts


@dataclass(frozen=True)
class CallRecord:
    """What the host noted of one prefill; tensors stay on their device until they are read.

    `kept` [I, K] int64 per call, or None when every token stayed; `tower_tokens` is the sequence
    length that entered each vision layer; `prompt_dense` and `prompt` are the padded prompt
    lengths before and after; `projected` counts the tokens of one image that went through the
    projector.
    """

    images: int
    rows: int
    prompt_dense: int
    prompt: int
    kept: Tensor | None
    tower_tokens: tuple[int, ...]
    projected: int
    itemsize: int


class Ledger:
    """Holds the record of the last call of one attachment."""

    def __init__(self) -> None:
        self.last: CallRecord | None = None

    def write(self, record: CallRecord) -> None:
        """Replace the last record, in one step, so that threads never see half of one."""
        self.last = record


class Report:
    """Tokens, FLOPs and KV bytes of the prefill of the last call.

    kept: list of int64 CPU tensors, one per image: ascending indices into its visual tokens.
    tokens_in, tokens_out: per image, visual tokens before pruning / entering the LLM.
    layer_tokens: visual tokens of all images that enter each LLM layer.
    flops, flops_dense: of vision tower, projector, LLM and output head (last position), all rows.
    kv_bytes, kv_bytes_dense: of the KV cache after the prefill, all rows, without beams.
    """

    def __init__(self, call: CallRecord, facts: ModelFacts) -> None:
        total = facts.visual_tokens
        if call.kept is None:
            self.kept = [torch.arange(total) for _ in range(call.images)]
        else:
            self.kept = list(call.kept.to("cpu", torch.int64))
        self.tokens_in = [total] * call.images
        self.tokens_out = [len(kept) for kept in self.kept]
        self.layer_tokens = [sum(self.tokens_out)] * facts.text_layers
        self.host = facts.host

        text, vision = facts.text, facts.vision
        dense_tower = [total + facts.prefix_tokens] * facts.vision_layers
        dense_llm = [call.prompt_dense] * facts.text_layers
        llm = [call.prompt] * facts.text_layers

        def flops(tower: Any, projected: int, prompt: list[int]) -> int:
            image = 2 * facts.patch_embedding_macs + vision.flops(tower)
            image += 2 * facts.projector_macs * projected
            return call.images * image + call.rows * (text.flops(prompt) + text.head_flops())

        self.flops_dense = flops(dense_tower, total, dense_llm)
        self.flops = flops(call.tower_tokens, call.projected, llm)
        self.kv_bytes_dense = call.rows * text.kv_bytes(dense_llm, call.itemsize)
        self.kv_bytes = call.rows * text.kv_bytes(llm, call.itemsize)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, ready for JSON."""
        return {
            "host": self.host,
            "kept": [kept.tolist() for kept in self.kept],
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "layer_tokens": self.layer_tokens,
            "flops": self.flops,
            "flops_dense": self.flops_dense,
            "kv_bytes": self.kv_bytes,
            "kv_bytes_dense": self.kv_bytes_dense,
        }

    def __str__(self) -> str:
        rows = [
            ("images", str(len(self.kept)), ""),
            _row("visual tokens", sum(self.tokens_in), sum(self.tokens_out), str),
            _row("prefill FLOPs", self.flops_dense, self.flops, _flops),
            _row("KV cache", self.kv_bytes_dense, self.kv_bytes, _bytes),
        ]
        lines = [f"{name:<14} {value:<26} {change}".rstrip() for name, value, change in rows]
        return "\n".join(lines)

    __repr__ = __str__


def _row(name: str, before: int, after: int, show: Any) -> tuple[str, str, str]:
    change = f"-{1 - after / before:.1%}" if before and after != before else ""
    return name, f"{show(before)} -> {show(after)}", change


def _scaled(value: float, step: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if value < step:
            return f"{value:.3g} {unit}"
        value /= step
    return f"{value:.3g} {units[-1]}"


def _flops(value: int) -> str:
    return _scaled(value, 1000, ("FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def _bytes(value: int) -> str:
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
