"""Pictures of any resolution: an overview, and tiles whose padding is cut off again.

The tower reads the overview and then the tiles, row by row, each into side x side tokens. The
tokens of the tiles, put together, make one raster, of which the rows or columns that show only
padding are dropped; a newline token follows each row that is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vistoken.errors import DataError
from vistoken.pictures import Part, Picture

_NOWHERE = 1 << 62  # the place of padding: behind every token


@dataclass(frozen=True)
class Tiling:
    """How one picture is cut into tiles, and which tokens of the tiles show it.

    rows, columns: tiles down and across, besides the overview; 0 for a picture that is one tile.
    side: tokens along an edge of a tile. top, left, height, width: the part of the raster of all
    tiles that is no padding.
    """

    rows: int
    columns: int
    side: int
    top: int
    left: int
    height: int
    width: int

    @property
    def tiles(self) -> int:
        """Tiles that the tower reads, the overview included."""
        return 1 + self.rows * self.columns

    @property
    def parts(self) -> tuple[Part, ...]:
        """The overview, and the raster of the tiles if anything of it is left."""
        overview = Part((self.side,), (self.side,))
        bands = _shares(self.top, self.height, self.side, self.rows)
        strips = _shares(self.left, self.width, self.side, self.columns)
        raster = Part(bands, strips)
        return (overview, raster) if raster.tokens else (overview,)

    @property
    def shown(self) -> list[int]:
        """For each tile how many of its tokens reach the LLM."""
        bands = _shares(self.top, self.height, self.side, self.rows)
        strips = _shares(self.left, self.width, self.side, self.columns)
        return [self.side**2, *(band * strip for band in bands for strip in strips)]

    @property
    def newlines(self) -> tuple[int, ...]:
        """Positions in the run of tokens of the newlines: one behind each row of the raster.

        A picture of one tile has a single one, at its end.
        """
        overview = self.side**2
        if not self.rows:
            return (overview,)
        step = self.width + 1
        return tuple(overview + row * step + self.width for row in range(self.height))

    def picture(self, *, newlines: bool = True) -> Picture:
        """The tokens as the LLM reads them, with or without newlines."""
        return Picture(self.parts, self.newlines if newlines else ())

    def place(self) -> Tensor:
        """For each token of each tile [tiles, side * side] its index in the picture, -1 in padding.

        int64 on the CPU; do not edit.
        """
        return _place(self)


def single(side: int) -> Tiling:
    """A picture that is one tile, without an overview."""
    return Tiling(0, 0, side, 0, 0, 0, 0)


@lru_cache(maxsize=1024)
def tiling(
    size: tuple[int, int], pinpoints: tuple[tuple[int, int], ...], tile: int, side: int
) -> Tiling:
    """The tiling of a picture of `size` (height, width) pixels.

    pinpoints: the canvases (height, width) that it may be resized to, in multiples of `tile`, the
    edge of a tile in pixels; side: the edge of a tile in tokens. The best canvas and the rounding
    of the padding are those of transformers.
    """
    from transformers.image_processing_utils import select_best_resolution

    high, wide = size
    down, across = select_best_resolution(size, list(pinpoints))
    rows, columns = down // tile, across // tile
    height, width = rows * side, columns * side
    top = left = 0
    if wide / high > width / height:
        top = (height - int(round(high * (width / wide), 7))) // 2
    else:
        left = (width - int(round(wide * (height / high), 7))) // 2
    return Tiling(rows, columns, side, top, left, height - 2 * top, width - 2 * left)


def read_sizes(given: Any) -> list[tuple[int, int]]:
    """`image_sizes` as numbers (height, width); from a tensor, an array or a list of either.

    Raises `DataError` where they are not pairs of positive numbers. Waits for a GPU tensor.
    """
    rows = given.tolist() if hasattr(given, "tolist") else list(given)
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    sizes: list[tuple[int, int]] = []
    for row in rows:
        try:
            high, wide = (int(edge) for edge in row)
        except (TypeError, ValueError):
            high = wide = 0
        if high < 1 or wide < 1:
            raise DataError(
                f"image_sizes must hold a (height, width) in pixels for each image, got {row!r} "
                "in it; pass on what the image processor returned."
            )
        sizes.append((high, wide))
    return sizes


def check_tiles(pixels: Tensor, counts: Sequence[int], tile: int) -> None:
    """Raise `DataError` unless `pixels` holds `counts[i]` tiles of each picture i.

    [images, most tiles, 3, tile, tile], padded, or [tiles of all, 3, tile, tile].
    """
    shape = list(pixels.shape)
    if len(shape) not in (4, 5) or shape[-3:] != [3, tile, tile]:
        raise DataError(
            f"pixel_values must be [images, tiles, 3, {tile}, {tile}] or [tiles of all images, 3, "
            f"{tile}, {tile}], got {shape}; use the model's own image processor."
        )
    wanted = f"image_sizes names {len(counts)} image(s) of {', '.join(map(str, counts))} tiles"
    if len(shape) == 4:
        fits = shape[0] == sum(counts)
    else:
        fits = shape[0] == len(counts) and shape[1] >= max(counts, default=0)
    if not fits:
        raise DataError(f"{wanted}, overviews included, but pixel_values has the shape {shape}.")


def tiles_of(pixels: Tensor, counts: Sequence[int]) -> Tensor:
    """The tiles of all pictures in a row [tiles, 3, tile, tile], without padding tiles."""
    if pixels.dim() == 4:
        return pixels
    if all(count == pixels.shape[1] for count in counts):
        return pixels.flatten(0, 1)
    return torch.cat([own[:count] for own, count in zip(pixels, counts, strict=True)])


def picture_keys(tile_keys: Tensor, counts: Sequence[int]) -> Tensor:
    """Digests of pictures [I] int64 from those of their tiles, in any batch the same."""
    found = []
    for own in tile_keys.split(list(counts)):
        odd = 2 * torch.arange(len(own), device=own.device) + 1
        found.append((own * odd).sum())  # wraps
    return torch.stack(found)


@dataclass(frozen=True)
class Packing:
    """Which tokens of the tiles make up the pictures.

    index [T] int64: for each token of each picture in turn its number among all tokens [tiles, K]
    that the tower left. counts: tokens of each picture. origin [T]: which of its picture's own
    tokens it is; None if all are there.
    """

    index: Tensor
    counts: tuple[int, ...]
    origin: Tensor | None = None

    def pack(self, values: Tensor) -> Sequence[Tensor] | Tensor:
        """Values of tile tokens [tiles, K, ...] as those of each picture [n, ...].

        Pictures of equally many tokens come as one tensor.
        """
        return self.split(values.flatten(0, 1)[self.index])

    def split(self, values: Tensor) -> Sequence[Tensor] | Tensor:
        """Values [T, ...] by picture."""
        if len(set(self.counts)) == 1:
            return values.unflatten(0, (len(self.counts), self.counts[0]))
        return values.split(list(self.counts))


def pack_all(tilings: Sequence[Tiling], device: torch.device) -> Packing:
    """Pack pictures none of whose tokens were dropped."""
    return _pack_all(tuple(tilings), device)


def pack_left(tilings: Sequence[Tiling], origin: Tensor) -> Packing:
    """Pack what the tower left: `origin` [tiles, K], which of its tile's tokens each one is.

    Counts on it that no tile lost a token that shows the picture while it kept padding; so the
    number of tokens is known without reading `origin`.
    """
    left = origin.shape[1]
    counts = tuple(sum(min(left, shown) for shown in one.shown) for one in tilings)
    place = _places(tuple(tilings), origin.device).gather(1, origin).flatten()
    order = place.argsort(stable=True)[: sum(counts)]  # padding has a place behind every token
    before, firsts = 0, []
    for one, count in zip(tilings, counts, strict=True):
        firsts += [before] * count
        before += sum(one.shown)
    first = _sent(torch.tensor(firsts, dtype=torch.long, device="cpu"), origin.device)
    return Packing(order, counts, place[order] - first)


def shown_tokens(tilings: Sequence[Tiling], device: torch.device) -> Tensor:
    """Which tokens of each tile of these pictures reach the LLM, [tiles, side * side] bool."""
    return _places(tuple(tilings), device) != _NOWHERE


def _shares(start: int, length: int, side: int, tiles: int) -> tuple[int, ...]:
    """How many of the rows (or columns) from `start` on lie in each of `tiles` tiles."""
    edges = [min(max(tile * side, start), start + length) for tile in range(tiles + 1)]
    return tuple(after - before for before, after in zip(edges, edges[1:], strict=False))


# Cached tensors must serve later calls that record gradients, hence not be inference tensors.
@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _place(one: Tiling) -> Tensor:
    side, tokens = one.side, one.side**2
    overview = torch.arange(tokens, device="cpu")[None]
    if not one.rows:
        return overview
    canvas = torch.full((one.rows * side, one.columns * side), -1, device="cpu")
    raster = torch.arange(one.height * one.width, device="cpu").view(one.height, one.width)
    canvas[one.top : one.top + one.height, one.left : one.left + one.width] = tokens + raster
    tiles = canvas.unflatten(0, (one.rows, side)).unflatten(2, (one.columns, side))
    return torch.cat([overview, tiles.transpose(1, 2).reshape(-1, tokens)])


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _pack_all(tilings: tuple[Tiling, ...], device: torch.device) -> Packing:
    found, first = [], 0
    for one in tilings:
        place = one.place().flatten()
        order = place.argsort(stable=True)
        found.append(first + order[int((place < 0).sum()) :])
        first += len(place)
    counts = tuple(sum(one.shown) for one in tilings)
    return Packing(_sent(torch.cat(found), device), counts)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _places(tilings: tuple[Tiling, ...], device: torch.device) -> Tensor:
    """The places of all tiles [tiles, side * side], counted through all pictures."""
    found, before = [], 0
    for one in tilings:
        place = one.place()
        found.append(torch.where(place < 0, _NOWHERE, place + before))
        before += sum(one.shown)
    return _sent(torch.cat(found), device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
