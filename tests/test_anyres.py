"""Tilings of pictures of any resolution against transformers' own unpadding."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from vistoken.adapters.vlm_anyres import (
    Tiling,
    check_tiles,
    pack_all,
    pack_left,
    picture_keys,
    read_sizes,
    shown_tokens,
    single,
    tiles_of,
    tiling,
)
from vistoken.errors import DataError
from vistoken.pictures import Part

own = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")

CPU = torch.device("cpu")
TILE = 336
NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
MANY = [[TILE * down, TILE * across] for down in range(1, 7) for across in range(1, 7)]


def sizes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Random sizes, slivers among them, and those that fill a canvas exactly or miss it by one."""
    draw = random.Random(seed)

    def edge() -> int:
        return draw.choice([draw.randint(1, 40), draw.randint(41, 3000), 335, 336, 337, 672, 1008])

    return [(edge(), edge()) for _ in range(count)]


def build(size: tuple[int, int], pinpoints: list[list[int]], side: int) -> Tiling:
    return tiling(size, tuple((high, wide) for high, wide in pinpoints), TILE, side)


def numbered(size: tuple[int, int], pinpoints: list[list[int]], side: int) -> tuple[int, Tensor]:
    """Tiles, and for each token of the prompt its number among those of the tiles, -1: newline."""
    tiles = own.image_size_to_num_patches(size, pinpoints, TILE)
    down, across = own.get_anyres_image_grid_shape(size, pinpoints, TILE)
    numbers = torch.arange(tiles * side**2).view(tiles, side**2)
    raster = numbers[1:].view(down, across, side, side).permute(0, 2, 1, 3)
    raster = own.unpad_image(raster.reshape(1, down * side, across * side), size)[0]
    rows = torch.nn.functional.pad(raster, (0, 1), value=-1)
    return tiles, torch.cat([numbers[0], rows.flatten()])


@pytest.mark.parametrize("side", [4, 12, 24, 27])
@pytest.mark.parametrize("pinpoints", [NEXT, MANY], ids=["next", "many"])
def test_geometry_is_that_of_transformers(side: int, pinpoints: list[list[int]]) -> None:
    slivers = 0
    for size in sizes(40, seed=side):
        tiles, run = numbered(size, pinpoints, side)
        found = build(size, pinpoints, side)
        picture = found.picture()
        assert (found.tiles, picture.total) == (tiles, len(run)), size
        assert (run < 0).nonzero()[:, 0].tolist() == list(picture.separators)
        shown = run[run >= 0]
        assert torch.equal(pack_all([found], CPU).index, shown)
        assert torch.equal(run[picture.run_index()], shown)
        place = found.place().flatten()
        assert torch.equal(place[shown], torch.arange(len(shown)))
        assert int((place < 0).sum()) == len(place) - len(shown)
        tile_of = shown // side**2
        assert found.shown == torch.bincount(tile_of, minlength=tiles).tolist()
        if len(picture.parts) == 2:
            assert torch.equal(picture.tile_of(), tile_of)
        else:
            slivers += 1  # all of its raster is padding
            assert len(shown) == side**2
        assert found.picture(newlines=False).total == len(shown)
    assert slivers < 20


def test_a_picture_by_hand() -> None:
    found = build((500, 1000), NEXT, 2)  # one row of two tiles: nothing is padding
    assert found.parts == (Part((2,), (2,)), Part((2,), (2, 2)))
    assert found.newlines == (8, 13)
    assert found.place().tolist() == [[0, 1, 2, 3], [4, 5, 8, 9], [6, 7, 10, 11]]
    found = build((1000, 700), NEXT, 4)  # 2 x 2 tiles; 5.6 of 8 columns are picture: 6 are shown
    assert found.parts[1] == Part((4, 4), (3, 3))
    assert found.place()[1].view(4, 4)[:, 0].tolist() == [-1] * 4
    assert found.place()[1].view(4, 4)[0, 1:].tolist() == [16, 17, 18]
    assert found.place()[4].view(4, 4)[0].tolist() == [43, 44, 45, -1]


def test_a_picture_of_one_tile() -> None:
    found = single(3)
    picture = found.picture()
    assert found.tiles == 1 and found.shown == [9]
    assert picture.parts == (Part((3,), (3,)),) and picture.separators == (9,)
    assert pack_all([found], CPU).index.tolist() == list(range(9))


@pytest.mark.parametrize("left", [1, 3, 8, 15, 16])
def test_packing_what_the_tower_left(left: int) -> None:
    """Against a loop; the tower loses padding first, and leaves every row in ascending order."""
    draw = torch.Generator().manual_seed(left)
    tilings = [build(size, NEXT, 4) for size in sizes(6, seed=left)]
    shown = shown_tokens(tilings, CPU)
    assert shown.sum(1).tolist() == [count for one in tilings for count in one.shown]
    score = torch.rand(shown.shape, generator=draw) + shown
    origin = score.topk(left).indices.sort(dim=1).values
    found = pack_left(tilings, origin)

    values = torch.randn(len(origin), left, 2, generator=draw)
    packed, kept, first = found.pack(values), found.split(found.origin), 0
    for own_values, own_origin, one in zip(packed, kept, tilings, strict=True):
        expected = {}
        for tile in range(one.tiles):
            for slot in range(left):
                place = int(one.place()[tile, origin[first + tile, slot]])
                if place >= 0:
                    expected[place] = values[first + tile, slot].tolist()
        first += one.tiles
        assert own_origin.tolist() == sorted(expected)
        assert own_values.tolist() == [expected[place] for place in sorted(expected)]
    assert first == len(origin)


def test_the_device_is_never_waited_for() -> None:
    """Meta tensors hold no values: reading one back fails."""
    meta = torch.device("meta")
    tilings = [build(size, NEXT, 4) for size in sizes(3)]
    tiles = sum(one.tiles for one in tilings)
    values, origin = torch.zeros(tiles, 5, 2).to(meta), torch.zeros(tiles, 5).long().to(meta)
    found = pack_left(tilings, origin)
    counts = [sum(min(5, count) for count in one.shown) for one in tilings]
    assert [one.shape for one in found.pack(values)] == [(count, 2) for count in counts]
    assert pack_all(tilings, meta).index.is_meta and shown_tokens(tilings, meta).is_meta
    assert picture_keys(origin[:, 0], [one.tiles for one in tilings]).shape == (3,)


def test_equal_pictures_come_as_one_tensor() -> None:
    one = build((500, 900), NEXT, 4)
    values = torch.randn(2 * one.tiles, 16, 3)
    packed = pack_all([one, one], CPU).pack(values)
    assert isinstance(packed, torch.Tensor) and packed.shape == (2, sum(one.shown), 3)
    assert torch.equal(packed[1], pack_all([one], CPU).pack(values[one.tiles :])[0])


def test_keys_do_not_depend_on_the_batch() -> None:
    tiles = torch.randint(-(2**62), 2**62, (7,), generator=torch.Generator().manual_seed(0))
    first, second = picture_keys(tiles, [3, 4]).tolist()
    assert picture_keys(tiles[3:], [4]).tolist() == [second] != [first]
    swapped = tiles[[1, 0, 2]]
    assert picture_keys(swapped, [3]).tolist() != [first]


def test_sizes_may_come_in_any_form() -> None:
    given = [[3, 4], [5, 6]]
    tensor = torch.tensor(given)
    for form in (given, tensor, tensor.numpy(), [tensor[0], (5, 6)]):
        assert read_sizes(form) == [(3, 4), (5, 6)]


@pytest.mark.parametrize(
    "given", [[[3]], [[0, 4]], [3, 4], [["a", 1]], [[1, 2, 3]], torch.zeros(2)], ids=str
)
def test_sizes_that_are_none(given: object) -> None:
    with pytest.raises(DataError, match=r"\(height, width\) in pixels"):
        read_sizes(given)


def test_tiles_flat_and_padded() -> None:
    flat = torch.randn(7, 3, 6, 6)
    padded = torch.zeros(2, 4, 3, 6, 6)
    padded[0, :3], padded[1] = flat[:3], flat[3:]
    check_tiles(flat, [3, 4], 6)
    check_tiles(padded, [3, 4], 6)
    assert torch.equal(tiles_of(padded, [3, 4]), flat)
    assert tiles_of(flat, [3, 4]) is flat
    assert torch.equal(tiles_of(padded[1:], [4]), flat[3:])


@pytest.mark.parametrize(
    ("shape", "counts", "says"),
    [
        ((3, 6, 6), [1], "got"),
        ((2, 3, 6, 5), [2], "6, 6"),
        ((2, 1, 6, 6), [2], "6, 6"),
        ((6, 3, 6, 6), [3, 4], "2 image"),
        ((2, 3, 3, 6, 6), [3, 4], "3, 4 tiles"),
        ((3, 4, 3, 6, 6), [3, 4], "2 image"),
    ],
)
def test_tiles_that_do_not_fit(shape: tuple[int, ...], counts: list[int], says: str) -> None:
    with pytest.raises(DataError, match=says):
        check_tiles(torch.zeros(shape), counts, 6)
