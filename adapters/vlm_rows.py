"""Rows of an LLM layer's attention for the text tokens of a prompt, read from what entered it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vistoken.contract import Signal
from vistoken.kernels import attention_row
from vistoken.language import LanguageRows
from vistoken.prompt import Layout

if TYPE_CHECKING:
    from vistoken.adapters.vlm import VisionLanguageHost

CHUNK = 1 << 26  # probabilities held at once: 256 MiB


@dataclass(frozen=True)
class LayerInputs:
    """What entered a decoder layer's self-attention.

    hidden [B, S, C]; cos and sin [B or 1, S, D]; mask [B, S], 0 where the prompt is padded.
    """

    hidden: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor


class Columns:
    """Where some pictures and their rows' text lie in a prompt, on the device.

    rows [G]: the row of each picture; firsts [G]: the column of its first token; text [G, T]: the
    columns of its row's text, padded on the left where text_mask [G, T] is False; last [G]: the
    row's last column.
    """

    def __init__(self, layout: Layout, members: tuple[int, ...], device: torch.device) -> None:
        rows = [layout.image_rows[member] for member in members]
        columns = layout.text_columns()
        longest = max(len(columns[row]) for row in rows)
        table = []
        for member, row in zip(members, rows, strict=True):
            pad = [-1] * (longest - len(columns[row]))
            table.append(
                [row, layout.image_starts[member], layout.ends[row] - 1, *pad, *columns[row]]
            )
        found = torch.tensor(table, dtype=torch.long, device="cpu")
        if device.type == "cuda":
            found = found.pin_memory()
        found = found.to(device, non_blocking=True)
        self.rows, self.firsts, self.last = found[:, 0], found[:, 1], found[:, 2]
        self.text_mask = found[:, 3:] >= 0
        self.text = found[:, 3:].clamp(min=0)


class HostRows(LanguageRows):
    """`LanguageRows` of one group of pictures at one LLM layer.

    visual [G, N]: the columns of their tokens.
    """

    def __init__(
        self,
        host: VisionLanguageHost,
        layer: int,
        inputs: LayerInputs,
        columns: Columns,
        visual: Tensor,
    ) -> None:
        self._host, self._layer, self._inputs = host, layer, inputs
        self._columns, self._visual = columns, visual
        self.text_mask = columns.text_mask

    @cached_property
    def text_attention(self) -> Tensor:
        found = self._probabilities(self._columns.text, self._visual)
        return found * self.text_mask[:, None, :, None]

    @cached_property
    def text_to_text(self) -> Tensor:
        found = self._probabilities(self._columns.text, self._columns.text)
        valid = self.text_mask
        return found * (valid[:, None, :, None] & valid[:, None, None])

    @cached_property
    def last_attention(self) -> Tensor:
        return self._probabilities(self._columns.last[:, None], self._visual)[:, :, 0]

    @cached_property
    def last_query(self) -> Tensor:
        return self._queries(self._columns.last[:, None])[:, :, 0]

    @cached_property
    def last_value(self) -> Tensor:
        return self._repeated(self._heads(Signal.VISION_VALUES, self._columns.last[:, None]))[
            :, :, 0
        ]

    @cached_property
    def keys(self) -> Tensor:
        picked = self._heads(Signal.VISION_KEYS, self._visual)
        return self._repeated(self._rotated(picked, self._visual)).float()

    @cached_property
    def values(self) -> Tensor:
        return self._repeated(self._heads(Signal.VISION_VALUES, self._visual))

    @cached_property
    def gravity(self) -> Tensor:
        def ones(columns: Tensor) -> Tensor:
            cos, sin = self._angles(columns)
            half = cos.shape[-1] // 2
            return cos + torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)

        text, visual = ones(self._columns.text), ones(self._visual)
        width = self._host.facts.text.head_dim
        rest = width - text.shape[-1]  # dimensions that do not rotate multiply one by one
        return (text @ visual.transpose(-1, -2) + rest) * width**-0.5

    def _angles(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [G, K, D] in fp32 at columns [G, K]."""
        rows = self._columns.rows[:, None]
        cos, sin = (
            part.expand(len(self._inputs.hidden), *part.shape[1:])[rows, columns].float()
            for part in (self._inputs.cos, self._inputs.sin)
        )
        return cos, sin

    def _heads(self, signal: Signal, columns: Tensor) -> Tensor:
        """Queries, keys or values [G, heads, K, D] at columns [G, K], in fp32, not rotated."""
        hidden = self._inputs.hidden[self._columns.rows[:, None], columns]
        return self._host.language_heads(self._layer, hidden, signal).float()

    def _rotated(self, heads: Tensor, columns: Tensor) -> Tensor:
        return rotate(heads, *self._angles(columns))

    def _queries(self, columns: Tensor) -> Tensor:
        return self._rotated(self._heads(Signal.VISION_QUERIES, columns), columns)

    def _repeated(self, heads: Tensor) -> Tensor:
        groups = self._host.facts.text.heads // heads.shape[1]
        return heads.repeat_interleave(groups, dim=1)

    @cached_property
    def _every_key(self) -> Tensor:
        """Keys [B, heads, S, D] of the whole prompt."""
        inputs = self._inputs
        heads = self._host.language_heads(self._layer, inputs.hidden, Signal.VISION_KEYS).float()
        return rotate(heads, inputs.cos.float(), inputs.sin.float())

    @torch.no_grad()
    def _probabilities(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Softmax over all keys of queries at [G, Q], at columns `keys` [G, K]: [G, H, Q, K]."""
        query = self._queries(queries)
        length = self._inputs.hidden.shape[1]
        step = max(1, CHUNK // (query.shape[1] * query.shape[2] * length))
        order = torch.arange(length, device=queries.device)
        found = []
        for part in torch.arange(len(query), device="cpu").split(step):
            some = slice(int(part[0]), int(part[-1]) + 1)
            rows = self._columns.rows[some]
            allowed = order <= queries[some, :, None]
            allowed = allowed & (self._inputs.mask[rows][:, None] != 0)
            scale = self._host.language_scale(self._layer)
            row = attention_row(query[some], self._every_key[rows], scale, allowed[:, None])
            wanted = keys[some][:, None, None].expand(*row.shape[:3], -1)
            found.append(row.gather(-1, wanted))
        return torch.cat(found)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [G, heads, S, D]; cos and sin [G, S, R] turn the first R dimensions."""
    width = cos.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
