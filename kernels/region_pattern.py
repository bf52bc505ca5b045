"""Bi-level routing: the tokens of each region of a grid see those of the regions it chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vistoken.errors import MethodError
from vistoken.kernels.block_mask import BlockMask, check_blocks


class Arrangement(NamedTuple):
    """Tokens region by region, each filled up to whole blocks.

    slots [M] int64: the token in each place, 0 where there is none; places [tokens] int64: where
    each token went; lengths [nb] int32: how many places of each block hold a token.
    """

    slots: Tensor
    places: Tensor
    lengths: Tensor


@dataclass(frozen=True, eq=False, init=False)
class RegionPattern:
    """Each region of a grid sees the regions that it is routed to (bi-level routing attention).

    Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", 2023. grid (height,
    width) is cut into regions (rows, columns) of ceil(height / rows) x ceil(width / columns)
    tokens, the last ones shorter or empty; nothing is padded. routes [B or 1, Hq or 1, R, k] int64,
    all different in a row: the regions that each region sees, numbered row by row.
    The tokens are `prefix` global ones, the grid row by row, `suffix` global ones; global tokens
    see and are seen by everything.
    """

    grid: tuple[int, int]
    regions: tuple[int, int]
    routes: Tensor
    prefix: int
    suffix: int

    def __init__(
        self,
        grid: Sequence[int],
        regions: Sequence[int],
        routes: Tensor,
        prefix: int = 0,
        suffix: int = 0,
    ) -> None:
        if len(grid) != 2 or len(regions) != 2 or min(*grid, *regions) < 1:
            raise MethodError(
                "grid and regions are (height, width) and (rows, columns) of at least 1, got "
                f"{tuple(grid)} and {tuple(regions)}."
            )
        for name, count in (("prefix", prefix), ("suffix", suffix)):
            if not isinstance(count, int) or count < 0:
                raise MethodError(f"{name} is a number of tokens, 0 or more, got {count!r}.")
        count = regions[0] * regions[1]
        if routes.dim() != 4 or routes.shape[2] != count or not 1 <= routes.shape[3] <= count:
            raise MethodError(
                f"routes of {count} regions are [B or 1, heads or 1, {count}, 1 to {count}], got "
                f"{tuple(routes.shape)}."
            )
        values = (tuple(map(int, grid)), tuple(map(int, regions)), routes, prefix, suffix)
        for name, value in zip(
            ("grid", "regions", "routes", "prefix", "suffix"), values, strict=True
        ):
            object.__setattr__(self, name, value)

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1] + self.suffix

    @property
    def region_shape(self) -> tuple[int, int]:
        """Tokens of a region that is not cut off."""
        return -(-self.grid[0] // self.regions[0]), -(-self.grid[1] // self.regions[1])

    def region_of(self) -> Tensor:
        """Return the region of each token of the grid, int64 [height * width]."""
        rows, columns = (
            torch.arange(length, device=self.routes.device) // size
            for length, size in zip(self.grid, self.region_shape, strict=True)
        )
        return (rows[:, None] * self.regions[1] + columns).flatten()

    def region_map(self) -> Tensor:
        """Return which regions see which, bool [b, h, R, R]."""
        count = self.routes.shape[2]
        shape = (*self.routes.shape[:3], count)
        empty = torch.zeros(shape, dtype=torch.bool, device=self.routes.device)
        return empty.scatter(-1, self.routes, True)

    def visible(self) -> Tensor:
        """Return bool [b, h, tokens, tokens]: for small grids."""
        region = self.region_of()
        inner = self.region_map()[:, :, region[:, None], region]
        return torch.nn.functional.pad(inner, (self.prefix, self.suffix) * 2, value=True)

    @property
    def density(self) -> float:
        """Share of all pairs of tokens that are visible, over batch entries and heads."""
        sizes = torch.bincount(self.region_of(), minlength=self.routes.shape[2]).double()
        seen = self.region_map().double()
        pairs = (sizes @ seen @ sizes).mean() if sizes.numel() else torch.zeros(())
        inner = self.grid[0] * self.grid[1]
        return (float(pairs) + self.tokens**2 - inner**2) / self.tokens**2

    def block_size(self) -> int:
        """Return a block that regions fill well: of at most 128 tokens, the largest that takes up
        to a third more places than there are tokens, or the one that takes the fewest.
        """
        tokens = self.region_shape[0] * self.region_shape[1]
        places = {size: -(-tokens // size) * size for size in (128, 64, 32, 16)}
        good = [size for size, count in places.items() if 3 * count <= 4 * tokens]
        return good[0] if good else min(places, key=lambda size: (places[size], -size))

    def arrange(self, block: int | None = None) -> Arrangement:
        """Return the order in which `block_mask` takes the tokens: global ones, then by region."""
        size = block or self.block_size()
        device = self.routes.device
        inner = self.grid[0] * self.grid[1]
        token = torch.arange(self.tokens, device=device)
        fixed = torch.cat([token[: self.prefix], token[self.prefix + inner :]])
        region = self.region_of()
        order = region.argsort(stable=True)
        row, column = order // self.grid[1], order % self.grid[1]
        tall, wide = self.region_shape
        # cut-off regions have shorter rows, so that their tokens come first in their blocks too
        start = region[order] % self.regions[1] * wide
        line = (self.grid[1] - start).clamp(max=wide)
        offset = row % tall * line + column % wide
        head, each = self._blocks(size)
        place = head * size + region[order] * each * size + offset
        places = torch.empty_like(token)
        places[fixed] = torch.arange(len(fixed), device=device)
        places[self.prefix + order] = place
        total = (head + each * self.routes.shape[2]) * size
        held = torch.zeros(total, dtype=torch.int64, device=device).scatter(0, places, 1)
        slots = torch.zeros(total, dtype=torch.int64, device=device).scatter(0, places, token)
        return Arrangement(slots, places, held.view(-1, size).sum(-1).int())

    def block_mask(
        self, block: int | None = None, device: torch.device | str | None = None
    ) -> BlockMask:
        """Return the block lists over the tokens as `arrange` orders them; all blocks are full."""
        size = block or self.block_size()
        check_blocks(self.tokens, self.tokens, size, size)
        head, each = self._blocks(size)
        b, h, regions, chosen = self.routes.shape
        total = head + each * regions
        where = self.routes.device
        inner = torch.arange(each, device=where)
        routed = head + self.routes.sort(-1).values[..., None] * each + inner
        first = torch.arange(head, device=where).expand(b, h, regions, head)
        line = torch.cat([first, routed.flatten(3)], -1)
        count = torch.full((b, h, total), line.shape[-1], device=where)
        width = total if head else line.shape[-1]
        line = torch.nn.functional.pad(line, (0, width - line.shape[-1]))
        lines = line.repeat_interleave(each, 2)
        if head:  # global queries see every block
            count[:, :, :head] = total
            everything = torch.arange(total, device=where).expand(b, h, head, total)
            lines = torch.cat([everything, lines], 2)
        none = torch.empty(b, h, total, 0, dtype=torch.int32, device=where)
        lengths = self.arrange(size).lengths[None]
        mask = BlockMask(
            total * size, total * size, size, size, count.int(), lines.int(),
            torch.zeros_like(count, dtype=torch.int32), none, none, None, lengths,
        )  # fmt: skip
        return mask if device is None else mask.to(device)

    def _blocks(self, size: int) -> tuple[int, int]:
        """Blocks of the global tokens, and of each region."""
        tokens = self.region_shape[0] * self.region_shape[1]
        return -(-(self.prefix + self.suffix) // size), -(-tokens // size)
