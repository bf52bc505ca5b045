"""A cut of the token stream inside the LLM, and what it means for the layers behind it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistoken.errors import AttachError
from vistoken.prompt import Shortening

if TYPE_CHECKING:
    from vistoken.adapters.vlm import VisionLanguageHost


@dataclass
class Cut:
    """Which columns of the prompt the layers behind `layer` still have.

    One row stands for all rows of a batch that share a prompt (beams), so B here divides theirs.
    index [B, S]: the columns in the prompt that entered the LLM, whose length was `whole`.
    padding [B, S] bool, or None when rows came out equally long. visual: visual tokens of all
    pictures left. moved [B, S] and removed [B], or None where positions are kept: how far the
    position of each column moves, and that of every later token. blocked [B, S, S] bool, or None:
    pairs (query, key) of the prompt that must not meet.
    """

    layer: int
    index: Tensor
    padding: Tensor | None
    whole: int
    visual: int
    moved: Tensor | None = None
    removed: Tensor | None = None
    blocked: Tensor | None = None
    _ready: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def after(cls, layer: int, change: Shortening, previous: Cut | None, renumbers: bool) -> Cut:
        """Compose a further shortening with the cut before it."""
        index = change.index
        padding = change.padding if change.padded else None
        moved = removed = blocked = None
        whole = change.layout.length
        if renumbers:
            zeros = torch.zeros(change.layout.rows, whole, dtype=torch.long, device=index.device)
            moved = -change.renumber(zeros)
            removed = change.removed.to(index.device)
        if previous is not None:
            whole = previous.whole
            if previous.moved is not None and previous.removed is not None:
                earlier = previous.moved.gather(1, index)
                moved = earlier if moved is None else moved + earlier
                removed = previous.removed if removed is None else removed + previous.removed
            if previous.blocked is not None:
                blocked = _gather_square(previous.blocked[:, None], index)[:, 0]
            index = previous.index.gather(1, index)
        visual = sum(change.short.tokens)
        return cls(layer, index, padding, whole, visual, moved, removed, blocked)

    @property
    def length(self) -> int:
        """Columns that are left."""
        return self.index.shape[1]

    def hide(self, rows: Tensor, text: Tensor, visual: Tensor, pairs: Tensor) -> None:
        """Block pairs [G, T, K] of text columns [G, T] and visual columns [G, K] of rows [G]."""
        if self.blocked is None:
            shape = (*self.index.shape, self.length)
            self.blocked = torch.zeros(shape, dtype=torch.bool, device=self.index.device)
        at = (rows[:, None, None], text[:, :, None], visual[:, None, :])
        self.blocked = self.blocked.index_put(at, pairs | self.blocked[at])

    def for_decoding(self) -> Cut:
        """What decode steps need of it, to be kept with the KV cache."""
        return replace(self, moved=None, blocked=None, _ready={})

    def arguments(
        self, host: VisionLanguageHost, hidden: Tensor, given: dict[str, Any], *, prefill: bool
    ) -> dict[str, Any]:
        """The keyword arguments of a layer behind the cut, from those for the full length.

        hidden [rows, S or steps, C]. Computed for the first layer and kept for the others, which
        the model calls with the same objects.
        """
        source = (given.get("attention_mask"), given.get("position_embeddings"))
        ready = self._ready
        if not ready or any(a is not b for a, b in zip(ready["source"], source, strict=True)):
            view = _Rows(self, len(hidden) // len(self.index))
            positions = given.get("position_ids")
            if prefill:
                ready = view.prefill(host, hidden, source[0], source[1], positions)
            else:
                cache = given["past_key_values"]
                ready = view.step(host, hidden, source[0], source[1], positions, cache)
            ready["source"] = source
            self._ready = ready
        changed = {
            **given,
            "attention_mask": ready["mask"],
            "position_embeddings": ready["rotary"],
        }
        if given.get("position_ids") is not None:
            changed["position_ids"] = ready["positions"]
        return changed


class _Rows:
    """A cut for a batch in which each of its rows stands `times` times."""

    def __init__(self, cut: Cut, times: int) -> None:
        def repeat(part: Tensor | None) -> Any:
            return part if part is None else part.repeat_interleave(times, dim=0)

        self.whole, self.length = cut.whole, cut.length
        self.index: Tensor = repeat(cut.index)
        self.padding: Tensor | None = repeat(cut.padding)
        self.moved: Tensor | None = repeat(cut.moved)
        self.removed: Tensor | None = repeat(cut.removed)
        self.blocked: Tensor | None = repeat(cut.blocked)

    def prefill(
        self, host: VisionLanguageHost, hidden: Tensor, mask: Any, rotary: Any, positions: Any
    ) -> dict[str, Any]:
        """Mask, rotary embeddings and positions of the columns that are left."""
        rows = len(self.index)
        if positions is not None:
            positions = positions.expand(rows, -1).gather(1, self.index)
        if self.moved is not None:
            positions = _known(positions) - self.moved
            rotary = host.rotary(hidden, positions)
        else:
            index = self.index[..., None]
            rotary = tuple(
                part.expand(rows, -1, -1).gather(1, index.expand(-1, -1, part.shape[-1]))
                for part in rotary
            )
        mask = self._prefill_mask(host, hidden, mask)
        return {"mask": mask, "rotary": rotary, "positions": positions}

    def _prefill_mask(self, host: VisionLanguageHost, hidden: Tensor, mask: Any) -> Any:
        _refuse_block_mask(mask)
        if mask is None:
            if self.padding is None and self.blocked is None:
                return None
            mask = host.plain_mask(hidden, self.length)
        elif mask.dim() == 4:
            mask = _gather_square(mask.expand(len(self.index), -1, -1, -1), self.index)
        else:
            mask = mask.expand(len(self.index), -1).gather(1, self.index)
        if self.padding is not None:
            mask = _hide(mask, self.padding if mask.dim() == 2 else self.padding[:, None, None])
        if self.blocked is None:
            return mask
        if mask.dim() != 4:
            raise AttachError(
                "Hiding pairs of tokens needs a mask for every pair, which flash attention does "
                "not take; load the model with attn_implementation='sdpa' or 'eager'."
            )
        return _hide(mask, self.blocked[:, None])

    def step(
        self,
        host: VisionLanguageHost,
        hidden: Tensor,
        mask: Any,
        rotary: Any,
        positions: Any,
        cache: Any,
    ) -> dict[str, Any]:
        """The same for tokens that follow the prompt, whose keys lie behind its columns."""
        if self.removed is not None:
            positions = _known(positions) - self.removed[:, None]
            rotary = host.rotary(hidden, positions)
        _refuse_block_mask(mask)
        since = cache.get_seq_length(0) - self.whole  # layer 0 has the new tokens already
        if mask is None and self.padding is not None:
            mask = host.plain_mask(hidden, self.length + since)
        elif mask is not None:
            new = torch.arange(self.whole, mask.shape[-1], device=self.index.device)
            columns = torch.cat([self.index, new.expand(len(self.index), -1)], dim=1)
            if mask.dim() == 4:
                mask = mask.expand(len(self.index), -1, -1, -1)
                columns = columns[:, None, None].expand(*mask.shape[:3], -1)
            mask = mask.expand(*columns.shape[:-1], -1).gather(-1, columns)
        if mask is not None and self.padding is not None:
            more = mask.shape[-1] - self.length
            padding = torch.cat([self.padding, self.padding.new_zeros(len(self.index), more)], 1)
            mask = _hide(mask, padding if mask.dim() == 2 else padding[:, None, None])
        return {"mask": mask, "rotary": rotary, "positions": positions}


def _known(positions: Tensor | None) -> Tensor:
    if positions is None:
        raise AttachError(
            "This LLM gives its layers no position_ids, so they cannot be renumbered inside it; "
            "use positions='original'."
        )
    return positions


def _gather_square(values: Tensor, index: Tensor) -> Tensor:
    """Rows and columns `index` [B, S] of [B, M, L, L]."""
    wide = index[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[-1])
    values = values.gather(2, wide)
    return values.gather(3, index[:, None, None].expand(*values.shape[:3], -1))


def _hide(mask: Tensor, hidden: Tensor) -> Tensor:
    """Switch off entries of a mask: of a bool or 0/1 mask, or of one that is added to logits."""
    if mask.dtype.is_floating_point:
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    return mask.masked_fill(hidden, 0)


def _refuse_block_mask(mask: Any) -> None:
    if mask is not None and not isinstance(mask, Tensor):
        raise AttachError(
            f"Pruning inside the LLM cannot shorten a {type(mask).__name__}; load the model with "
            "attn_implementation='sdpa', 'eager' or 'flash_attention_2'."
        )
