"""What a call did: tokens, FLOPs and KV bytes, dense and as it ran."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vistoken.contract import ModelFacts
from vistoken.pictures import Picture


@dataclass(frozen=True)
class Kept:
    """Which tokens of some pictures stayed: `origin` [G, K], indices among their own tokens.

    separators: whether their newline tokens stayed as well.
    """

    members: tuple[int, ...]
    origin: Tensor
    separators: bool


@dataclass(frozen=True)
class CallRecord:
    """What the host noted of one prefill; tensors stay on their device until they are read.

    pictures, in the order in which the model encodes them; rows of the batch; prompt_dense: its
    padded length; prompt and layer_tokens: the padded length, and the visual tokens of all
    pictures, that entered each LLM layer; entering: visual tokens of each picture that entered
    the LLM; kept: what was left at the end, or None when every token was; tower_flops and
    tower_flops_dense: of vision tower and projector; itemsize: bytes of one number in the KV
    cache; notes: what a reader must know.
    """

    pictures: tuple[Picture, ...]
    rows: int
    prompt_dense: int
    prompt: tuple[int, ...]
    layer_tokens: tuple[int, ...]
    entering: tuple[int, ...]
    kept: tuple[Kept, ...] | None
    tower_flops: int
    tower_flops_dense: int
    itemsize: int
    notes: tuple[str, ...] = ()

    def after_cuts(self, cuts: dict[int, tuple[int, int]], kept: tuple[Kept, ...]) -> CallRecord:
        """The same after cuts inside the LLM: layer -> (prompt length, visual tokens) behind it."""
        prompt, tokens = list(self.prompt), list(self.layer_tokens)
        for layer, (length, visual) in sorted(cuts.items()):
            behind = len(prompt) - layer - 1
            prompt[layer + 1 :] = [length] * behind
            tokens[layer + 1 :] = [visual] * behind
        return replace(self, prompt=tuple(prompt), layer_tokens=tuple(tokens), kept=kept)


class Ledger:
    """Holds the record of the last call of one attachment."""

    def __init__(self) -> None:
        self.last: CallRecord | None = None

    def write(self, record: CallRecord) -> None:
        """Replace the last record, in one step, so that threads never see half of one."""
        self.last = record


class Report:
    """Tokens, FLOPs and KV bytes of the prefill of the last call.

    kept: list of int64 CPU tensors, one per picture: ascending indices into its visual tokens
    that were left behind the last stage. tokens_in, tokens_out: per picture, visual tokens before
    pruning / entering the LLM, newline tokens included. layer_tokens: visual tokens of all
    pictures that enter each LLM layer; mean_tokens: their mean over layers and pictures. flops,
    flops_dense: of vision tower, projector, LLM and output head (last position), all rows.
    kv_bytes, kv_bytes_dense: of the KV cache after the prefill, all rows, without beams. notes:
    where a signal had to be replaced by another.
    """

    def __init__(self, call: CallRecord, facts: ModelFacts) -> None:
        self.host = facts.host
        self.notes = list(call.notes)
        self.kept = _kept(call)
        self.tokens_in = [picture.total for picture in call.pictures]
        self.tokens_out = list(call.entering)
        self.layer_tokens = list(call.layer_tokens)
        pictures = max(1, len(call.pictures))
        self.mean_tokens = sum(self.layer_tokens) / len(self.layer_tokens) / pictures

        text = facts.text
        dense = [call.prompt_dense] * facts.text_layers
        head = text.head_flops()
        self.flops_dense = call.tower_flops_dense + call.rows * (text.flops(dense) + head)
        self.flops = call.tower_flops + call.rows * (text.flops(call.prompt) + head)
        self.kv_bytes_dense = call.rows * text.kv_bytes(dense, call.itemsize)
        self.kv_bytes = call.rows * text.kv_bytes(call.prompt, call.itemsize)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, ready for JSON."""
        return {
            "host": self.host,
            "kept": [kept.tolist() for kept in self.kept],
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "layer_tokens": self.layer_tokens,
            "mean_tokens": self.mean_tokens,
            "flops": self.flops,
            "flops_dense": self.flops_dense,
            "kv_bytes": self.kv_bytes,
            "kv_bytes_dense": self.kv_bytes_dense,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        rows = [
            ("images", str(len(self.kept)), ""),
            _row("visual tokens", sum(self.tokens_in), sum(self.tokens_out), str),
        ]
        if self.layer_tokens[-1] != self.layer_tokens[0]:
            rows.append(_row("in the LLM", self.layer_tokens[0], self.layer_tokens[-1], str))
            rows.append(("mean of layers", f"{self.mean_tokens:.1f} a picture", ""))
        rows.append(_row("prefill FLOPs", self.flops_dense, self.flops, _flops))
        rows.append(_row("KV cache", self.kv_bytes_dense, self.kv_bytes, _bytes))
        lines = [f"{name:<14} {value:<26} {change}".rstrip() for name, value, change in rows]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__


def _kept(call: CallRecord) -> list[Tensor]:
    """For each picture the indices into its run of tokens that were left, on the CPU."""
    kept = [torch.arange(picture.total) for picture in call.pictures]
    for some in call.kept or ():
        origins = some.origin.to("cpu", torch.int64)
        for member, origin in zip(some.members, origins, strict=True):
            picture = call.pictures[member]
            found = picture.run_index()[origin]
            if some.separators and picture.separators:
                found = torch.cat([found, torch.tensor(picture.separators)]).sort().values
            kept[member] = found
    return kept


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
