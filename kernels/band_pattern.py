"""Bands of a video: how far each frame sees into each other frame, in tokens of the raster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from vistoken.errors import MethodError
from vistoken.kernels.block_mask import BlockMask, check_blocks
from vistoken.kernels.row_lists import Reach, Rows, row_block_mask, spread

HIDDEN = -1  # the half-width of a frame that is not seen at all


@dataclass(frozen=True, init=False)
class BandPattern:
    """Token k of frame i sees the tokens l of frame j with |k - l| <= half_widths[i][j].

    frames, tokens_per_frame: of the video, one frame after the other; half_widths [frames][frames]
    in tokens, query frame first: -1 hides a frame, tokens_per_frame - 1 or more shows all of it.
    The tokens are `prefix` global ones, the video, `suffix` global ones; global tokens see and are
    seen by everything.

    rounding: None for the bands as they are. Else the video is cut into blocks of so many tokens,
    and two blocks see each other wholly or not at all: for some pair of frames, more than 3/5 of
    the key columns with a visible query have more than 1/3 of the queries visible; a block always
    sees itself. Part of a block that lies behind the video's end does not count.
    """

    frames: int
    tokens_per_frame: int
    half_widths: tuple[tuple[int, ...], ...]
    prefix: int
    suffix: int
    rounding: int | None
    _masks: dict[torch.device, BlockMask] = field(compare=False, repr=False)

    def __init__(
        self,
        frames: int,
        tokens_per_frame: int,
        half_widths: Sequence[Sequence[int]],
        prefix: int = 0,
        suffix: int = 0,
        rounding: int | None = None,
    ) -> None:
        least = (("frames", frames, 1), ("tokens_per_frame", tokens_per_frame, 1))
        for name, value, low in (*least, ("prefix", prefix, 0), ("suffix", suffix, 0)):
            if not isinstance(value, int) or value < low:
                raise MethodError(f"{name} is an integer of at least {low}, got {value!r}.")
            object.__setattr__(self, name, value)
        widths = tuple(tuple(map(int, line)) for line in half_widths)
        if [len(line) for line in widths] != [frames] * frames or min(map(min, widths)) < HIDDEN:
            raise MethodError(
                f"half_widths has one number of at least {HIDDEN} for each of {frames} x {frames} "
                f"pairs of frames, got {len(widths)} lines."
            )
        if rounding is not None:
            check_blocks(self.tokens, self.tokens, rounding, rounding)
        object.__setattr__(self, "half_widths", widths)
        object.__setattr__(self, "rounding", rounding)
        object.__setattr__(self, "_masks", {})

    @property
    def rows(self) -> Rows:
        return Rows(self.frames, self.tokens_per_frame, self.prefix, self.suffix)

    @property
    def tokens(self) -> int:
        return self.rows.tokens

    def visible(self) -> Tensor:
        """Return bool [tokens, tokens]: for short videos."""
        if self.rounding is not None:
            blocks = torch.arange(self.rows.inner) // self.rounding
            return self.rows.visible(self.block_map()[blocks[:, None], blocks])
        place = torch.arange(self.tokens_per_frame)
        apart = (place[:, None] - place).abs()
        widths = torch.tensor(self.half_widths)
        seen = apart[None, :, None] <= widths[:, None, :, None]
        return self.rows.visible(seen.reshape(self.rows.inner, -1))

    @property
    def density(self) -> float:
        """Share of all pairs of tokens that are visible."""
        if self.rounding is not None:
            start = torch.arange(0, self.rows.inner, self.rounding)
            sizes = (self.rows.inner - start).clamp(max=self.rounding).double()
            return self.rows.density(int(sizes @ self.block_map().double() @ sizes))
        s = self.tokens_per_frame
        half = [min(width, s - 1) for line in self.half_widths for width in line if width >= 0]
        return self.rows.density(sum(s * (2 * w + 1) - w * (w + 1) for w in half))

    def block_map(self) -> Tensor:
        """Return which blocks of the video see each other, bool [nb, nb]; needs `rounding`."""
        if self.rounding is None:
            raise MethodError("Bands without rounding are no map of blocks: use block_mask().")
        return self._block_map.clone()

    @cached_property
    def _block_map(self) -> Tensor:
        size, s = int(self.rounding or 0), self.tokens_per_frame
        blocks = -(-self.rows.inner // size)
        whole = torch.eye(blocks, dtype=torch.bool)
        parts: dict[tuple[int, int, int, int], Tensor] = {}
        for i, line in enumerate(self.half_widths):
            top, shift_q = divmod(i * s, size)
            left = min(self.rows.inner - i * s, s + size)
            for j, width in enumerate(line):
                side, shift_kv = divmod(j * s, size)
                if width == HIDDEN:
                    continue
                key = (min(width, s), shift_q, shift_kv, left)
                if key not in parts:
                    parts[key] = self._round(*key)
                part = parts[key]
                whole[top : top + part.shape[0], side : side + part.shape[1]] |= part
        return whole

    def _round(self, width: int, shift_q: int, shift_kv: int, left: int) -> Tensor:
        """Which blocks are on for a pair of frames that begin so far into their first blocks.

        left: tokens from the query frame to the end of the video.
        """
        size, s = int(self.rounding or 0), self.tokens_per_frame
        start = torch.arange(-shift_q, s, size)
        first, stop = start.clamp(min=0)[:, None], (start + size).clamp(max=s)[:, None]
        rows = (left - start).clamp(max=size)[:, None]
        blocks = -(-(shift_kv + s) // size)
        column = torch.arange(blocks * size) - shift_kv
        seen = torch.minimum(stop, column + width + 1) - torch.maximum(first, column - width)
        seen = seen.clamp(min=0) * ((column >= 0) & (column < s))
        dense = (3 * seen > rows).view(len(start), blocks, size).sum(-1)
        some = (seen > 0).view(len(start), blocks, size).sum(-1)
        return 5 * dense > 3 * some

    def block_mask(
        self, block: int | tuple[int, int] | None = None, device: torch.device | str | None = None
    ) -> BlockMask:
        """Return the block lists over the tokens as they lie.

        block: as in `BlockMask.from_map`, by default the rounding or 128. With a rounding of the
        same size and a prefix of whole blocks, no block but those at the video's ends is in part.
        """
        where = torch.device(device or "cpu")
        size = block or self.rounding or 128
        if self.rounding is None:
            return self._band_mask(size, where)
        step = self.rounding
        on = self.block_map().to(where)
        # blocks as rows of tokens: each block of the video sees whole blocks of it
        seen_by, key = on.nonzero().unbind(-1)
        count = on.sum(-1)
        begin = count.cumsum(0) - count

        def reach(row: Tensor, first: Tensor, last: Tensor) -> Reach:
            number = first // step
            piece, place = spread(last // step - number + 1)
            block_q = number[piece] + place
            which, place = spread(count[block_q])
            found = key[begin[block_q[which]] + place]
            piece = piece[which]
            alone = first[piece] // step == last[piece] // step
            lo, hi = found * step, (found + 1) * step
            return Reach(piece, row[piece], lo, hi, lo, torch.where(alone, hi, lo))

        def sees(q: Tensor, kv: Tensor) -> Tensor:
            return on[q // step, kv // step]

        rows = Rows(1, self.rows.inner, self.prefix, self.suffix)
        return row_block_mask(rows, size, reach, sees, where)

    def kept_block_mask(self, device: torch.device) -> BlockMask:
        """Return `block_mask(device=device)`, made once for each device."""
        if device not in self._masks:
            self._masks[device] = self.block_mask(device=device)
        return self._masks[device]

    def _band_mask(self, block: int | tuple[int, int], device: torch.device) -> BlockMask:
        widths = torch.tensor(self.half_widths, device=device)
        s = self.tokens_per_frame

        def reach(row: Tensor, first: Tensor, last: Tensor) -> Reach:
            piece, frame = (widths[row] >= 0).nonzero().unbind(-1)
            width = widths[row[piece], frame].clamp(max=s)
            first, last = first[piece], last[piece]
            return Reach(
                piece, frame, first - width, last + width + 1, last - width, first + width + 1
            )

        def sees(q: Tensor, kv: Tensor) -> Tensor:
            return (q % s - kv % s).abs() <= widths[q // s, kv // s]

        return row_block_mask(self.rows, block, reach, sees, device)


def radial_half_widths(
    frames: int,
    tokens_per_frame: int,
    *,
    rule: str = "code",
    block: int = 128,
    decay: float = 1.0,
    sink: bool = True,
) -> tuple[tuple[int, ...], ...]:
    """Return the half-widths of Radial Attention, for a `BandPattern`.

    Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video
    Generation", 2025. At a distance of D frames, with s tokens per frame:

    rule `paper`: with m = floor(log2(max(D, 1))), |k - l| + 1 <= s / 2^m; where 2^m > s the same
    token only, and of every ceil(2^m / s) distances one. Takes no `block` and `decay`.
    rule `code`, what the released results were made with: all of the frame for D <= 1, else
    max(block, decay * S / 2^g), where S = 2^bits(s), g = bits(D) and bits(x) is the length of x in
    binary; frames with S / 2^g below 128 are seen at every floor(128 * 2^g / S)-th distance only.
    sink: every query sees all of frame 0.
    """
    if rule not in ("code", "paper"):
        raise MethodError(f"rule is 'code' or 'paper', got {rule!r}.")
    if rule == "paper" and decay != 1:
        raise MethodError(f"decay goes with rule 'code'; rule 'paper' has none, got {decay}.")
    if frames < 1 or tokens_per_frame < 1 or decay < 0:
        raise MethodError(
            f"frames and tokens_per_frame are at least 1 and decay at least 0, got {frames}, "
            f"{tokens_per_frame} and {decay}."
        )
    s = tokens_per_frame
    at = [
        _paper_half_width(d, s) if rule == "paper" else _code_half_width(d, s, block, decay)
        for d in range(frames)
    ]
    return tuple(
        tuple(s if sink and j == 0 else at[abs(i - j)] for j in range(frames))
        for i in range(frames)
    )


def _paper_half_width(distance: int, s: int) -> int:
    power = 1 << (max(distance, 1).bit_length() - 1)
    if power <= s:
        return s // power - 1
    return 0 if distance % -(-power // s) == 0 else HIDDEN


def _code_half_width(distance: int, s: int, block: int, decay: float) -> int:
    reach = (1 << s.bit_length()) / (1 << distance.bit_length())
    if reach < 128 and distance % int(128 / reach):
        return HIDDEN
    return s if distance <= 1 else max(block, int(decay * reach))
