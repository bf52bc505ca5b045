"""Which tokens see which: patterns that attention over grids and along block lists can run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vistoken.errors import MethodError
from vistoken.kernels.band_pattern import BandPattern, radial_half_widths
from vistoken.kernels.block_mask import BlockMask
from vistoken.kernels.block_sparse import block_sparse_attention, check_sequences
from vistoken.kernels.grid_attention import attend_sequence, grid_attention
from vistoken.kernels.region_pattern import RegionPattern
from vistoken.kernels.row_lists import AxisTable, Reach, Rows, row_block_mask, spread
from vistoken.kernels.windows import Neighborhood, Window, disc_window, neighborhood

__all__ = [
    "BandPattern",
    "DiscPattern",
    "Pattern",
    "RegionPattern",
    "SlidingTilePattern",
    "WindowPattern",
    "pattern_attention",
    "radial_half_widths",
]

Block = int | tuple[int, int]


@dataclass(frozen=True)
class _GridPattern:
    """Tokens of a grid, row-major, between global ones that see and are seen by everything."""

    grid: tuple[int, ...]
    prefix: int
    suffix: int

    @property
    def rows(self) -> Rows:
        return Rows(math.prod(self.grid[:-1]), self.grid[-1], self.prefix, self.suffix)

    @property
    def tokens(self) -> int:
        return self.rows.tokens


@dataclass(frozen=True, init=False)
class WindowPattern(_GridPattern):
    """Each token of a grid sees a window of it, as `vistoken.kernels.na1d` to `na3d` define it.

    grid of one to three axes; kernel_size, stride, dilation, is_causal: one entry, or one per axis.
    The tokens are `prefix` global ones, the grid row by row, `suffix` global ones.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    def __init__(
        self,
        grid: Sequence[int],
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        prefix: int = 0,
        suffix: int = 0,
    ) -> None:
        where = neighborhood(grid, kernel_size, stride, dilation, is_causal)
        for name, value in vars(where).items():
            object.__setattr__(self, name, value)
        _set_globals(self, prefix, suffix)

    @property
    def where(self) -> Neighborhood:
        """What `grid_attention` takes."""
        return Neighborhood(self.grid, self.kernel_size, self.stride, self.dilation, self.is_causal)

    def visible(self) -> Tensor:
        """Return bool [tokens, tokens]: for small grids."""
        number = torch.arange(math.prod(self.grid)).view(self.grid)
        inner = torch.zeros(number.numel(), number.numel(), dtype=torch.bool)
        for cut, window in self.where.groups():
            group = number[cut].flatten()
            inner[group[:, None], group] = window.visible()
        return self.rows.visible(inner)

    @property
    def density(self) -> float:
        """Share of all pairs of tokens that are visible."""
        return self.rows.density(math.prod(int((t.hi - t.lo).sum()) for t in self._tables()))

    def block_mask(self, block: Block = 128, device: torch.device | str | None = None) -> BlockMask:
        """Return the lists over the tokens as they lie; `block` as in `BlockMask.from_map`."""
        tables = [table.to(device) for table in self._tables()]

        def reach(row: Tensor, first: Tensor, last: Tensor) -> Reach:
            piece = torch.arange(len(row), device=row.device)
            key_row = torch.zeros_like(row)
            shape = math.prod(self.grid[:-1])
            for table in tables[:-1]:  # one entry for each key coordinate along the outer axes
                shape //= table.length
                x = row[piece] // shape % table.length
                which, place = spread((table.hi - table.lo)[x])
                y = table.key(x[which], place)
                piece, key_row = piece[which], key_row[which] * table.length + y
            return tables[-1].reach(piece, key_row, first[piece], last[piece])

        def sees(q: Tensor, kv: Tensor) -> Tensor:
            seen = torch.ones((), dtype=torch.bool, device=q.device)
            for table in reversed(tables):
                seen = seen & table.sees(q % table.length, kv % table.length)
                q, kv = q // table.length, kv // table.length
            return seen

        where = torch.device(device or "cpu")
        return row_block_mask(self.rows, block, reach, sees, where)

    def _tables(self) -> list[AxisTable]:
        options = zip(
            self.grid, self.kernel_size, self.stride, self.dilation, self.is_causal, strict=True
        )
        return [AxisTable.of(*axis) for axis in options]


@dataclass(frozen=True, init=False)
class DiscPattern(_GridPattern):
    """Each token of a grid (height, width) sees those at a distance below `radius` (CLEAR).

    Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", 2024.
    The tokens are `prefix` global ones, the grid row by row, `suffix` global ones.
    """

    radius: int

    def __init__(self, grid: Sequence[int], radius: int, prefix: int = 0, suffix: int = 0) -> None:
        disc_window(grid, radius)
        object.__setattr__(self, "grid", tuple(map(int, grid)))
        object.__setattr__(self, "radius", radius)
        _set_globals(self, prefix, suffix)

    @property
    def where(self) -> Window:
        """What `grid_attention` takes."""
        return disc_window(self.grid, self.radius)

    def visible(self) -> Tensor:
        """Return bool [tokens, tokens]: for small grids."""
        return self.rows.visible(self.where.visible())

    @property
    def density(self) -> float:
        """Share of all pairs of tokens that are visible."""
        height, width = self.grid
        pairs = 0
        for apart in range(min(self.radius, height)):
            half = min(self._half(apart), width - 1)
            in_rows = width * (2 * half + 1) - half * (half + 1)
            pairs += in_rows * (height - apart) * (2 if apart else 1)
        return self.rows.density(pairs)

    def block_mask(self, block: Block = 128, device: torch.device | str | None = None) -> BlockMask:
        """Return the lists over the tokens as they lie; `block` as in `BlockMask.from_map`."""
        height, width = self.grid
        where = torch.device(device or "cpu")
        halves = torch.tensor([self._half(i) for i in range(self.radius)], device=where)

        def reach(row: Tensor, first: Tensor, last: Tensor) -> Reach:
            top = (row - self.radius + 1).clamp(min=0)
            piece, place = spread((row + self.radius).clamp(max=height) - top)
            key_row = top[piece] + place
            half = halves[(key_row - row[piece]).abs()]
            first, last = first[piece], last[piece]
            return Reach(
                piece, key_row, first - half, last + half + 1, last - half, first + half + 1
            )

        def sees(q: Tensor, kv: Tensor) -> Tensor:
            down, across = q // width - kv // width, q % width - kv % width
            return down.square() + across.square() < self.radius**2

        return row_block_mask(self.rows, block, reach, sees, where)

    def _half(self, apart: int) -> int:
        """How far the disc reaches to each side in the row `apart` rows away."""
        return math.isqrt(self.radius**2 - apart**2 - 1)


@dataclass(frozen=True, init=False)
class SlidingTilePattern(_GridPattern):
    """Each token of a grid cut into tiles sees the tiles around its own (sliding tile attention).

    Zhang et al., "Fast Video Generation with Sliding Tile Attention", 2025. tile: tokens of a tile
    along each axis, which divide the grid; kernel: tiles of a window along each axis, an odd number
    or all of them; windows are shifted at the borders, never cut. Tokens stay in raster order.
    """

    tile: tuple[int, ...]
    kernel: tuple[int, ...]

    def __init__(
        self,
        grid: Sequence[int],
        tile: Sequence[int],
        kernel: Sequence[int],
        prefix: int = 0,
        suffix: int = 0,
    ) -> None:
        if not len(grid) == len(tile) == len(kernel):
            raise MethodError(
                f"tile and kernel have one entry per axis of the grid {tuple(grid)}, got "
                f"{tuple(tile)} and {tuple(kernel)}."
            )
        for axis, (length, size, count) in enumerate(zip(grid, tile, kernel, strict=True)):
            if size < 1 or length % size:
                raise MethodError(
                    f"tile must divide the grid, got {size} for {length} tokens on axis {axis}: "
                    "WindowPattern takes any grid."
                )
            tiles = length // size
            if not 1 <= count <= tiles or (count % 2 == 0 and count != tiles):
                raise MethodError(
                    f"kernel must be an odd number of tiles or all {tiles}, got {count} on axis "
                    f"{axis}."
                )
        for name, value in (("grid", grid), ("tile", tile), ("kernel", kernel)):
            object.__setattr__(self, name, tuple(map(int, value)))
        _set_globals(self, prefix, suffix)

    @property
    def window(self) -> WindowPattern:
        """The same pattern as windows with a stride of one tile."""
        sizes = [size * count for size, count in zip(self.tile, self.kernel, strict=True)]
        return WindowPattern(self.grid, sizes, self.tile, prefix=self.prefix, suffix=self.suffix)

    @property
    def where(self) -> Neighborhood:
        """What `grid_attention` takes."""
        return self.window.where

    def visible(self) -> Tensor:
        """Return bool [tokens, tokens]: for small grids."""
        return self.window.visible()

    @property
    def density(self) -> float:
        """Share of all pairs of tokens that are visible."""
        return self.window.density

    def block_mask(self, block: Block = 128, device: torch.device | str | None = None) -> BlockMask:
        """Return the lists over the tokens as they lie; `block` as in `BlockMask.from_map`."""
        return self.window.block_mask(block, device)


def _set_globals(pattern: _GridPattern, prefix: int, suffix: int) -> None:
    for name, count in (("prefix", prefix), ("suffix", suffix)):
        if not isinstance(count, int) or count < 0:
            raise MethodError(f"{name} is a number of tokens, 0 or more, got {count!r}.")
        object.__setattr__(pattern, name, count)


Pattern = WindowPattern | DiscPattern | SlidingTilePattern | BandPattern | RegionPattern


# --- attention -----------------------------------------------------------------------------------


def pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention [B, S, Hq, Dv] in which tokens see each other as a pattern says.

    q [B, S, Hq, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv] with S = pattern.tokens; query head h reads
    the kv head h // (Hq // Hkv). scale multiplies the logits, D ** -0.5 by default. With
    return_lse, also the natural logarithm of the sum of exp(scale * q k) [B, S, Hq].

    Patterns of a grid run on `grid_attention`, as views of the tokens as they lie; bands and
    regions on `block_sparse_attention`, regions after their tokens were brought together. Block
    lists of a band are made once for a pattern and a device. Backends, gradients and errors are
    those of these functions; under `torch.compile`, bands need a call outside of it first.
    """
    check_sequences(q, k, v)
    if (q.shape[1], k.shape[1]) != (pattern.tokens, pattern.tokens):
        raise MethodError(
            f"The pattern is of {pattern.tokens} tokens, got {q.shape[1]} queries and "
            f"{k.shape[1]} keys."
        )
    if isinstance(pattern, BandPattern):
        mask = pattern.kept_block_mask(q.device)
        out, lse = block_sparse_attention(
            q, k, v, mask, scale=scale, return_lse=True, backend=backend
        )
    elif isinstance(pattern, RegionPattern):
        out, lse = _attend_regions(q, k, v, pattern, scale, backend)
    else:
        out, lse = _attend_grid(q, k, v, pattern, scale, backend)
    return (out, lse) if return_lse else out


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _attend_regions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: RegionPattern,
    scale: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    slots, places, _ = pattern.arrange()
    q, k, v = (x.index_select(1, slots) for x in (q, k, v))
    out, lse = block_sparse_attention(
        q, k, v, pattern.block_mask(), scale=scale, return_lse=True, backend=backend
    )
    return out.index_select(1, places), lse.index_select(1, places)


def _attend_grid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: WindowPattern | DiscPattern | SlidingTilePattern,
    scale: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    start, stop = pattern.prefix, pattern.tokens - pattern.suffix

    def inner(x: Tensor) -> Tensor:
        return x[:, start:stop].unflatten(1, pattern.grid)

    def outer(x: Tensor) -> Tensor:
        if start and pattern.suffix:
            return torch.cat([x[:, :start], x[:, stop:]], 1)
        return x[:, :start] if start else x[:, stop:]

    texts = start + pattern.suffix > 0
    extra_q, extra_k, extra_v = (outer(x) if texts else None for x in (q, k, v))
    if texts and not (start and pattern.suffix) and not _needs_gradient(q, k, v):
        joined = attend_sequence(
            q, k, v, pattern.where, scale, (start, stop), (extra_q, extra_k, extra_v), backend
        )
        if joined is not None:
            return joined
    out, lse, global_out, global_lse = grid_attention(
        inner(q), inner(k), inner(v), pattern.where, scale=scale,
        extra_k=extra_k, extra_v=extra_v, global_q=extra_q, backend=backend,
    )  # fmt: skip
    axes = len(pattern.grid)
    whole, sums = out.flatten(1, axes), lse.flatten(1, axes)
    if global_out is None or global_lse is None:
        return whole, sums
    return (
        torch.cat([global_out[:, :start], whole, global_out[:, start:]], 1),
        torch.cat([global_lse[:, :start], sums, global_lse[:, start:]], 1),
    )
