"""The geometry of one picture's visual tokens, as the LLM reads them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One raster of tokens, made of tiles: the rows of each band and the columns of each strip.

    A plain grid has one band and one strip; a picture of 2 x 3 tiles of 24 x 24 tokens, of which
    four rows are padding above and below, has rows (20, 20) and columns (24, 24, 24).
    """

    row_bands: tuple[int, ...]
    column_strips: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the raster."""
        return sum(self.row_bands), sum(self.column_strips)

    @property
    def tokens(self) -> int:
        """Tokens of the raster."""
        rows, columns = self.grid
        return rows * columns


@dataclass(frozen=True)
class Picture:
    """The visual tokens of one picture or video: rasters in order, and separators between them.

    parts: the rasters (a plain picture has one; a tiled one an overview and the tiles; a video one
    per frame). separators: ascending positions, in the whole run of tokens, of newline tokens,
    which show nothing of the picture and are not chosen from. kind: "image" or "video".
    """

    parts: tuple[Part, ...]
    separators: tuple[int, ...] = ()
    kind: str = "image"

    @property
    def tokens(self) -> int:
        """Tokens that show the picture: those a method chooses from."""
        return sum(part.tokens for part in self.parts)

    @property
    def total(self) -> int:
        """Tokens in the prompt, separators included."""
        return self.tokens + len(self.separators)

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns, or None when the picture has several rasters."""
        return self.parts[0].grid if len(self.parts) == 1 else None

    def part_of(self) -> Tensor:
        """For each token the number of its raster, [tokens] int64 on the CPU; do not edit."""
        return _part_of(self)

    def tile_of(self) -> Tensor:
        """For each token the number of its tile, counted through all parts; do not edit."""
        return _tile_of(self)

    def run_index(self) -> Tensor:
        """For each token its position in the whole run, separators counted; do not edit."""
        return _run_index(self)


def plain(rows: int, columns: int) -> Picture:
    """A picture of one untiled raster."""
    return Picture((Part((rows,), (columns,)),))


# Cached tensors must serve later calls that record gradients, hence not be inference tensors.
@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _part_of(picture: Picture) -> Tensor:
    numbers = torch.arange(len(picture.parts), device="cpu")
    return numbers.repeat_interleave(_cpu([part.tokens for part in picture.parts]))


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _tile_of(picture: Picture) -> Tensor:
    found, first = [], 0
    for part in picture.parts:
        bands, strips = len(part.row_bands), len(part.column_strips)
        band = torch.arange(bands, device="cpu").repeat_interleave(_cpu(part.row_bands))
        strip = torch.arange(strips, device="cpu").repeat_interleave(_cpu(part.column_strips))
        found.append((first + band[:, None] * strips + strip).flatten())
        first += bands * strips
    return torch.cat(found)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _run_index(picture: Picture) -> Tensor:
    stays = torch.ones(picture.total, dtype=torch.bool, device="cpu")
    stays[_cpu(picture.separators)] = False
    return stays.nonzero()[:, 0]


def _cpu(values: tuple[int, ...] | list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device="cpu")
